"""A fixed set of questions, asked through the served repository as a client asks, and how answers are judged.

An answer is *sound* when the contract holds whatever the model is worth: text in whole characters, no tag of the
model in it, no reasoning where none was asked for, a known reason for its end, counts that agree. All must be. It is
*right* when it also says what the prompt expects and ended by itself. A share of them must be, and only few may be
that the version before answered right: so a small model is held to what it can, and a large one to all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from nemobuild.config import GatesConfig, read_yaml
from nemobuild.conversation import Conversation
from nemobuild.errors import ChildFailed, RemoteError, UsageError
from nemobuild.gates.results import Check, Gate, at_least, at_most
from nemobuild.resources import data_folder
from nemobuild.runtime.settings import ReasoningPolicy

_SEED = 1
_MAX_TOKENS = {"off": 256, "on": 4096}
_ENDS = ("stop", "tool_calls", "length")


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    arguments: dict[str, Any] = {}


class Prompt(BaseModel):
    """One entry of ``engine_configs/gates.yaml``, which says what the fields mean."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    language: str
    ask: str = Field(min_length=1)
    reasoning: Literal["on", "off"] | None = None
    tools: list[dict[str, Any]] = []
    any_of: list[str] = []
    call: ToolCall | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. ``unsound`` says what breaks the contract, ``wrong`` what the prompt expected and did not get."""

    prompt: str
    language: str
    reasoning_mode: str | None
    text: str
    reasoning: str
    tool_calls: Sequence[Any]
    finish_reason: str
    completion_tokens: int
    elapsed_s: float
    unsound: str = ""
    wrong: str = ""

    @property
    def right(self) -> bool:
        return not (self.unsound or self.wrong)


def load_prompts(path: Path | None = None) -> list[Prompt]:
    """The prompts of a YAML file; default: those that ship. Raises ``UsageError`` that names the field."""
    path = path or data_folder("engine_configs") / "gates.yaml"
    try:
        found = TypeAdapter(list[Prompt]).validate_python(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the list"
        raise UsageError("bad-prompts", f"{where} in {path} is wrong.", why=f"{first['msg']}.") from error
    names = [prompt.name for prompt in found]
    if not found or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        what = f"{path} names {twice!r} twice." if twice else f"{path} holds no prompt."
        raise UsageError("bad-prompts", what, next="Correct it and try again.")
    return found


def fitting(prompts: Sequence[Prompt], policy: ReasoningPolicy) -> list[Prompt]:
    """Those that a model of this reasoning policy can be asked, without the mode where it has none."""
    has_modes, has_tools = policy.switch != "none", bool(policy.tool_open_tag)
    asked = [p for p in prompts if (has_modes or p.reasoning != "on") and (has_tools or not p.tools)]
    return asked if has_modes else [p.model_copy(update={"reasoning": None}) for p in asked]


def ask_all(
    url: str,
    prompts: Sequence[Prompt],
    policy: ReasoningPolicy,
    *,
    limit_tokens: int,
    timeout_s: float = 300.0,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """Ask ``prompts`` one after the other, with the profile's own sampling and a fixed seed.

    ``limit_tokens`` bounds every answer beside the prompt's own bound. Raises ``RemoteError`` when the server is gone;
    a prompt that it refuses or fails on is an unsound answer.
    """
    answers = []
    for prompt in prompts:
        answers.append(_ask(url, prompt, policy, limit_tokens, timeout_s))
        on_answer(answers[-1])
    return answers


def judge(answers: Sequence[Answer], before: Sequence[Answer] | None, gates: GatesConfig) -> tuple[Check, ...]:
    """The checks of the gate; ``before`` are the answers of the version before, if there is one."""
    unsound = [answer for answer in answers if answer.unsound]
    right = {answer.prompt for answer in answers if answer.right}
    checks = [
        at_most("answers that are not sound", len(unsound), 0, "d"),
        at_least("share of right answers", len(right) / max(1, len(answers)), gates.min_right, ".0%"),
    ]
    if before is not None:
        lost = [answer.prompt for answer in before if answer.right and answer.prompt not in right]
        checks.append(at_most("answers that the version before had right", len(lost), gates.max_lost, "d"))
    return tuple(checks)


def gate(answers: Sequence[Answer], before: Sequence[Answer] | None, gates: GatesConfig) -> Gate:
    """The gate ``prompts``, with every answer for the report."""
    details: dict[str, Any] = {"answers": [asdict(a) | {"right": a.right} for a in answers]}
    if before is not None:
        details["before"] = {answer.prompt: answer.right for answer in before}
    return Gate("prompts", judge(answers, before, gates), sum(a.elapsed_s for a in answers), details=details)


def _ask(url: str, prompt: Prompt, policy: ReasoningPolicy, limit_tokens: int, timeout_s: float) -> Answer:
    thinks = prompt.reasoning != "off" and policy.switch != "none"
    fields = {
        "reasoning_mode": prompt.reasoning,
        "tools": json.dumps(prompt.tools, ensure_ascii=False) if prompt.tools else None,
        "max_tokens": min(limit_tokens, _MAX_TOKENS["on" if thinks else "off"]),
        "seed": _SEED,
    }
    talk = Conversation(url, fields, timeout_s=timeout_s)
    started_s, failed = time.perf_counter(), ""
    try:
        for _ in talk.ask(prompt.ask):
            pass
    except RemoteError:
        raise
    except (UsageError, ChildFailed) as error:
        failed = str(error)
    said = talk.last
    answer = Answer(
        prompt=prompt.name,
        language=prompt.language,
        reasoning_mode=prompt.reasoning,
        text=said["text_output"],
        reasoning=said["reasoning_output"],
        tool_calls=said["tool_calls"],
        finish_reason=said.get("finish_reason", ""),
        completion_tokens=said.get("completion_tokens", 0),
        elapsed_s=time.perf_counter() - started_s,
        unsound=failed or _unsound(prompt, policy, said),
    )
    return answer if answer.unsound else replace(answer, wrong=_wrong(answer, prompt))


def _unsound(prompt: Prompt, policy: ReasoningPolicy, said: dict[str, Any]) -> str:
    text, reasoning, calls = said["text_output"], said["reasoning_output"], said["tool_calls"]
    tags = [t for t in (policy.open_tag, policy.close_tag, policy.tool_open_tag, policy.tool_close_tag) if t]
    ends, counted = said.get("finish_reason"), said.get("completion_tokens", 0)
    whole = (reasoning + text).rstrip("�") if ends == "length" else reasoning + text  # a bound may cut a character
    problems = (
        (ends not in _ENDS, f"it ended for the reason {ends!r}"),
        (not (text or reasoning or calls), "it is empty"),
        (counted < 1 or said.get("prompt_tokens", 0) < 1, "its tokens are not counted"),
        ("�" in whole, "a character in it is broken"),
        (any(tag in text for tag in tags), "a tag of the model is in the text"),
        (prompt.reasoning == "off" and bool(reasoning), "it holds reasoning although that is off"),
        (bool(calls) != (ends == "tool_calls") and ends != "length", "its reason and its tool calls disagree"),
    )
    return next((problem for fails, problem in problems if fails), "")


def _wrong(answer: Answer, prompt: Prompt) -> str:
    if answer.finish_reason == "length":
        return f"it did not end within {answer.completion_tokens} tokens"
    if prompt.reasoning == "on" and not answer.reasoning.strip():
        return "it did not reason"
    words = answer.text.casefold()
    if prompt.any_of and not any(word.casefold() in words for word in prompt.any_of):
        return f"it holds none of {', '.join(prompt.any_of)}"
    if prompt.call is not None and (problem := _wrong_call(answer.tool_calls, prompt.call)):
        return problem
    return ""


def _wrong_call(calls: Sequence[Any], wanted: ToolCall) -> str:
    if not calls:
        return f"it does not call {wanted.name}"
    try:
        given = calls[0]["arguments"]
        arguments = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return "the arguments of its call are not JSON"
    if calls[0]["name"] != wanted.name:
        return f"it calls {calls[0]['name']}, not {wanted.name}"
    for name, value in wanted.arguments.items():
        found = arguments.get(name) if isinstance(arguments, dict) else None
        if str(value).casefold() not in str(found).casefold():
            return f"it calls {wanted.name} with {name} {found!r}, not {value!r}"
    return ""
