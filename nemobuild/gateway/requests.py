"""Requests in OpenAI's form, checked, and turned into the fields of ``chat``.

Three rules. A field that is null was not given. A field that OpenAI has and this server lacks is refused by name,
unless it holds the value that changes nothing. Numbers and messages have their bounds in one place only: the chat model
checks them, and its refusal is given back under the name that the client used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json

from nemobuild.errors import nearest
from nemobuild.gateway.errors import ApiError, wrong
from nemobuild.runtime.fields import RequestError
from nemobuild.runtime.messages import object_of, parse_tools

# What OpenAI's API has and this server lacks -> the values that ask for nothing.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": (),
    "top_logprobs": (0,),
    "user": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# reasoning_effort -> reasoning_mode and max_thinking_tokens; from "high" on the model thinks as long as it likes.
EFFORTS: dict[str, tuple[str, int | None]] = {
    "none": ("off", None),
    "minimal": ("on", 256),
    "low": ("on", 1024),
    "medium": ("on", 8192),
    "high": ("on", None),
    "xhigh": ("on", None),
    "max": ("on", None),
}
_SHOWN = 100  # characters of what a client made up
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_SAME_NAME = (
    *("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "min_tokens", "stream"),
)
# Null in these keys of a message says the same as their absence; clients send back what they got.
_NULL_KEYS = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls", "name", "reasoning_content"})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool | None = None


class Reasoning(_Strict):
    """How much to think: at most one of ``effort`` and ``max_tokens``; ``enabled`` alone switches."""

    enabled: bool | None = None
    effort: Effort | None = None
    max_tokens: int | None = None


class _Generation(_Strict):
    """What both endpoints share. ``top_k``, ``min_tokens`` and ``repetition_penalty`` go beyond OpenAI's own."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: Annotated[list[str], FailFast(), BeforeValidator(_as_list)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None

    def fields(self) -> Iterator[tuple[str, str, Any]]:
        """(field of ``chat``, name here, value) of all that was given."""
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it needs stream: true")
        for name in _SAME_NAME:
            if (value := getattr(self, name)) is not None:
                yield name, name, value
        if self.stop:
            if "" in self.stop:
                raise wrong("stop", "an empty string stops nothing")
            yield "stop_words", "stop", self.stop
        if self.max_tokens is not None:
            yield "max_tokens", "max_tokens", self.max_tokens


class ChatRequest(_Generation):
    """The body of ``/v1/chat/completions``."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    logprobs: bool = False

    def fields(self) -> Iterator[tuple[str, str, Any]]:
        yield from super().fields()
        yield "messages", "messages", _dump([_without_nulls(message) for message in self.messages])
        if self.tool_choice not in (None, "auto", "none"):
            raise wrong("tool_choice", f"{_dump(self.tool_choice)[:_SHOWN]} is not supported, only 'auto' and 'none'")
        if self.tools is not None:
            tools = _dump(self.tools)
            if self.tool_choice != "none":
                yield "tools", "tools", tools
            else:  # a model that knows no tools calls none; but they are looked at
                _checked(parse_tools, tools)
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise wrong("max_tokens", "it differs from max_completion_tokens, its newer name; give one")
            yield "max_tokens", "max_completion_tokens", self.max_completion_tokens
        yield from self._reasoning()
        if self.logprobs:
            yield "return_log_probs", "logprobs", True

    def _reasoning(self) -> Iterator[tuple[str, str, Any]]:
        asked = self.reasoning or Reasoning()
        if self.reasoning_effort is not None and self.reasoning is not None:
            raise wrong("reasoning", "give either reasoning or reasoning_effort")
        where = "reasoning_effort" if self.reasoning_effort is not None else "reasoning.effort"
        effort = self.reasoning_effort or asked.effort
        if effort is not None:
            if asked.max_tokens is not None:
                raise wrong("reasoning.max_tokens", "give either effort or max_tokens")
            if asked.enabled is not None and asked.enabled != (effort != "none"):
                raise wrong("reasoning.enabled", f"{_dump(asked.enabled)} contradicts effort {effort!r}")
            mode, budget = EFFORTS[effort]
            yield "reasoning_mode", where, mode
            if budget is not None:
                yield "max_thinking_tokens", where, budget
            return
        if asked.max_tokens is not None:
            if asked.enabled is False:
                raise wrong("reasoning.enabled", "false contradicts max_tokens")
            yield "reasoning_mode", "reasoning", "on"
            yield "max_thinking_tokens", "reasoning.max_tokens", asked.max_tokens
        elif asked.enabled is not None:
            yield "reasoning_mode", "reasoning.enabled", "on" if asked.enabled else "off"


class CompletionRequest(_Generation):
    """The body of ``/v1/completions``: a raw prompt, control tokens included."""

    prompt: Annotated[list[str], FailFast(), BeforeValidator(_as_list)]
    echo: bool = False
    logprobs: int | None = None

    def fields(self) -> Iterator[tuple[str, str, Any]]:
        yield from super().fields()
        if len(self.prompt) != 1:
            raise wrong("prompt", f"{len(self.prompt)} prompts; one is supported")
        yield "text_input", "prompt", self.prompt[0]
        if self.echo:
            yield "exclude_input_in_output", "echo", False
        if self.logprobs is not None:
            if self.logprobs != 0:
                raise wrong("logprobs", f"{self.logprobs} is not supported, only 0: that of the chosen token")
            yield "return_log_probs", "logprobs", True


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that has its form: the fields for ``chat``, and how the client called each of them."""

    fields: dict[str, Any]
    names: dict[str, str]
    stream: bool
    include_usage: bool
    log_probs: bool


