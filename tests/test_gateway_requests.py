"""Requests in OpenAI's form: what becomes of each field, and what is refused by which name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemobuild.gateway.errors import ApiError
from nemobuild.gateway.requests import EFFORTS, NOT_SUPPORTED, ChatRequest, CompletionRequest, read_request, refused
from nemobuild.runtime.fields import BY_NAME

HI = [{"role": "user", "content": "Hi"}]


def chat(**more):
    return read_request(ChatRequest, json.dumps({"model": "m", "messages": HI, **more}).encode(), "m")


def complete(**more):
    return read_request(CompletionRequest, json.dumps({"model": "m", "prompt": "x", **more}).encode(), "m")


def fields(asked):
    return {name: value for name, value in asked.fields.items() if name not in ("messages", "stream")}


@pytest.mark.parametrize(
    ("given_fields", "sent"),
    [
        ({}, {}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0, "top_p": 0.5, "seed": 7}, {"temperature": 0, "top_p": 0.5, "seed": 7}),
        ({"stop": "\n"}, {"stop_words": ["\n"]}),
        ({"stop": ["a", "b"]}, {"stop_words": ["a", "b"]}),
        ({"stop": None, "n": None, "tools": None, "user": None}, {}),
        ({"n": 1, "logit_bias": {}, "response_format": {"type": "text"}, "parallel_tool_calls": True}, {}),
        ({"reasoning_effort": "none"}, {"reasoning_mode": "off"}),
        ({"reasoning_effort": "low"}, {"reasoning_mode": "on", "max_thinking_tokens": EFFORTS["low"][1]}),
        ({"reasoning_effort": "high"}, {"reasoning_mode": "on"}),
        ({"reasoning": {"enabled": False}}, {"reasoning_mode": "off"}),
        ({"reasoning": {"enabled": True, "max_tokens": 9}}, {"reasoning_mode": "on", "max_thinking_tokens": 9}),
        ({"reasoning": {"effort": "none", "enabled": False}}, {"reasoning_mode": "off"}),
        ({"reasoning": {}}, {}),
        ({"logprobs": True, "top_logprobs": 0}, {"return_log_probs": True}),
        ({"tools": [{"function": {"name": "f"}}]}, {"tools": '[{"function":{"name":"f"}}]'}),
        ({"tools": [{"function": {"name": "f"}}], "tool_choice": "none"}, {}),
    ],
)
def test_what_becomes_of_a_chat_field(given_fields, sent):
    assert fields(chat(**given_fields)) == sent


def test_streaming_and_usage():
    asked = chat(stream=True, stream_options={"include_usage": True})
    assert asked.stream and asked.include_usage and asked.fields["stream"] is True
    assert chat().fields["stream"] is False


def test_a_raw_prompt():
    assert fields(complete(echo=True, logprobs=0)) == {
        "text_input": "x",
        "exclude_input_in_output": False,
        "return_log_probs": True,
    }
    assert complete(prompt=["y"]).fields["text_input"] == "y"


def test_nulls_that_clients_send_back_are_left_out_of_messages():
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    assert json.loads(chat(messages=[message]).fields["messages"]) == [{"role": "assistant", "content": None}]


REFUSED = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"n": 1.0}, "n"),
    *(({name: "x"}, name) for name in NOT_SUPPORTED),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"temprature": 1}, "temprature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stop": ["a", 5]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"tools": {}}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ({"reasoning_effort": "low", "reasoning": {"enabled": True}}, "reasoning"),
    ({"reasoning": "high"}, "reasoning"),
    ({"reasoning": {"effort": "low", "max_tokens": 5}}, "reasoning.max_tokens"),
    ({"reasoning": {"effort": "low", "enabled": False}}, "reasoning.enabled"),
    ({"reasoning": {"enabled": False, "max_tokens": 5}}, "reasoning.enabled"),
    ({"reasoning": {"budget": 5}}, "reasoning.budget"),
    ({"logprobs": 2}, "logprobs"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("given_fields", "named"), REFUSED)
def test_a_wrong_chat_field_is_refused_by_name(given_fields, named):
    with pytest.raises(ApiError) as caught:
        chat(**given_fields)
    assert (caught.value.status, caught.value.param) == (400, named)
    assert caught.value.message.startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("given_fields", "named"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 2]}, "prompt[0]"),
        ({"logprobs": 5}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": HI}, "messages"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_a_wrong_completion_field_is_refused_by_name(given_fields, named):
    with pytest.raises(ApiError) as caught:
        complete(**given_fields)
    assert (caught.value.status, caught.value.param) == (400, named)


def test_another_model_is_not_found():
    with pytest.raises(ApiError) as caught:
        chat(model="gpt-4o")
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "model", "model_not_found")


def test_a_typing_error_gets_a_proposal():
    with pytest.raises(ApiError, match="Did you mean 'temperature'"):
        chat(temprature=1)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"temperature": NaN}'],
)
def test_what_is_not_a_json_object_is_refused(body):
    with pytest.raises(ApiError) as caught:
        read_request(ChatRequest, body, "m")
    assert caught.value.status == 400 and caught.value.code == "invalid_json"


def test_a_refusal_of_the_model_comes_under_the_clients_name():
    asked = chat(max_completion_tokens=5, stop=["x"], reasoning={"enabled": True, "max_tokens": 3})
    pairs = {
        "max_tokens: 5 is too much": "max_completion_tokens",
        "stop_words: too many": "stop",
        "max_thinking_tokens: no": "reasoning.max_tokens",
        "messages[3].role: what": "messages[3].role",
        "min_tokens: of whom": None,
    }
    for message, named in pairs.items():
        error = refused(asked, message)
        assert error.status == 400 and error.param == named
        assert error.message.partition(": ")[2] == message.partition(": ")[2]


def test_the_documentation_names_every_field():
    text = (Path(__file__).parent.parent / "docs" / "gateway.md").read_text()
    for name in {*ChatRequest.model_fields, *CompletionRequest.model_fields, *NOT_SUPPORTED, *EFFORTS}:
        assert f"`{name}`" in text, name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*ChatRequest.model_fields, *NOT_SUPPORTED, "enabled", "x"]) | st.text(max_size=8)


@settings(max_examples=2000, deadline=None)
@given(st.dictionaries(names, json_values, max_size=5), st.booleans())
def test_whatever_comes_is_sent_on_or_refused(body, complete_it):
    data = {"model": "m", "messages": HI, **body} if complete_it else body
    try:
        asked = read_request(ChatRequest, json.dumps(data).encode(), "m")
    except ApiError as error:
        assert 400 <= error.status < 500
        return
    assert asked.fields.keys() <= BY_NAME.keys()
    # Nothing is accepted and ignored: what is not null and not neutral has become a field.
    carried = {name.partition(".")[0] for name in asked.names.values()} | {"model", "stream_options", "tool_choice"}
    for name, value in data.items():
        neutral = value in (None, False, [], {}) or (name in NOT_SUPPORTED and value in NOT_SUPPORTED[name])
        assert neutral or name in carried or (name == "max_tokens" and "max_completion_tokens" in carried)
