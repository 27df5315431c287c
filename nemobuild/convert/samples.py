"""Texts that a model is calibrated or judged with: JSON lines, turned into token ids.

A line is ``{"text": ...}``, taken as it is, or ``{"messages": [...]}``, rendered by the model's own chat template,
for what the model meets when it serves is a template's output and not bare prose. Where the model can reason, every
other conversation switches it on and the others off, unless a line says which. The last message may be the
assistant's; it is then written as the model would write it, with its reasoning and tool calls in the model's own tags.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from nemobuild.config import reasoning_policies, reasoning_policy
from nemobuild.errors import IntegrityError, UsageError, from_os_error, nearest
from nemobuild.model.hf_config import load_json
from nemobuild.model.spec import ModelSpec
from nemobuild.model.tokenizer import chat_template, load_tokenizer, special_token
from nemobuild.resources import data_folder
from nemobuild.runtime.fields import RequestError
from nemobuild.runtime.messages import parse_messages, parse_tools
from nemobuild.runtime.prompt import PromptBuilder
from nemobuild.runtime.settings import Limits, ReasoningPolicy, Settings
from nemobuild.runtime.template import ChatTemplate

MAX_FILE_BYTES = 256 << 20
MAX_SAMPLES = 65536
# Far beyond any context; the tokenizer takes about 150 bytes of memory for each byte.
MAX_LINE_BYTES = 1 << 20
LANGUAGES = ("en", "de", "fr", "it", "pt", "hi", "es", "th")
_PROMPT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.*")
_KEYS = ("text", "messages", "tools", "reasoning", "language", "kind")


@dataclass(frozen=True, slots=True)
class Sample:
    """One text. ``language`` and ``kind`` are what its line says about itself."""

    token_ids: array[int]  # 4 bytes each
    line: int
    language: str | None
    kind: str | None


@dataclass(frozen=True, slots=True)
class SampleSet:
    """``digest`` (sha256, hex) is that of the file; ``skipped`` counts lines beyond the number asked for."""

    samples: tuple[Sample, ...]
    path: Path
    digest: str
    skipped: int

    @property
    def tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.samples)


def default_calibration() -> Path:
    """The calibration texts that ship with nemobuild."""
    return data_folder("engine_configs") / "calibration" / "default.jsonl"


def held_out() -> Path:
    """The texts that ship with nemobuild for judging a result; none of them is used to calibrate."""
    return data_folder("engine_configs") / "calibration" / "heldout.jsonl"


def prompt_digest(model: Path, reasoning: str | None) -> str:
    """sha256 (hex) of what turns texts into the token ids of ``model``: its tokenizer, its template, and the policy."""
    digest = hashlib.sha256()
    try:
        for file in sorted(file for pattern in _PROMPT_FILES for file in model.glob(pattern)):
            digest.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    except OSError as error:
        raise from_os_error(error, model, "reading the tokenizer") from error
    policies = reasoning_policies().values() if reasoning is None else [reasoning_policy(reasoning)]
    digest.update(json.dumps([reasoning, *map(asdict, policies)], sort_keys=True).encode())
    return digest.hexdigest()


def load_samples(
    path: Path,
    model: Path,
    spec: ModelSpec,
    *,
    count: int | None = None,
    tokens_per_sample: int | None = 512,
    reasoning: str | None = None,
) -> SampleSet:
    """The first ``count`` texts of ``path`` (all when ``None``) as token ids of the model in folder ``model``.

    Each is cut to ``tokens_per_sample``; ``None`` takes them whole and refuses one that is longer than the model's
    context. ``reasoning`` names a policy of ``engine_configs/reasoning.yaml``; by default the chat template tells it.
    Raises ``UsageError`` with the line and the field of what is wrong, ``IntegrityError`` for a damaged tokenizer.
    """
    if count is not None and count < 1:
        raise UsageError("bad-samples", f"{count} samples cannot calibrate anything.", next="Give at least 1.")
    if tokens_per_sample is not None and not 1 <= tokens_per_sample <= spec.max_context_tokens:
        raise UsageError(
            "samples-too-long",
            f"Samples of {tokens_per_sample} tokens do not fit the model.",
            why=f"Its context is {spec.max_context_tokens} tokens.",
            next="Give a smaller number of tokens per sample.",
        )
    raw = _read(path)
    lines = [(n, line) for n, line in enumerate(raw.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(
            "calibration-empty",
            f"{path} holds no text.",
            why="Scales of activations come from running texts through the model.",
            next='Give a file with lines such as {"text": "..."} or {"messages": [...]}.',
        )
    if len(lines) > MAX_SAMPLES:
        _refuse(path, lines[MAX_SAMPLES][0], f"the file has more than {MAX_SAMPLES} samples")
    if count is not None and count > len(lines):
        raise UsageError(
            "bad-samples",
            f"{count} samples were asked for; {path} holds {len(lines)}.",
            next=f"Give --samples {len(lines)}, or fewer.",
        )
    chosen = lines[:count]
    writer = _Writer(model, spec, reasoning)
    samples = tuple(_sample(path, n, line, i, writer, spec, tokens_per_sample) for i, (n, line) in enumerate(chosen))
    return SampleSet(samples, Path(path), hashlib.sha256(raw).hexdigest(), len(lines) - len(chosen))


def _read(path: Path) -> bytes:
    try:
        with Path(path).open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise from_os_error(error, path, "reading") from error
    if len(raw) > MAX_FILE_BYTES:
        raise UsageError("calibration-too-large", f"{path} is larger than {MAX_FILE_BYTES} bytes.")
    return raw


def _sample(
    path: Path, number: int, line: bytes, index: int, writer: _Writer, spec: ModelSpec, limit: int | None
) -> Sample:
    if len(line) > MAX_LINE_BYTES:
        _refuse(path, number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        _refuse(path, number, f"not valid JSON ({error})")
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        _refuse(path, number, "not valid Unicode")
    if not isinstance(entry, dict):
        _refuse(path, number, "an object is needed")
    for key in entry:
        if key not in _KEYS:
            _refuse(path, number, f"the key {key!r} is unknown; {nearest(key, _KEYS).rstrip('.')}")
    if ("text" in entry) == ("messages" in entry):
        _refuse(path, number, "exactly one of text and messages is needed")
    for key in ("language", "kind"):
        if not isinstance(entry.get(key), (str, type(None))):
            _refuse(path, number, f"{key} is not a string")
    mode = entry.get("reasoning") or ("off" if index % 2 else "on")
    if mode not in ("on", "off"):
        _refuse(path, number, f"reasoning is {mode!r}, not 'on' or 'off'")
    try:
        if "text" in entry:
            if not isinstance(entry["text"], str) or not entry["text"].strip():
                _refuse(path, number, "text is not a string with something in it")
            ids = writer.text(entry["text"])
        else:
            ids = writer.messages(entry["messages"], entry.get("tools"), mode)
    except RequestError as error:
        _refuse(path, number, str(error))
    if limit is None and len(ids) > spec.max_context_tokens:
        raise UsageError(
            "samples-too-long",
            f"Line {number} of {path} has {len(ids)} tokens.",
            why=f"The model's context is {spec.max_context_tokens} tokens.",
            next="Shorten it, or give a number of tokens per sample, to which all are cut.",
        )
    return Sample(array("I", ids[:limit]), number, entry.get("language"), entry.get("kind"))


class _Writer:
    """Text and conversations -> token ids, as the served model would meet them."""

    def __init__(self, model: Path, spec: ModelSpec, reasoning: str | None) -> None:
        self._tokenizer = load_tokenizer(model, spec)
        config = load_json(model / "tokenizer_config.json") if (model / "tokenizer_config.json").exists() else {}
        source = chat_template(model, config)
        self._policy = _policy(reasoning, source)
        eos = special_token(config, "eos_token", self._tokenizer)
        self._end = [i for i in [self._tokenizer.token_to_id(eos)] if i is not None] if eos else []
        context = spec.max_context_tokens
        settings = Settings(
            model_name=model.name,
            vocab_size=spec.vocab_size,
            bos_token=special_token(config, "bos_token", self._tokenizer),
            end_token_ids=spec.end_token_ids,
            limits=Limits(MAX_LINE_BYTES, MAX_LINE_BYTES, context),  # what is too long is cut, not refused
            reasoning=self._policy,
            template_variables={"eos_token": eos or ""},
        )
        try:
            template = None if source is None else ChatTemplate(source)
        except ValueError as error:
            raise IntegrityError("bad-template", "The model's chat template does not work.", why=f"{error}.") from error
        self._has_template = template is not None
        self._builder = PromptBuilder(self._tokenizer, settings, template)

    def text(self, text: str) -> list[int]:
        return self._builder.from_text(text, "auto").ids

    def messages(self, value: Any, tools: Any, mode: str) -> list[int]:
        """Without a template the contents alone, one paragraph each: a base model has no other form."""
        messages = parse_messages(json.dumps(value))
        known = parse_tools(json.dumps(tools)) if tools is not None else None
        if not self._has_template:
            return self.text("\n\n".join(m["content"] for m in messages if m["content"]))
        answer = messages.pop() if messages[-1]["role"] == "assistant" and len(messages) > 1 else None
        mode = "auto" if self._policy.switch == "none" else mode
        ids = self._builder.from_messages(messages, known, mode).ids
        if answer is None:
            return ids
        thoughts = value[-1].get("reasoning_content")
        if not isinstance(thoughts, (str, type(None))):
            raise RequestError("messages", "reasoning_content is not a string")
        return ids + self._answer(answer, thoughts if mode == "on" else None)

    def _answer(self, answer: dict[str, Any], thoughts: str | None) -> list[int]:
        policy, text = self._policy, str(answer["content"])
        if thoughts and policy.open_tag:
            text = f"{policy.open_tag}\n{thoughts}\n{policy.close_tag}\n\n{text}"
        if calls := answer.get("tool_calls"):
            shown = [{"name": c["function"]["name"], "arguments": _arguments(c["function"])} for c in calls]
            text += policy.tool_open_tag + json.dumps(shown, ensure_ascii=False) + policy.tool_close_tag
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) + self._end


def _arguments(function: dict[str, Any]) -> Any:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def _policy(name: str | None, template: str | None) -> ReasoningPolicy:
    """The policy of that name; without one, that whose directive the template itself looks for."""
    if name is not None:
        return reasoning_policy(name)
    fitting = [p for p in reasoning_policies().values() if p.switch == "directive" and p.off in (template or "")]
    return fitting[0] if fitting else ReasoningPolicy()


def _refuse(path: Path, number: int, problem: str) -> NoReturn:
    raise UsageError(
        "calibration-broken",
        f"Line {number} of {path} cannot be used: {problem}.",
        why="A sample that is skipped silently would change the scales.",
        next="Correct or remove that line.",
    )
