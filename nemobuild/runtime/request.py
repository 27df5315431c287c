"""One request: plain field values in, a checked ``Request`` with prompt ids and sampling out.

Every limit of the plan is enforced here, before the engine sees the request, and every refusal names the field, the
value and the limit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .budget import longest_reasoning
from .fields import BY_NAME, MAX_LIST_ITEMS, MAX_WORD_CHARACTERS, PARAMETERS, RequestError, check_value
from .messages import parse_messages, parse_tools
from .prompt import MODES, Prompt, PromptBuilder
from .settings import Settings
from .splitter import ANSWER

LEAST_TEMPERATURE = 0.001


@dataclass(frozen=True, slots=True)
class Request:
    prompt: Prompt
    tools: bool
    max_tokens: int
    max_thinking_tokens: int | None
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop_words: tuple[str, ...]
    bad_words: tuple[str, ...]
    end_ids: tuple[int, ...]
    stream: bool
    return_log_probs: bool
    echo_prompt: bool


def with_parameters(values: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Field values with those that came as request parameters. A tensor wins; an unknown parameter is refused."""
    merged = dict(values)
    for name, value in parameters.items():
        if name == "timeout" and isinstance(value, int):  # Triton's own, in microseconds
            name, value = "timeout_ms", -(-value // 1000)
        elif name.startswith("triton_") or name in ("sequence_id", "sequence_start", "sequence_end", "priority"):
            continue  # Triton's own
        if name not in PARAMETERS:
            raise RequestError(name, f"this field is unknown; parameters may be {', '.join(PARAMETERS)}")
        field = BY_NAME[name]
        wanted = str if field.type == "STRING" else int
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise RequestError(name, f"{value!r} is not of type {field.type}")
        merged.setdefault(name, value)
    return merged


def parse_request(values: Mapping[str, Any], settings: Settings, builder: PromptBuilder) -> Request:
    """Check ``values`` (field name -> str, int, float, bool, or list of str) and build the prompt.

    Raises ``RequestError`` naming the first field that is wrong.
    """
    for name, value in values.items():
        if name not in BY_NAME:
            raise RequestError(name, "this field is unknown")
        _check_size(name, value, settings)
        if not isinstance(value, (str, list)):
            check_value(BY_NAME[name], value)
    prompt = _prompt(values, settings, builder)
    limits = settings.limits
    length = len(prompt.ids)
    field = "messages" if "messages" in values else "text_input"
    if length > limits.max_prompt_tokens:
        raise RequestError(field, f"the prompt has {length} tokens, the limit is {limits.max_prompt_tokens}")
    room = limits.max_context_tokens - length
    max_tokens = int(values.get("max_tokens", min(limits.default_max_tokens, room)))
    if max_tokens > room:
        raise RequestError(
            "max_tokens",
            f"{max_tokens} and a prompt of {length} tokens exceed the context of {limits.max_context_tokens} tokens",
        )
    min_tokens = int(values.get("min_tokens", 0))
    if min_tokens > max_tokens:
        raise RequestError("min_tokens", f"{min_tokens} is more than max_tokens {max_tokens}")
    end_id = values.get("end_id")
    if end_id is not None and end_id >= settings.vocab_size:
        raise RequestError("end_id", f"{end_id} is not a token id below {settings.vocab_size}")
    defaults = settings.sampling_on if prompt.mode == "on" else settings.sampling_off
    return Request(
        prompt=prompt,
        tools="tools" in values,
        max_tokens=max_tokens,
        max_thinking_tokens=_thinking_budget(values, prompt, max_tokens, settings),
        min_tokens=min_tokens,
        temperature=_temperature(float(values.get("temperature", defaults.temperature))),
        top_k=int(values.get("top_k", defaults.top_k)),
        top_p=float(values.get("top_p", defaults.top_p)),
        repetition_penalty=float(values.get("repetition_penalty", 1.0)),
        presence_penalty=float(values.get("presence_penalty", 0.0)),
        frequency_penalty=float(values.get("frequency_penalty", 0.0)),
        seed=int(values["seed"]) if "seed" in values else _derived_seed(prompt.ids),
        stop_words=_words(values, "stop_words"),
        bad_words=_words(values, "bad_words"),
        end_ids=settings.end_token_ids if end_id is None else (int(end_id),),
        stream=bool(values.get("stream", True)),
        return_log_probs=bool(values.get("return_log_probs", False)),
        echo_prompt=not values.get("exclude_input_in_output", True),
    )


def _prompt(values: Mapping[str, Any], settings: Settings, builder: PromptBuilder) -> Prompt:
    mode = values.get("reasoning_mode", "auto")
    if mode not in MODES:
        raise RequestError("reasoning_mode", f"{mode!r} is not one of {', '.join(MODES)}")
    if "messages" in values and "text_input" in values:
        raise RequestError("messages", "give either messages or text_input, not both")
    if "messages" in values:
        tools, knows_tools = (
            parse_tools(values["tools"]) if "tools" in values else None,
            bool(settings.reasoning.tool_open_tag),
        )
        if tools and not knows_tools:
            raise RequestError("tools", "this model's template has no tools")
        return builder.from_messages(parse_messages(values["messages"], tools=knows_tools), tools, mode)
    if "tools" in values:
        raise RequestError("tools", "tools need messages, not a raw text_input")
    if "text_input" not in values:
        raise RequestError("text_input", "missing; give text_input or messages")
    return builder.from_text(values["text_input"], mode)


def _thinking_budget(values: Mapping[str, Any], prompt: Prompt, max_tokens: int, settings: Settings) -> int | None:
    """The bound on the reasoning. What follows the reasoning is generated from a longer prompt, which must fit too."""
    if "max_thinking_tokens" not in values:
        return None
    budget = int(values["max_thinking_tokens"])
    if not settings.reasoning.close_tag:
        raise RequestError("max_thinking_tokens", "this model has no reasoning")
    length, limit = len(prompt.ids), settings.limits.max_prompt_tokens
    if prompt.start != ANSWER and length + min(longest_reasoning(budget), max_tokens - 1) > limit:
        raise RequestError(
            "max_thinking_tokens", f"{budget} and a prompt of {length} tokens exceed the prompt limit of {limit} tokens"
        )
    return budget


def _check_size(name: str, value: Any, settings: Settings) -> None:
    texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    if len(texts) > MAX_LIST_ITEMS:
        raise RequestError(name, f"{len(texts)} entries, the limit is {MAX_LIST_ITEMS}")
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > settings.limits.max_request_bytes:
        raise RequestError(name, f"{size} bytes, the limit is {settings.limits.max_request_bytes}")


def _temperature(value: float) -> float:
    if 0 < value < LEAST_TEMPERATURE:
        raise RequestError(
            "temperature", f"{value:g} is too near to 0 to divide by; the least is {LEAST_TEMPERATURE}, 0 is greedy"
        )
    return value


def _words(values: Mapping[str, Any], name: str) -> tuple[str, ...]:
    for at, word in enumerate(values.get(name, ())):
        if len(word) > MAX_WORD_CHARACTERS:
            raise RequestError(f"{name}[{at}]", f"{len(word)} characters, the limit is {MAX_WORD_CHARACTERS}")
    return tuple(word for word in values.get(name, ()) if word)


def _derived_seed(ids: list[int]) -> int:
    """Without a seed the same prompt gives the same answer: repeatable runs are worth more than variety."""
    digest = hashlib.sha256(array("I", ids)).digest()
    return int.from_bytes(digest[:8], "little")
