"""Read the tool calls that a model wrote between its tool-call tags.

The body should be a JSON list of ``{"name": ..., "arguments": ...}``, but brackets get lost, ``parameters`` stands for
``arguments``, and arguments come as an object or as a string. What cannot be read is not dropped: the caller keeps
the raw text.
"""

from __future__ import annotations

import json
from typing import Any


def parse_tool_calls(body: str) -> list[dict[str, str]] | None:
    """Calls in the text between the tags, each ``{"name": str, "arguments": JSON text}``; ``None`` if unreadable.

    An empty list is a valid answer: the model decided to call nothing.
    """
    text = body.strip()
    for candidate in (text, f"[{text}", f"{text}]", f"[{text}]"):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        return _calls(value if isinstance(value, list) else [value])
    return None


def _calls(entries: list[Any]) -> list[dict[str, str]] | None:
    calls = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            return None
        arguments = entry.get("arguments", entry.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({"name": entry["name"], "arguments": arguments})
    return calls
