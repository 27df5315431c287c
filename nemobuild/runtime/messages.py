"""Check OpenAI-style messages and tools, and bring them into the one form that chat templates expect.

Repaired by rule: ``content: null`` of an assistant becomes the empty string, a list of text parts becomes their text
joined by newlines, ``developer`` is another name of ``system``, past ``reasoning_content`` is left out, as the
templates of the family leave out past reasoning, empty ``arguments`` become ``{}``, and tool results are put in the
order of their calls, since the templates render no ids. Everything else that a template would drop, print in raw form
or give to the wrong call is refused by name, and so is every key that would have no effect.
"""

from __future__ import annotations

import json
import re
from typing import Any

from .fields import RequestError

ROLES = ("system", "user", "assistant", "tool")
_ALIASES = {"developer": "system"}
_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_PART_KEYS = ("type", "text")
_CALL_KEYS = ("id", "type", "function")
_CALLED_KEYS = ("name", "arguments")
_TOOL_KEYS = ("type", "function")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")
MAX_DEPTH = 64
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def parse_messages(text: str, *, tools: bool = True) -> list[dict[str, Any]]:
    """Messages of the JSON ``text``; ``tools``: whether the model's template knows calls and their results.

    Raises ``RequestError`` naming the entry, such as ``messages[2].role``.
    """
    entries = _parse_list("messages", text)
    if not entries:
        raise RequestError("messages", "the list is empty")
    messages = [_message(f"messages[{i}]", entry, first=i == 0) for i, entry in enumerate(entries)]
    for i, message in enumerate(messages):
        if not tools and (message["role"] == "tool" or message.get("tool_calls")):
            what = "role" if message["role"] == "tool" else "tool_calls"
            raise RequestError(f"messages[{i}].{what}", "this model's template has no tools")
        if message["role"] != "tool":
            _check_results(messages, i)
    return messages


def parse_tools(text: str) -> list[dict[str, Any]]:
    """Function tools of the JSON ``text``: ``[{"type": "function", "function": {"name": ...}}]``."""
    tools = _parse_list("tools", text)
    for i, tool in enumerate(tools):
        where, function = f"tools[{i}]", tool
        if isinstance(tool, dict) and "function" in tool:
            _check_keys(where, tool, _TOOL_KEYS)
            where, function = f"{where}.function", tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"tools[{i}]", "an object with a function and its name is needed")
        if tool.get("type", "function") != "function":
            raise RequestError(f"tools[{i}].type", f"{tool['type']!r} is not supported, only 'function'")
        _check_keys(where, function, _FUNCTION_KEYS if function is not tool else ("type", *_FUNCTION_KEYS))
        for key, kind in (("description", str), ("parameters", dict)):
            if not isinstance(function.get(key), (kind, type(None))):
                raise RequestError(f"{where}.{key}", f"{_kind(kind())} is needed, not {_kind(function[key])}")
        if function.get("strict"):
            raise RequestError(f"{where}.strict", "arguments are not held to their schema; leave it out")
    return tools


def _message(where: str, entry: Any, *, first: bool) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise RequestError(where, "an object with role and content is needed")
    _check_keys(where, entry, _KEYS)
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
    for key, of, why in (
        ("name", ("tool",), "the templates render no names; write it into the content"),
        ("tool_call_id", ("tool",), "only a tool message answers a call"),
        ("reasoning_content", ("assistant",), "only the model reasons"),
    ):
        if entry.get(key) is not None:
            if not isinstance(entry[key], str):
                raise RequestError(f"{where}.{key}", "a string is needed")
            if role not in of:
                raise RequestError(f"{where}.{key}", why)
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
        _check_keys(where, part, _PART_KEYS)
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else None
    raise RequestError(where, f"part of type {kind!r} is not supported, only text" if kind else "a text part is needed")


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(where, f"a list is needed, not {_kind(calls)}")
    return [_tool_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"{where}.function", "an object with a name and arguments is needed")
    _check_keys(where, call, _CALL_KEYS)
    _check_keys(f"{where}.function", function, _CALLED_KEYS)
    if call.get("type", "function") != "function":
        raise RequestError(f"{where}.type", f"{call['type']!r} is not supported, only 'function'")
    if not isinstance(call.get("id"), (str, type(None))):
        raise RequestError(f"{where}.id", "a string is needed")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, (str, dict)):
        raise RequestError(f"{where}.function.arguments", "an object or JSON text is needed")
    return {**call, "function": function | {"arguments": "{}" if arguments == "" else arguments}}


def _check_results(messages: list[dict[str, Any]], at: int) -> None:
    """The tool messages after message ``at`` answer its calls, by order or by id; by id they are put in that order."""
    calls = messages[at].get("tool_calls", ())
    end = at + 1
    while end < len(messages) and messages[end]["role"] == "tool":
        end += 1
    results = messages[at + 1 : end]
    if any("tool_call_id" in result for result in results):
        order = {call["id"]: place for place, call in enumerate(calls) if call.get("id") is not None}
        if len(order) < len(calls):
            raise RequestError(
                f"messages[{at}].tool_calls", "its results name their calls, so each call needs its own id"
            )
        for i, result in enumerate(results, at + 1):
            if "tool_call_id" not in result:
                raise RequestError(f"messages[{i}].tool_call_id", "missing; other results of these calls have one")
            if result["tool_call_id"] not in order:
                raise RequestError(
                    f"messages[{i}].tool_call_id", f"no call of messages[{at}] waits for a result of this id"
                )
            del order[result["tool_call_id"]]
        if order:
            missing = next(iter(order))
            raise RequestError(
                f"messages[{at}].tool_calls", f"the result of {missing!r} is missing; the template tells them by order"
            )
        places = {call["id"]: place for place, call in enumerate(calls)}
        messages[at + 1 : end] = results = sorted(results, key=lambda result: places[result["tool_call_id"]])
    for i, result in enumerate(results):
        if "name" in result and (i >= len(calls) or calls[i]["function"]["name"] != result["name"]):
            raise RequestError(f"messages[{at + 1 + i}].name", "it is not the name of the call that this answers")
    if calls and len(results) > len(calls):
        raise RequestError(f"messages[{at + 1 + len(calls)}]", f"messages[{at}] has no more calls to answer")


def _parse_list(field: str, text: str) -> list[Any]:
    try:
        value = json.loads(text, object_pairs_hook=object_of)
    except RequestError as error:
        raise RequestError(field, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"not valid JSON ({error})") from error
    if not isinstance(value, list):
        raise RequestError(field, f"a JSON list is needed, not {_kind(value)}")
    _check_plain(field, value, MAX_DEPTH)
    return value


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ; of two equal ones, ``json`` would drop the first without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RequestError(next(key for key in keys if keys.count(key) > 1)[:100], "this key is given twice")
    return found


def _check_keys(where: str, entry: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in entry:
        if key not in known:
            raise RequestError(f"{where}.{key[:100]}", f"this key is unknown; known are {', '.join(known)}")


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
