"""The closed list of what a client may send to ``chat`` and ``ensemble``, and what it gets back.

One table serves three readers: the ``config.pbtxt`` of the emitted models, the parser of requests, and the
documentation. Types are Triton's; every field is a tensor of shape [1] per request, or [-1] for lists.
The names of the engine-era templates are kept, so that a client written for those works unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class RequestError(ValueError):
    """A request that cannot be served; the message names the field, the value and what would be right."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor. ``low``/``high`` are inclusive bounds; ``only`` is the one value that is supported."""

    name: str
    type: str  # STRING, INT32, UINT64, FP32 or BOOL
    meaning: str
    low: float | None = None
    high: float | None = None
    only: float | None = None
    is_list: bool = False
    as_parameter: bool = False  # also read from the request's parameters


INPUTS: tuple[Field, ...] = (
    Field("text_input", "STRING", "raw prompt, used as it is; give this or messages"),
    Field("messages", "STRING", "JSON list of OpenAI-style messages, rendered by the model's own template"),
    Field("tools", "STRING", "JSON list of OpenAI-style function tools; needs messages"),
    Field("reasoning_mode", "STRING", "on, off or auto (the profile's default); needs messages", as_parameter=True),
    Field(
        "max_thinking_tokens",
        "INT32",
        "chat: reasoning ends soon after so many tokens",
        low=0,
        as_parameter=True,
    ),
    Field("timeout_ms", "INT32", "an answer that is not whole in time is given up", low=1, as_parameter=True),
    Field("max_tokens", "INT32", "bound on all generated tokens", low=1),
    Field("min_tokens", "INT32", "no end token before this many tokens", low=0),
    Field("top_k", "INT32", "sample from the k likeliest tokens; 0 is off, 1 is greedy", low=0, high=1024),
    Field("temperature", "FP32", "0 is greedy", low=0, high=100),
    Field("top_p", "FP32", "sample from the smallest set with this probability", low=0, high=1),
    Field("repetition_penalty", "FP32", "above 1 discourages tokens of prompt and answer", low=1e-3, high=100),
    Field("presence_penalty", "FP32", "subtracted once from tokens already generated", low=-100, high=100),
    Field("frequency_penalty", "FP32", "subtracted for each time a token was generated", low=-100, high=100),
    Field("seed", "UINT64", "the same seed gives the same answer", low=0),
    Field("stop_words", "STRING", "strings that end the answer; they are not part of it", is_list=True),
    Field("bad_words", "STRING", "strings that are never generated", is_list=True),
    Field("end_id", "INT32", "token that ends the answer, in place of the model's own", low=0),
    Field("pad_id", "INT32", "accepted for older clients; nothing is padded here", low=0),
    Field("beam_width", "INT32", "accepted for older clients; only 1", only=1),
    Field("num_return_sequences", "INT32", "accepted for older clients; only 1", only=1),
    Field("length_penalty", "FP32", "accepted for older clients; without beams it has no effect", low=-100, high=100),
    Field("stream", "BOOL", "chat: send deltas (default true)"),
    Field("return_log_probs", "BOOL", "also return cum_log_probs and output_log_probs"),
    Field("exclude_input_in_output", "BOOL", "false puts the raw prompt before the answer (default true)"),
)

OUTPUTS: tuple[Field, ...] = (
    Field("text_output", "STRING", "the answer; a delta when streaming"),
    Field("reasoning_output", "STRING", "the reasoning before the answer; a delta when streaming"),
    Field("tool_calls", "STRING", "JSON list of {name, arguments}; streamed: of pieces {index, id, name, arguments}"),
    Field("unparsed_tool_call", "BOOL", "text_output holds a tool call that cannot be read; on the last response"),
    Field("finish_reason", "STRING", "stop, length, tool_calls or cancelled; on the last response"),
    Field("prompt_tokens", "INT32", "on the last response"),
    Field("reasoning_tokens", "INT32", "on the last response"),
    Field("completion_tokens", "INT32", "all generated tokens, reasoning included; on the last response"),
    Field("cum_log_probs", "FP32", "sum of log-probabilities, if asked for; on the last response"),
    Field("output_log_probs", "FP32", "log-probability of each generated token, if asked for", is_list=True),
    Field("token_ids", "INT32", "id of each of those tokens, if log-probabilities are asked for", is_list=True),
)

BY_NAME = {field.name: field for field in INPUTS}
PARAMETERS = tuple(field.name for field in INPUTS if field.as_parameter)
MAX_LIST_ITEMS = 64
MAX_WORD_CHARACTERS = 1000


def check_value(field: Field, value: Any) -> Any:
    """``value`` of a non-string field within its bounds, or a ``RequestError`` that names both."""
    if field.only is not None and value != field.only:
        raise RequestError(field.name, f"{value} is not supported, only {field.only:g}")
    if field.low is not None and not value >= field.low:
        raise RequestError(field.name, f"{value} is below the least allowed value {field.low:g}")
    if field.high is not None and not value <= field.high:
        raise RequestError(field.name, f"{value} is above the greatest allowed value {field.high:g}")
    return value
