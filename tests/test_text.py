"""Detokenising, stops and splitting: nothing lost, for every way to cut the stream."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemobuild.runtime.answer import Answer
from nemobuild.runtime.detokenizer import Vocabulary, _byte_alphabet
from nemobuild.runtime.settings import ReasoningPolicy
from nemobuild.runtime.splitter import ANSWER, MAYBE, REASONING, TOOL, Splitter
from nemobuild.runtime.stops import StopMatcher
from nemobuild.runtime.tools import parse_tool_calls
from tests.scripted import _byte_of
from tests.tiny import EOT, tiny_tokenizer

POLICY = ReasoningPolicy("directive", "/think", "/no_think", "<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>")
MIXED = "Grüße, perché, día, 你好, नमस्ते दुनिया, สวัสดีครับ, مرحبا, 👩‍👩‍👧‍👦🏳️‍🌈 é"
VOCABULARY = Vocabulary(tiny_tokenizer())

texts = st.one_of(st.text(), st.sampled_from([MIXED, "", "<think>", "</think>", "<TOOLCALL>[", "]</TOOLCALL>"]))
raw_tokens = st.lists(st.integers(0, 264), max_size=60)


def cut(data: st.DataObject, items):
    """``items`` in pieces, at places that hypothesis chooses."""
    marks = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[a:b] for a, b in zip([0, *marks], [*marks, len(items)], strict=True)]


def test_the_byte_alphabet_is_the_published_one():
    assert _byte_alphabet() == _byte_of()


@settings(max_examples=500)
@given(st.data(), st.one_of(raw_tokens, texts.map(lambda t: tiny_tokenizer().encode(t).ids)))
def test_joined_stream_equals_one_shot_decode(data, ids):
    stream = VOCABULARY.stream()
    joined = "".join(stream.push(piece) for piece in cut(data, ids)) + stream.finish()
    assert joined == tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_a_character_appears_only_when_it_is_whole():
    stream = VOCABULARY.stream()
    pieces = [stream.push([i]) for i in tiny_tokenizer().encode("ไ🙂").ids]
    assert pieces == ["", "", "ไ", "", "", "", "🙂"]
    assert stream.finish() == ""


def test_tokenizers_that_are_not_byte_level():
    words = ["▁Hello", "▁world", "!", "▁né"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    stream = Vocabulary(tokenizer).stream()
    ids = [0, 1, 2, 3, 0]
    assert "".join(stream.push([i]) for i in ids) + stream.finish() == tokenizer.decode(ids)


@settings(max_examples=500)
@given(st.data(), st.text("ab<|>", max_size=40), st.lists(st.text("ab<|>", min_size=1, max_size=5), max_size=3))
def test_the_stop_that_is_complete_first_ends_the_text(data, text, stops):
    matcher = StopMatcher(stops)
    joined = "".join(matcher.push(piece) for piece in cut(data, text)) + matcher.finish()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert joined == (text[: min(found)[1]] if found else text)
    assert (matcher.hit is not None) == bool(found)


def test_text_is_held_back_only_while_it_may_become_a_stop():
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(p) for p in ("a\n", "\n", "b", "\n\nUs", "x")] == ["a", "", "\n\nb", "", "\n\nUsx"]


@settings(max_examples=500)
@given(st.data(), st.lists(texts, max_size=6).map("".join), st.sampled_from([ANSWER, MAYBE, REASONING]), st.booleans())
def test_parts_and_tags_are_the_raw_text(data, text, start, tools):
    splitter = Splitter(POLICY, start, tools=tools)
    parts = [part for piece in cut(data, text) for part in splitter.push(piece)] + splitter.finish()
    assert "".join(part.text for part in parts) == text
    whole = Splitter(POLICY, start, tools=tools)
    merged = [(p.kind, p.text) for p in whole.push(text) + whole.finish()]
    assert _join(parts) == _join_pairs(merged)


def _join(parts):
    return _join_pairs([(p.kind, p.text) for p in parts])


def _join_pairs(pairs):
    joined: list[list[str]] = []
    for kind, text in pairs:
        if joined and joined[-1][0] == kind and kind not in ("tag", TOOL):
            joined[-1][1] += text
        else:
            joined.append([kind, text])
    return joined


def split(text: str, start: str = MAYBE, *, tools: bool = True) -> list[list[str]]:
    splitter = Splitter(POLICY, start, tools=tools)
    return _join([p for letter in text for p in splitter.push(letter)] + splitter.finish())


def test_reasoning_answer_and_tool_call():
    assert split('<think>\nwhy\n</think>\n\n<TOOLCALL>[{"name": "f"}]</TOOLCALL>') == [
        ["tag", "<think>"],
        ["reasoning", "\nwhy\n"],
        ["tag", "</think>"],
        ["answer", "\n\n"],
        ["tag", "<TOOLCALL>"],
        ["tool", '[{"name": "f"}]'],
        ["tag", "</TOOLCALL>"],
    ]


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("no tags", MAYBE, [["answer", "no tags"]]),
        ("<think>cut off", MAYBE, [["tag", "<think>"], ["reasoning", "cut off"]]),
        ("<thin", MAYBE, [["answer", "<thin"]]),
        ("a <think> b", MAYBE, [["answer", "a <think> b"]]),
        ("<think> literal", ANSWER, [["answer", "<think> literal"]]),
        ("why</think>so", REASONING, [["reasoning", "why"], ["tag", "</think>"], ["answer", "so"]]),
        ("a <TOOLCALL> b</think>c", REASONING, [["reasoning", "a <TOOLCALL> b"], ["tag", "</think>"], ["answer", "c"]]),
        ("a</thin", REASONING, [["reasoning", "a</thin"]]),
    ],
)
def test_odd_shapes(text, start, expected):
    assert split(text, start) == expected


def test_without_tools_a_tool_tag_is_text():
    assert split("<TOOLCALL>[]</TOOLCALL>", ANSWER, tools=False) == [["answer", "<TOOLCALL>[]</TOOLCALL>"]]


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [{"name": "f", "arguments": '{"a": 1}'}]),
        ('{"name": "f", "arguments": "{}"}', [{"name": "f", "arguments": "{}"}]),
        ('{"name": "f", "parameters": {"å": "ü"}}]', [{"name": "f", "arguments": '{"å": "ü"}'}]),
        ('[{"name": "f"}', [{"name": "f", "arguments": "{}"}]),
        ('{"name": "f"}, {"name": "g"}', [{"name": "f", "arguments": "{}"}, {"name": "g", "arguments": "{}"}]),
        ("[]", []),
        ("[1]", None),
        ("nonsense", None),
        ('[{"arguments": {}}]', None),
        ("[" * 100_000, None),
    ],
)
def test_tool_calls_are_read_and_repaired(body, calls):
    assert parse_tool_calls(body) == calls


def answer_of(text: str, cuts, *, stops=(), start=MAYBE, tools=True):
    answer = Answer(VOCABULARY, POLICY, start=start, stops=stops, end_ids=(EOT,), tools=tools)
    deltas = [answer.push(piece) for piece in cuts(tiny_tokenizer().encode(text).ids)] + [answer.finish()]
    joined = ("".join(d.answer for d in deltas), "".join(d.reasoning for d in deltas))
    return joined, [c for d in deltas for c in d.tool_calls], answer


@settings(max_examples=200)
@given(
    st.data(), st.lists(texts, max_size=5).map("".join), st.lists(st.sampled_from(["b", "<", "é ", "\n"]), max_size=2)
)
def test_an_answer_is_the_same_whole_or_in_pieces(data, text, stops):
    whole = answer_of(text, lambda ids: [ids], stops=stops)
    pieces = answer_of(text, lambda ids: cut(data, ids), stops=stops)
    assert whole[:2] == pieces[:2]
    assert whole[2].completion_tokens == pieces[2].completion_tokens
    assert whole[2].reasoning_tokens == pieces[2].reasoning_tokens


def test_counts_and_reasons():
    (answer, reasoning), _, state = answer_of("<think>ab</think>cd<|eot_id|>ignored", lambda ids: [ids])
    assert (answer, reasoning) == ("cd", "ab")
    assert state.completion_tokens == len("<think>ab</think>cd") + 1
    assert state.reasoning_tokens == len(">ab</think>")
    assert state.finish_reason() == "stop"
    assert answer_of("cd", lambda ids: [ids])[2].finish_reason(limit=True) == "length"
    assert answer_of("cd", lambda ids: [ids])[2].finish_reason(cancelled=True) == "cancelled"


def test_a_tool_call_that_cannot_be_read_stays_in_the_answer():
    (answer, _), calls, state = answer_of("x<TOOLCALL>what</TOOLCALL>y", lambda ids: [[i] for i in ids], start=ANSWER)
    assert answer == "x<TOOLCALL>what</TOOLCALL>y"
    assert calls == [] and state.finish_reason() == "stop"
    (answer, _), calls, state = answer_of(
        "<TOOLCALL>[{" + json.dumps("name") + ': "f"}]', lambda ids: [ids], start=ANSWER
    )
    assert calls == [{"name": "f", "arguments": "{}"}] and state.finish_reason() == "tool_calls"
