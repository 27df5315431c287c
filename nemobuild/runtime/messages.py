"""Check OpenAI-style messages and tools, and bring them into the one form that chat templates expect.

Repaired by rule: ``content: null`` of an assistant becomes the empty string, a list of text parts becomes their text
joined by newlines, ``developer`` is another name of ``system``, past ``reasoning_content`` is left out, as the
templates of the family leave out past reasoning, and tool results are put in the order of their calls, since the
templates render no ids. Everything else that a template would drop or print in
raw form is refused by name.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .fields import RequestError

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}
_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})
MAX_DEPTH = 64
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_messages(text: str) -> list[dict[str, Any]]:
    """Messages of the JSON ``text``. Raises ``RequestError`` naming the entry, such as ``messages[2].role``."""
    entries = _parse_list("messages", text)
    if not entries:
        raise RequestError("messages", "the list is empty")
    messages = [_message(f"messages[{i}]", entry, first=i == 0) for i, entry in enumerate(entries)]
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            _order_results(messages, i)
    return messages


def parse_tools(text: str) -> list[dict[str, Any]]:
    """Function tools of the JSON ``text``: ``[{"type": "function", "function": {"name": ...}}]``."""
    tools = _parse_list("tools", text)
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"tools[{i}]", "an object with a function and its name is needed")
        if tool.get("type", "function") != "function":
            raise RequestError(f"tools[{i}].type", f"{tool['type']!r} is not supported, only 'function'")
        if function.get("strict"):
            raise RequestError(f"tools[{i}].function.strict", "arguments are not held to their schema; leave it out")
    return tools


def _message(where: str, entry: Any, *, first: bool) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RequestError(where, "an object with role and content is needed")
    for key in entry:
        if key not in _KEYS:
            raise RequestError(f"{where}.{key}", f"this key is unknown; known are {', '.join(sorted(_KEYS))}")
    role = entry.get("role")
    role = _ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RequestError(f"{where}.role", f"{role!r} is not one of {', '.join(ROLES)}")
    if role == "system" and not first:
        raise RequestError(f"{where}.role", "only the first message may be a system message")
    message: dict[str, Any] = {"role": role, "content": _content(f"{where}.content", entry.get("content"), role)}
    if entry.get("tool_calls") is not None:
        if role != "assistant":
            raise RequestError(f"{where}.tool_calls", f"a {role} message cannot call tools")
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", entry["tool_calls"])
    for key in ("name", "tool_call_id", "reasoning_content"):
        if entry.get(key) is not None:
            if not isinstance(entry[key], str):
                raise RequestError(f"{where}.{key}", "a string is needed")
            if key != "reasoning_content":
                message[key] = entry[key]
    return message


def _content(where: str, content: Any, role: str) -> str:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_text_part(f"{where}[{i}]", part) for i, part in enumerate(content))
    raise RequestError(where, f"a string or a list of text parts is needed, not {_kind(content)}")


def _text_part(where: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    raise RequestError(where, f"part of type {kind!r} is not supported, only text" if kind else "a text part is needed")


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(where, f"a list is needed, not {_kind(calls)}")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}].function", "an object with a name and arguments is needed")
        if not isinstance(function.get("arguments", {}), (str, dict)):
            raise RequestError(f"{where}[{i}].function.arguments", "an object or JSON text is needed")
        if not isinstance(call.get("id", ""), (str, type(None))):
            raise RequestError(f"{where}[{i}].id", "a string is needed")
    return calls


def _order_results(messages: list[dict[str, Any]], at: int) -> None:
    """Sort the tool messages after the calls of message ``at`` by the ids of the calls, where ids are given."""
    order = {call["id"]: place for place, call in enumerate(messages[at]["tool_calls"]) if call.get("id") is not None}
    end = at + 1
    while end < len(messages) and messages[end]["role"] == "tool":
        end += 1
    results = messages[at + 1 : end]
    if not order or not all("tool_call_id" in result for result in results):
        return
    for i, result in enumerate(results, at + 1):
        if result["tool_call_id"] not in order:
            raise RequestError(f"messages[{i}].tool_call_id", f"no call of messages[{at}] has this id")
    messages[at + 1 : end] = sorted(results, key=lambda result: order[result["tool_call_id"]])


def _parse_list(field: str, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"not valid JSON ({error})") from error
    if not isinstance(value, list):
        raise RequestError(field, f"a JSON list is needed, not {_kind(value)}")
    _check_plain(field, value, MAX_DEPTH)
    return value


def _check_plain(field: str, value: Any, depth: int) -> None:
    """Refuse what a template or a tokenizer cannot take: half characters, and nesting without end."""
    if isinstance(value, str):
        if _HALF_CHARACTER.search(value):
            raise RequestError(field, "it holds half of a surrogate pair, which is not a character")
    elif isinstance(value, (list, dict)):
        if depth == 0:
            raise RequestError(field, f"it is nested deeper than {MAX_DEPTH} levels")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_plain(field, item, depth - 1)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
