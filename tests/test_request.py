"""Requests: every wrong field is refused by name, every limit is kept before the engine sees it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nemobuild.runtime import prompt
from nemobuild.runtime.engine_io import generation_tensors
from nemobuild.runtime.fields import INPUTS, RequestError
from nemobuild.runtime.request import parse_request, with_parameters
from nemobuild.runtime.settings import Limits, Sampling, Settings, load_settings
from nemobuild.runtime.wire import output_tokens, pack_words, unpack_words
from nemobuild.triton.contract import ENGINE_INPUTS, GENERATION_INPUTS
from tests import templates
from tests.test_prompt import PLAIN, V15, builder
from tests.tiny import tiny_tokenizer

SETTINGS = dataclasses.replace(
    V15._settings,
    limits=Limits(max_context_tokens=300, max_prompt_tokens=200, default_max_tokens=64, max_request_bytes=2000),
    sampling_on=Sampling(0.6, 0.95),
    sampling_off=Sampling(0.0),
    end_token_ids=(261, 257),
)
HI = json.dumps([{"role": "user", "content": "Hi"}])

LONG = HI.replace("Hi", "x" * 120)
CALL = "messages[0].tool_calls[0]"
RESULTS = json.dumps(
    [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": i, "function": {"name": "f"}} for i in ("one", "two")],
        },
        {"role": "tool", "tool_call_id": "two", "content": "2"},
        {"role": "tool", "tool_call_id": "one", "content": "1"},
    ]
)


def test_bytes_are_counted_before_anything_is_read():
    with pytest.raises(RequestError, match=r"^messages: 2001 bytes, the limit is 2000$"):
        parse(messages="ä" * 1000 + "[")
    with pytest.raises(RequestError, match=r"^stop_words: 2001 bytes, the limit is 2000$"):
        parse(text_input="a", stop_words=["ä" * 500, "ä" * 500, "b"])


@pytest.mark.parametrize("field", ["text_input", "messages"])
def test_a_text_that_is_far_too_long_is_not_tokenised_whole(field, monkeypatch):
    seen = []
    monkeypatch.setattr(prompt, "_PIECE_CHARACTERS", 50)
    encode = prompt._encode
    monkeypatch.setattr(prompt, "_encode", lambda tokenizer, text: seen.append(len(text)) or encode(tokenizer, text))
    maker = builder(templates.SUPER_V15, "nemotron-super-v1.5")
    maker._settings = SETTINGS
    text = "x" * 1500
    with pytest.raises(RequestError, match=rf"^{field}: the prompt has more than 2\d\d tokens, the limit is 200$"):
        parse_request({field: text if field == "text_input" else HI.replace("Hi", text)}, SETTINGS, maker)
    assert max(seen) == 50 and sum(seen) < 500
    with pytest.raises(RequestError, match="has 300 tokens"):
        parse_request({"text_input": "x" * 300}, SETTINGS, maker)


def parse(**values):
    return parse_request(values, SETTINGS, V15)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "text_input"),
        ({"text_input": ""}, "text_input"),
        ({"text_input": "x" * 201}, "text_input"),
        ({"text_input": "x" * 2001}, "text_input"),
        ({"text_input": "a", "messages": HI}, "messages"),
        ({"messages": "not json"}, "messages"),
        ({"messages": "[" * 1500}, "messages"),
        ({"messages": "{}"}, "messages"),
        ({"messages": "[]"}, "messages"),
        ({"messages": "[1]"}, "messages[0]"),
        ({"messages": '[{"role": "robot", "content": "a"}]'}, "messages[0].role"),
        ({"messages": '[{"role": ["user"], "content": "a"}]'}, "messages[0].role"),
        ({"messages": '[{"content": "a"}]'}, "messages[0].role"),
        ({"messages": '[{"role": "user"}]'}, "messages[0].content"),
        ({"messages": '[{"role": "user", "content": 1}]'}, "messages[0].content"),
        ({"messages": '[{"role": "user", "content": "a", "colour": "red"}]'}, "messages[0].colour"),
        ({"messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'}, "messages[0].content[0]"),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]'}, "messages[1].role"),
        ({"messages": '[{"role": "user", "content": "a", "tool_calls": []}]'}, "messages[0].tool_calls"),
        ({"messages": '[{"role": "assistant", "tool_calls": [{}]}]'}, "messages[0].tool_calls[0].function"),
        ({"messages": '[{"role": "user", "content": "\\ud800"}]'}, "messages"),
        ({"messages": '[{"role": "user", "content": "a", "name": ' + "[" * 100 + "]" * 100 + "}]"}, "messages"),
        (
            {"messages": '[{"role": "assistant", "content": "a", "reasoning_content": {}}]'},
            "messages[0].reasoning_content",
        ),
        ({"messages": '[{"role": "assistant", "content": "a", "refusal": "no"}]'}, "messages[0].refusal"),
        ({"messages": HI, "tools": "{}"}, "tools"),
        ({"messages": HI, "tools": "[{}]"}, "tools[0]"),
        ({"messages": HI, "tools": '[{"type": "browser", "function": {"name": "f"}}]'}, "tools[0].type"),
        ({"text_input": "a", "tools": "[]"}, "tools"),
        ({"messages": HI, "reasoning_mode": "maybe"}, "reasoning_mode"),
        ({"text_input": "a", "reasoning_mode": "off"}, "reasoning_mode"),
        ({"messages": HI, "max_thinking_tokens": -1}, "max_thinking_tokens"),
        ({"text_input": "x" * 120, "max_thinking_tokens": 100, "max_tokens": 100}, "max_thinking_tokens"),
        ({"messages": LONG, "max_thinking_tokens": 100, "max_tokens": 100}, "max_thinking_tokens"),
        ({"text_input": "x" * 126, "max_thinking_tokens": 30, "max_tokens": 100}, "max_thinking_tokens"),
        ({"messages": '[{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}]'}, CALL + ".id"),
        ({"messages": RESULTS.replace("one", "other", 1)}, "messages[3].tool_call_id"),
        ({"text_input": "a", "max_tokens": -1}, "max_tokens"),
        ({"text_input": "a", "max_tokens": 0}, "max_tokens"),
        ({"text_input": "a", "max_tokens": 300}, "max_tokens"),
        ({"text_input": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"text_input": "a", "temperature": -0.5}, "temperature"),
        ({"text_input": "a", "temperature": float("nan")}, "temperature"),
        ({"text_input": "a", "top_p": 1.5}, "top_p"),
        ({"text_input": "a", "top_k": -1}, "top_k"),
        ({"text_input": "a", "beam_width": 2}, "beam_width"),
        ({"text_input": "a", "end_id": 265}, "end_id"),
        ({"text_input": "a", "stop_words": ["x"] * 65}, "stop_words"),
        ({"text_input": "a", "colour": "red"}, "colour"),
    ],
)
def test_what_is_wrong_is_named(values, field):
    with pytest.raises(RequestError) as refused:
        parse(**values)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")


def test_defaults_follow_the_mode():
    assert (parse(messages=HI).temperature, parse(messages=HI).top_p) == (0.6, 0.95)
    assert parse(messages=HI, reasoning_mode="off").temperature == 0.0
    assert parse(messages=HI, temperature=0.3).temperature == 0.3
    assert parse(text_input="x" * 190).max_tokens == 64
    assert parse(text_input="x" * 200, max_tokens=100).max_tokens == 100


def test_no_seed_means_the_same_seed_for_the_same_prompt():
    assert parse(text_input="a").seed == parse(text_input="a").seed != parse(text_input="b").seed
    assert parse(text_input="a", seed=7).seed == 7


def test_parameters_fill_fields_and_tensors_win():
    assert with_parameters({}, {"reasoning_mode": "off"}) == {"reasoning_mode": "off"}
    assert with_parameters({"reasoning_mode": "on"}, {"reasoning_mode": "off"}) == {"reasoning_mode": "on"}
    for bad in ({"colour": "red"}, {"reasoning_mode": 1}, {"max_thinking_tokens": "5"}, {"max_thinking_tokens": True}):
        with pytest.raises(RequestError, match=next(iter(bad))):
            with_parameters({}, bad)


def test_tools_need_a_template_that_has_them():
    with pytest.raises(RequestError, match="tools"):
        parse_request({"messages": HI, "tools": '[{"name": "f"}]'}, PLAIN._settings, PLAIN)


def test_a_thinking_budget_fits_prompt_and_model():
    assert parse(messages=HI).max_thinking_tokens is None
    assert parse(messages=HI, max_thinking_tokens=20).max_thinking_tokens == 20
    assert parse(messages=HI, max_thinking_tokens=10**6, max_tokens=20).max_thinking_tokens == 10**6
    edge = {
        "text_input": "x" * 125,
        "max_tokens": 100,
    }  # 30 tokens of thinking, 3 of grace, 12 of waiting, 32 of tags: 202
    with pytest.raises(RequestError, match="max_thinking_tokens"):
        parse(**edge, max_thinking_tokens=30)
    assert parse(**edge, max_thinking_tokens=28).max_thinking_tokens == 28
    off = parse(messages=LONG, max_thinking_tokens=100, max_tokens=100, reasoning_mode="off")
    assert off.max_thinking_tokens == 100
    with pytest.raises(RequestError, match="max_thinking_tokens: this model has no reasoning"):
        parse_request({"text_input": "a", "max_thinking_tokens": 1}, PLAIN._settings, PLAIN)


def test_a_generation_goes_on_from_what_it_has():
    request = parse(text_input="abc", max_tokens=10, min_tokens=4)
    first, then = (generation_tensors(request, tiny_tokenizer(), ids) for ids in ((), (7, 8, 9)))
    assert then["input_ids"][0].tolist() == [*first["input_ids"][0].tolist(), 7, 8, 9]
    assert then["input_lengths"] == 6 and then["request_output_len"] == 7 and then["min_tokens"] == 1
    same = set(first) - {"input_ids", "input_lengths", "request_output_len", "min_tokens"}
    assert all(np.array_equal(first[name], then[name]) for name in same)
    assert generation_tensors(request, tiny_tokenizer(), range(8))["min_tokens"] == 0


def test_engine_tensors_meet_the_contract():
    request = parse(messages=HI, stop_words=["ab", "\n"], bad_words=["no"], max_tokens=5, temperature=0.0)
    tensors = generation_tensors(request, tiny_tokenizer())
    contract = {t.name: t for t in ENGINE_INPUTS}
    assert set(tensors) == set(GENERATION_INPUTS)
    kinds = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}
    for name, array in tensors.items():
        assert array.dtype == kinds[contract[name].type], name
        assert array.ndim == len(contract[name].dims) + 1 and array.shape[0] == 1, name
    assert tensors["runtime_top_k"][0, 0] == 1  # temperature 0 is greedy
    assert tensors["end_id"][0, 0] == 261
    ids = tiny_tokenizer()
    assert unpack_words(tensors["stop_words_list"]) == [[257], ids.encode("ab").ids, ids.encode("\n").ids]
    assert unpack_words(tensors["bad_words_list"]) == [ids.encode("no").ids, ids.encode(" no").ids]


@pytest.mark.parametrize("words", [[], [[1]], [[1, 2], [3]], [[1], [2], [3], [4, 5, 6]]])
def test_words_survive_the_wire(words):
    packed = pack_words(words)
    assert packed.shape[0] == 2 and unpack_words(packed) == words and unpack_words(packed[None]) == words


def test_output_tokens_drop_padding():
    assert output_tokens(np.array([[[5, 6, 0, 0]]]), np.array([[2]])) == [5, 6]
    assert output_tokens(np.zeros((1, 1, 0), np.int32), np.array([[0]])) == []


def test_settings_are_read_strictly(tmp_path):
    file = tmp_path / "runtime.json"
    file.write_text(SETTINGS.dump())
    assert load_settings(file) == SETTINGS
    for change in ({"colour": 1}, {"limits": {"max_context_tokens": 1}}):
        file.write_text(json.dumps(json.loads(SETTINGS.dump()) | change))
        with pytest.raises(ValueError, match=r"runtime.json"):
            load_settings(file)


def test_field_names_are_unique():
    assert len({f.name for f in INPUTS}) == len(INPUTS)
    assert isinstance(SETTINGS, Settings)
