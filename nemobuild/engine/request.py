"""What a client of an engine in Python asks for, what it gets, and the checks in between.

Names and meanings follow the inputs of TensorRT-LLM's executor. A request is checked whole before it is queued, so
that a bad one can neither fail in the middle of a stream nor touch the others in the batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..errors import UsageError

FinishReason = Literal["end", "stop_word", "length", "cancelled", "error"]
MAX_TOP_K = 1024  # the limit of TensorRT-LLM's kernels


@dataclass(frozen=True, slots=True)
class Generation:
    """One request. Counts in tokens, words as sequences of token ids."""

    input_ids: Sequence[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    """End ids are forbidden before this many new tokens. Stop words are not, as in TensorRT-LLM."""
    end_ids: Sequence[int] = ()
    stop_words: Sequence[Sequence[int]] = ()
    bad_words: Sequence[Sequence[int]] = ()
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 1 is greedy, 0 is off."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens with this mass (of the top k); 1 is off, 0 as in ``check``."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    return_log_probs: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of a request, an end token included. The last chunk has ``finished`` and says why."""

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    """One per token, if asked for; see ``Sampler``."""
    finished: bool = False
    finish_reason: FinishReason | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask of this engine."""

    vocab_size: int
    max_context_tokens: int
    kv_cache_tokens: int


class RequestError(UsageError):
    """The request is refused because of ``field``."""

    def __init__(self, field: str, message: str, code: str = "bad-request") -> None:
        super().__init__(code, f"{field}: {message}.")
        self.field = field


class QueueFull(RequestError):
    """All slots and the whole queue are taken; the same request may pass later."""

    def __init__(self, waiting: int) -> None:
        super().__init__("request", f"the engine is busy and {waiting} requests wait already", "queue-full")


def check(generation: Generation, limits: Limits) -> Generation:
    """``generation`` with plain Python values and tuples. Raises ``RequestError`` for the first bad field.

    A top_p of 0 means greedy without top_k, and no top_p with it (TensorRT-LLM, ``setupTopKRuntimeArgs``).
    """
    vocab = limits.vocab_size
    values: dict[str, Any] = {f.name: getattr(generation, f.name) for f in fields(Generation)}
    values["input_ids"] = _token_ids("input_ids", generation.input_ids, vocab)
    values["end_ids"] = _token_ids("end_ids", generation.end_ids, vocab)
    for field in ("stop_words", "bad_words"):
        values[field] = _words(field, values[field], vocab)
    for field, (least, most) in _INTEGERS.items():
        values[field] = _number(field, values[field], least, most, operator.index)
    for field, (lowest, highest) in _FLOATS.items():
        values[field] = _number(field, values[field], lowest, highest, float)
    values["return_log_probs"] = bool(values["return_log_probs"])
    if values["repetition_penalty"] == 0:
        raise RequestError("repetition_penalty", "0 would divide by zero; 1 is no penalty")
    prompt, new = len(values["input_ids"]), values["max_new_tokens"]
    if not prompt:
        raise RequestError("input_ids", "the prompt is empty")
    for name, limit in (("max_context_tokens", limits.max_context_tokens), ("kv_cache_tokens", limits.kv_cache_tokens)):
        if prompt >= limit:
            raise RequestError("input_ids", f"the prompt has {prompt} tokens, above what {name} = {limit} allows")
        if prompt + new > limit:
            raise RequestError("max_new_tokens", f"{new} after a prompt of {prompt} tokens exceed {name} = {limit}")
    if values["min_new_tokens"] > new:
        raise RequestError("min_new_tokens", f"{values['min_new_tokens']} is more than max_new_tokens = {new}")
    checked = Generation(**values)
    if checked.top_p == 0:
        checked = replace(checked, top_p=1.0, top_k=checked.top_k or 1)
    return checked


_INTEGERS: dict[str, tuple[int, int]] = {
    "max_new_tokens": (1, 2**31 - 1),
    "min_new_tokens": (0, 2**31 - 1),
    "top_k": (0, MAX_TOP_K),
    "seed": (0, 2**64 - 1),
}
_FLOATS: dict[str, tuple[float, float]] = {
    "temperature": (0, 1e6),
    "top_p": (0, 1),
    "repetition_penalty": (0, 1e6),
    "presence_penalty": (-1e6, 1e6),
    "frequency_penalty": (-1e6, 1e6),
}


def _number(field: str, value: Any, least: float, most: float, convert: Callable[[Any], Any]) -> Any:
    try:
        number = convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        kind = "a whole number" if convert is operator.index else "a number"
        raise RequestError(field, f"{value!r} is not {kind}") from error
    if not (math.isfinite(number) and least <= number <= most):
        raise RequestError(field, f"{value!r} is not between {least:g} and {most:g}")
    return number


def _words(field: str, words: Iterable[Iterable[Any]], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    try:
        checked = tuple(_token_ids(field, word, vocab_size) for word in words)
    except TypeError as error:
        raise RequestError(field, "a list of lists of token ids is needed") from error
    if not all(checked):
        raise RequestError(field, "a word without a token is not a word")
    return checked


def _token_ids(field: str, ids: Iterable[Any], vocab_size: int) -> tuple[int, ...]:
    try:
        tokens = tuple(operator.index(token) for token in ids)
    except TypeError as error:
        raise RequestError(field, "a list of token ids is needed") from error
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(field, f"token id {token} is outside the vocabulary of {vocab_size}")
    return tokens
