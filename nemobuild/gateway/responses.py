"""Outputs of ``chat`` in OpenAI's form: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

from nemobuild.gateway.requests import Asked

# A token's id -> the bytes that it stands for.
TokenBytes = Callable[[int], bytes]
# Ids come when log-probabilities were asked for; a token that is a part of a character has one, and no text yet.
_VISIBLE = ("reasoning_output", "text_output", "tool_calls", "finish_reason", "token_ids")


class Answer:
    """One answer of one endpoint. ``outputs`` are those of a response of ``chat``."""

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, asked: Asked, model: str, token_bytes: TokenBytes) -> None:
        self._asked, self._model, self._token_bytes = asked, model, token_bytes
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._begun = False

    def whole(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return self._wrap(self.object, [self._marked(outputs, "message")], usage=_usage(outputs))

    def chunk(self, outputs: dict[str, Any]) -> dict[str, Any] | None:
        """One response as a chunk; ``None`` when it brings nothing that a client could see."""
        if not any(outputs.get(name) for name in _VISIBLE):
            return None
        usage = {"usage": None} if self._asked.include_usage else {}
        chunk = self._wrap(self.chunk_object, [self._marked(outputs, "delta")], **usage)
        self._begun = True
        return chunk

    def usage_chunk(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last, for a client that asked for the usage of a stream."""
        return self._wrap(self.chunk_object, [], usage=_usage(outputs))

    def _marked(self, outputs: dict[str, Any], part: str) -> dict[str, Any]:
        choice = self._choice(outputs, part)
        return choice | {"unparsed_tool_call": True} if outputs.get("unparsed_tool_call") else choice

    def _choice(self, outputs: dict[str, Any], part: str) -> dict[str, Any]:
        raise NotImplementedError

    def _wrap(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": choices, **more}

    def _tokens(self, outputs: dict[str, Any]) -> list[tuple[bytes, float]]:
        """Each generated token with its log-probability: reasoning, tags and the end token too."""
        pairs = zip(outputs.get("token_ids", ()), outputs.get("output_log_probs", ()), strict=True)
        return [(self._token_bytes(token), value) for token, value in pairs]


class ChatAnswer(Answer):
    """An answer of ``/v1/chat/completions``."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, outputs: dict[str, Any], part: str) -> dict[str, Any]:
        value: dict[str, Any] = {} if self._begun else {"role": "assistant", "content": ""}
        if reasoning := outputs.get("reasoning_output"):
            value["reasoning_content"] = reasoning
        if text := outputs.get("text_output"):
            value["content"] = text
        if calls := json.loads(outputs.get("tool_calls") or "[]"):
            value["tool_calls"] = [_call(call) for call in calls]
            if part == "message":
                value["content"] = text or None
        log_probs = [
            {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data), "top_logprobs": []}
            for data, value in self._tokens(outputs)
        ]
        return {
            "index": 0,
            part: value,
            "logprobs": {"content": log_probs, "refusal": None} if self._asked.log_probs else None,
            "finish_reason": outputs.get("finish_reason"),
        }


class TextAnswer(Answer):
    """An answer of ``/v1/completions``. Reasoning that the model begins by itself stays apart, as in a chat."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Asked, model: str, token_bytes: TokenBytes) -> None:
        super().__init__(asked, model, token_bytes)
        self._characters = 0

    def _choice(self, outputs: dict[str, Any], part: str) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "text": outputs.get("text_output", "")}
        if reasoning := outputs.get("reasoning_output"):
            choice["reasoning_content"] = reasoning
        log_probs = self._log_probs(outputs) if self._asked.log_probs else None
        return choice | {"logprobs": log_probs, "finish_reason": outputs.get("finish_reason")}

    def _log_probs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        columns: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": None, "text_offset": []}
        for data, value in self._tokens(outputs):
            columns["tokens"].append(data.decode(errors="replace"))
            columns["token_logprobs"].append(value)
            columns["text_offset"].append(self._characters)
            self._characters += len(columns["tokens"][-1])
        return columns


def _usage(outputs: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = outputs["prompt_tokens"], outputs["completion_tokens"]
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage | {"completion_tokens_details": {"reasoning_tokens": outputs["reasoning_tokens"]}}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A whole call, or a delta: id and name in the first, then pieces of the arguments. Only deltas have an index."""
    function = {key: call[key] for key in ("name", "arguments") if key in call}
    named = {"id": call.get("id") or f"call_{uuid.uuid4().hex}", "type": "function"} if "name" in call else {}
    index = {"index": call["index"]} if "index" in call else {}
    return {**index, **named, "function": function}
