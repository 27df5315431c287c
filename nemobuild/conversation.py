"""A conversation with a served model: keeps the messages, asks ``chat``, gives the pieces as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemobuild.model.hf_config import read_text
from nemobuild.triton.client import stream


class Conversation:
    """Messages so far, and ``last``: everything that the last answer brought, as one dictionary."""

    def __init__(
        self,
        url: str,
        fields: Mapping[str, Any],
        *,
        system: str | None = None,
        tools: Path | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._fields = {name: value for name, value in fields.items() if value is not None and value != []}
        if tools is not None:
            self._fields["tools"] = read_text(tools)
        self._messages = [{"role": "system", "content": system}] if system else []
        self.last: dict[str, Any] = {}

    def ask(self, prompt: str) -> Iterator[tuple[str, str]]:
        """Yield (``reasoning`` | ``answer``, text) pieces of the answer to ``prompt``; ``tool_calls`` whole, last."""
        self._messages.append({"role": "user", "content": prompt})
        self.last = {"text_output": "", "reasoning_output": "", "tool_calls": []}
        fields = {"messages": json.dumps(self._messages, ensure_ascii=False)} | self._fields
        for response in stream(self._url, fields, timeout_s=self._timeout_s):
            calls = json.loads(response.pop("tool_calls", "") or "[]")
            pieces = [("reasoning", response.pop("reasoning_output", "")), ("answer", response.pop("text_output", ""))]
            self.last["reasoning_output"] += pieces[0][1]
            self.last["text_output"] += pieces[1][1]
            _join_calls(self.last["tool_calls"], calls)
            self.last |= response
            yield from (piece for piece in pieces if piece[1])
        if self.last["tool_calls"]:
            yield "tool_calls", json.dumps(self.last["tool_calls"], ensure_ascii=False)
        self._messages.append({"role": "assistant", "content": self.last["text_output"]})


def _join_calls(calls: list[dict[str, Any]], deltas: list[dict[str, Any]]) -> None:
    """Add ``deltas`` to the ``calls`` so far: the first of a call has its name, the others more of its arguments."""
    for delta in deltas:
        if "name" in delta:
            calls.append({key: delta[key] for key in ("id", "name", "arguments")})
        else:
            calls[delta["index"]]["arguments"] += delta["arguments"]