Kind = TypeVar("Kind", bound=_Generation)


def read_request(kind: type[Kind], body: bytes, model: str) -> Asked:
    """Check ``body`` for the endpoint of ``kind``. Raises ``ApiError`` that names the first field that is wrong."""
    try:
        data = from_json(body, allow_inf_nan=False)
        json.loads(body, object_pairs_hook=object_of)  # the strict parser takes the last of two equal keys
    except RequestError as error:
        raise wrong(error.field, "this key is given twice in one object") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    given = {name: value for name, value in data.items() if value is not None}
    for name, neutral in NOT_SUPPORTED.items():
        if name in given and name not in kind.model_fields and not _is_one_of(given.pop(name), neutral):
            only = f"only {' or '.join(map(_dump, neutral))}" if neutral else "leave it out"
            raise wrong(name, f"it is not supported, {only}")
    for name in given:
        if name not in kind.model_fields:
            raise wrong(name[:_SHOWN], f"there is no such field. {nearest(name[:_SHOWN], kind.model_fields)}")
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _explain(error) from error
    if request.model != model:
        message = f"model: there is no model {request.model[:_SHOWN]!r} here, only {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")
    triples = list(request.fields())
    fields = {field: value for field, _, value in triples}
    options = request.stream_options or StreamOptions()
    return Asked(
        fields=fields,
        names={field: name for field, name, _ in triples},
        stream=request.stream,
        include_usage=bool(options.include_usage),
        log_probs="return_log_probs" in fields,
    )


def refused(asked: Asked, message: str) -> ApiError:
    """The chat model's refusal ``field[place]: problem``, under the name that the client gave to the field."""
    where, colon, problem = message.partition(": ")
    field = next((name for name in asked.names if where == name or where.startswith((f"{name}[", f"{name}."))), None)
    if not colon or field is None:
        return ApiError(400, message, code="invalid_value")
    return wrong(asked.names[field] + where[len(field) :], problem)


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    where = ""
    for key in first["loc"]:
        where += f"[{key}]" if isinstance(key, int) else f".{key}" if where else key
    if first["type"] == "extra_forbidden":
        return wrong(where[:_SHOWN], "there is no such field.")
    return wrong(where, first["msg"][:1].lower() + first["msg"][1:])


def _checked(parse: Callable[[str], Any], text: str) -> None:
    try:
        parse(text)
    except RequestError as error:
        field, _, problem = str(error).partition(": ")
        raise wrong(field, problem) from None


def _without_nulls(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {key: value for key, value in message.items() if value is not None or key not in _NULL_KEYS}


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(item) and value == item for item in allowed)  # True is not 1 here


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))  # no longer than what came
