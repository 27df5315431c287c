"""Requests that must be refused, each with the field that the refusal names: one list for all routes.

They are written as fields of ``chat``; ``as_openai`` says the same in OpenAI's form, under its names.
"""

from __future__ import annotations

import json
from typing import Any

HI = json.dumps([{"role": "user", "content": "Hi"}])
TOOL = {"type": "function", "function": {"name": "f"}}
_OPENAI_NAMES = {
    "text_input": "prompt",
    "stop_words": "stop",
    "stop_words[1]": "stop[1]",
    "reasoning_mode": "reasoning.enabled",
    "max_thinking_tokens": "reasoning.max_tokens",
}


def _messages(*entries: Any) -> dict[str, Any]:
    return {"messages": json.dumps(entries)}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _calls(*calls: Any) -> dict[str, Any]:
    return _messages(_user("x"), {"role": "assistant", "content": "", "tool_calls": list(calls)})


def _result(call: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "1"} | ({} if call is None else {"tool_call_id": call}) | more


def _answered(*results: str | None, **more: Any) -> dict[str, Any]:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in ("a", "b")]
    called = {"role": "assistant", "content": "", "tool_calls": calls}
    return _messages(_user("x"), called, *(_result(call, **more) for call in results))


def _deep(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value}
    return value


# (fields of chat, the name that the refusal begins with)
BAD: list[tuple[dict[str, Any], str]] = [
    # messages
    (_messages(), "messages"),
    (_messages("x"), "messages[0]"),
    (_messages(None), "messages[0]"),
    (_messages({}), "messages[0].role"),
    (_messages({"role": None, "content": "x"}), "messages[0].role"),
    (_messages({"role": 5, "content": "x"}), "messages[0].role"),
    (_messages({"role": "robot", "content": "x"}), "messages[0].role"),
    (_messages({"role": "function", "content": "x"}), "messages[0].role"),
    (_messages({"role": ["user"], "content": "x"}), "messages[0].role"),
    (_messages({"role": "user"}), "messages[0].content"),
    (_messages(_user(None)), "messages[0].content"),
    (_messages(_user(5)), "messages[0].content"),
    (_messages(_user(True)), "messages[0].content"),
    (_messages(_user({"text": "x"})), "messages[0].content"),
    (_messages(_user(["x"])), "messages[0].content[0]"),
    (_messages(_user([{"type": "text"}])), "messages[0].content[0]"),
    (_messages(_user([{"type": "text", "text": 5}])), "messages[0].content[0]"),
    (_messages(_user([{"type": "image_url", "image_url": {"url": "http://x"}}])), "messages[0].content[0]"),
    (_messages(_user([{"type": "text", "text": "a"}, {"type": "input_audio"}])), "messages[0].content[1]"),
    (_messages({"role": "system", "content": None}, _user("x")), "messages[0].content"),
    (_messages({"role": "tool", "content": None}), "messages[0].content"),
    (_messages(_user("x"), {"role": "user", "content": "y", "colour": "red"}), "messages[1].colour"),
    (_messages({"role": "user", "content": "x", "name": 5}), "messages[0].name"),
    (_messages(_user("x"), {"role": "tool", "content": "x", "tool_call_id": 5}), "messages[1].tool_call_id"),
    (_messages({"role": "assistant", "content": "x", "reasoning_content": 5}), "messages[0].reasoning_content"),
    (_messages({"role": "user", "content": "x", "tool_calls": []}), "messages[0].tool_calls"),
    (_messages({"role": "assistant", "tool_calls": "x"}), "messages[0].tool_calls"),
    (_messages({"role": "assistant", "tool_calls": {}}), "messages[0].tool_calls"),
    (_calls("f"), "messages[1].tool_calls[0].function"),
    (_calls({}), "messages[1].tool_calls[0].function"),
    (_calls({"function": "f"}), "messages[1].tool_calls[0].function"),
    (_calls({"function": {"arguments": "{}"}}), "messages[1].tool_calls[0].function"),
    (_calls({"function": {"name": 5}}), "messages[1].tool_calls[0].function"),
    (_calls(TOOL, {"function": {"name": "f", "arguments": 5}}), "messages[1].tool_calls[1].function.arguments"),
    (_calls({"function": {"name": "f", "arguments": []}}), "messages[1].tool_calls[0].function.arguments"),
    (_calls({"function": {"name": "f", "arguments": _deep(100)}}), "messages"),
    (_messages(_user("x " * 3000)), "messages"),
    (_messages(*[_user("x")] * 800), "messages"),
    # what would have no effect, or go to the wrong call
    (_messages(_user("x") | {"name": "Bob"}), "messages[0].name"),
    (_messages(_user("x") | {"tool_call_id": "1"}), "messages[0].tool_call_id"),
    (_messages(_user("x") | {"reasoning_content": "hm"}), "messages[0].reasoning_content"),
    (_messages(_user([{"type": "text", "text": "a", "cache_control": {}}])), "messages[0].content[0].cache_control"),
    (_calls({"function": {"name": ""}}), "messages[1].tool_calls[0].function"),
    (_calls({"type": "custom", "function": {"name": "f"}}), "messages[1].tool_calls[0].type"),
    (_calls({"index": 0, "function": {"name": "f"}}), "messages[1].tool_calls[0].index"),
    (_calls({"function": {"name": "f", "parameters": {}}}), "messages[1].tool_calls[0].function.parameters"),
    (_messages(_user("x"), _result("a")), "messages[1].tool_call_id"),
    (_answered("a", "a"), "messages[3].tool_call_id"),
    (_answered("a", "c"), "messages[3].tool_call_id"),
    (_answered("b"), "messages[1].tool_calls"),
    (_answered("a", None), "messages[3].tool_call_id"),
    (_answered(None, None, None), "messages[4]"),
    (_answered("a", "b", name="h"), "messages[2].name"),
    # tools
    ({"messages": HI, "tools": json.dumps([TOOL | {"colour": "red"}])}, "tools[0].colour"),
    ({"messages": HI, "tools": json.dumps([{"function": {"name": "f", "colour": 1}}])}, "tools[0].function.colour"),
    ({"messages": HI, "tools": json.dumps([{"name": "f", "colour": 1}])}, "tools[0].colour"),
    (
        {"messages": HI, "tools": json.dumps([{"function": {"name": "f", "description": 5}}])},
        "tools[0].function.description",
    ),
    (
        {"messages": HI, "tools": json.dumps([{"function": {"name": "f", "parameters": "x"}}])},
        "tools[0].function.parameters",
    ),
    ({"messages": HI, "tools": '["f"]'}, "tools[0]"),
    ({"messages": HI, "tools": "[{}]"}, "tools[0]"),
    ({"messages": HI, "tools": "[null]"}, "tools[0]"),
    ({"messages": HI, "tools": '[{"type": "function"}]'}, "tools[0]"),
    ({"messages": HI, "tools": '[{"type": "function", "function": {}}]'}, "tools[0]"),
    ({"messages": HI, "tools": '[{"type": "function", "function": {"name": ""}}]'}, "tools[0]"),
    ({"messages": HI, "tools": '[{"type": "function", "function": {"name": 5}}]'}, "tools[0]"),
    ({"messages": HI, "tools": json.dumps([TOOL, {"type": "web", "function": {"name": "g"}}])}, "tools[1].type"),
    ({"messages": HI, "tools": json.dumps([{"function": {"name": "f", "parameters": _deep(100)}}])}, "tools"),
    ({"messages": HI, "tools": json.dumps([{"function": {"name": "f", "description": "x " * 3000}}])}, "messages"),
    # numbers
    ({"messages": HI, "max_tokens": 0}, "max_tokens"),
    ({"messages": HI, "max_tokens": -1}, "max_tokens"),
    ({"messages": HI, "max_tokens": 4000}, "max_tokens"),
    ({"messages": HI, "max_tokens": 2**31 - 1}, "max_tokens"),
    ({"messages": HI, "min_tokens": -1}, "min_tokens"),
    ({"messages": HI, "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({"messages": HI, "temperature": -0.1}, "temperature"),
    ({"messages": HI, "temperature": 101.0}, "temperature"),
    ({"messages": HI, "temperature": 1e30}, "temperature"),
    ({"messages": HI, "top_p": -0.1}, "top_p"),
    ({"messages": HI, "top_p": 1.1}, "top_p"),
    ({"messages": HI, "top_k": -1}, "top_k"),
    ({"messages": HI, "presence_penalty": -101.0}, "presence_penalty"),
    ({"messages": HI, "presence_penalty": 101.0}, "presence_penalty"),
    ({"messages": HI, "frequency_penalty": -101.0}, "frequency_penalty"),
    ({"messages": HI, "frequency_penalty": 101.0}, "frequency_penalty"),
    ({"messages": HI, "repetition_penalty": 0.0}, "repetition_penalty"),
    ({"messages": HI, "repetition_penalty": -1.0}, "repetition_penalty"),
    ({"messages": HI, "repetition_penalty": 1e9}, "repetition_penalty"),
    ({"messages": HI, "max_thinking_tokens": -1}, "max_thinking_tokens"),
    ({"messages": HI, "max_thinking_tokens": -(2**31)}, "max_thinking_tokens"),
    # lists and texts
    ({"messages": HI, "stop_words": ["x"] * 65}, "stop_words"),
    (
        {"messages": HI, "tools": json.dumps([{"type": "function", "function": {"name": "f", "strict": True}}])},
        "tools[0].function.strict",
    ),
    ({"messages": HI, "stop_words": ["x", "y" * 1001]}, "stop_words[1]"),
    ({"messages": HI, "top_k": 1025}, "top_k"),
    ({"messages": HI, "temperature": 1e-30}, "temperature"),
    ({"text_input": ""}, "text_input"),
    ({"text_input": "x" * 4001}, "text_input"),
    ({"text_input": "x" * 3000, "max_tokens": 2000}, "max_tokens"),
    ({"text_input": "x", "max_tokens": -3}, "max_tokens"),
    ({"text_input": "x", "temperature": -2.0}, "temperature"),
    ({"text_input": "x", "stop_words": ["y"] * 100}, "stop_words"),
]

# What only Triton's own routes have fields for.
BAD_FOR_TRITON: list[tuple[dict[str, Any], str]] = [
    ({"messages": "{nonsense"}, "messages"),
    ({"messages": ""}, "messages"),
    ({"messages": '{"role": "user"}'}, "messages"),
    ({"messages": "[" * 5000}, "messages"),
    ({"messages": '[{"role": "user", "content": "x", "content": "y"}]'}, "messages: content"),
    ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages"),
    ({"messages": HI, "tools": "nonsense"}, "tools"),
    ({"messages": HI, "tools": "{}"}, "tools"),
    ({"text_input": "x", "tools": json.dumps([TOOL])}, "tools"),
    ({"text_input": "x", "messages": HI}, "messages"),
    ({"text_input": "x", "reasoning_mode": "off"}, "reasoning_mode"),
    ({"messages": HI, "reasoning_mode": "loud"}, "reasoning_mode"),
    ({"messages": HI, "reasoning_mode": ""}, "reasoning_mode"),
    ({"temperature": 0.0}, "text_input"),
    ({"messages": HI, "bad_words": ["x"] * 65}, "bad_words"),
    ({"text_input": "x", "beam_width": 4}, "beam_width"),
    ({"text_input": "x", "num_return_sequences": 2}, "num_return_sequences"),
    ({"text_input": "x", "end_id": 10**6}, "end_id"),
    ({"text_input": "x", "end_id": -1}, "end_id"),
    ({"text_input": "x", "pad_id": -1}, "pad_id"),
    ({"text_input": "x", "length_penalty": 1e9}, "length_penalty"),
]


def as_openai(fields: dict[str, Any], named: str) -> tuple[str, dict[str, Any], str]:
    """Path, body and the name that the refusal must have."""
    body: dict[str, Any] = {}
    for name, value in fields.items():
        if name in ("messages", "tools"):
            value = json.loads(value)
        if name == "max_thinking_tokens":
            body["reasoning"] = {"max_tokens": value}
        else:
            body[_OPENAI_NAMES.get(name, name)] = value
    path = "/v1/completions" if "text_input" in fields else "/v1/chat/completions"
    return path, body, _OPENAI_NAMES.get(named, named)
