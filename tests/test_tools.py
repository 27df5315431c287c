"""Tool calls: read while they are written, repaired where brackets are lost, and never dropped."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemobuild.runtime.answer import Answer
from nemobuild.runtime.splitter import ANSWER
from nemobuild.runtime.tools import ToolReader
from tests.corpus import cut, mixed_texts
from tests.test_text import POLICY, TINY, VOCABULARY, answer_of

many = settings(max_examples=2000, deadline=None)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), mixed_texts)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=3
)
objects = st.dictionaries(st.text(), values, max_size=3)


def read(pieces, *, closed: bool = True):
    """The reader after ``pieces``, and the told calls: (id, name, joined arguments)."""
    reader, out = ToolReader(), []
    for piece in pieces:
        reader.push(piece, out)
    reader.finish(closed=closed)
    told: dict[str, list] = {}
    for delta in out:
        if delta["id"] in told:
            assert "name" not in delta and told[delta["id"]][0] == delta["index"]
            told[delta["id"]][2] += delta["arguments"]
        else:
            told[delta["id"]] = [delta["index"], delta["name"], delta["arguments"]]
    assert [index for index, _, _ in told.values()] == list(range(len(told)))
    return reader, [{"name": name, "arguments": arguments} for _, name, arguments in told.values()]


@st.composite
def blocks(draw):
    """A block as a model may write it, brackets lost or not, and what it says: names with a string or an object."""
    entries, said = [], []
    for _ in range(draw(st.integers(0, 2))):
        name, arguments = draw(st.text(min_size=1)), draw(st.one_of(objects, objects.map(json.dumps), mixed_texts))
        pairs = [("name", name), (draw(st.sampled_from(["arguments", "parameters"])), arguments)]
        pairs += draw(st.lists(st.tuples(st.just("id"), values), max_size=1))
        options = {"ensure_ascii": draw(st.booleans()), "indent": draw(st.sampled_from([None, 2]))}
        entries.append(json.dumps(dict(draw(st.permutations(pairs))), **options))
        said.append((name, arguments))
    gap, bracket, end = draw(st.sampled_from(["", " ", "\n"])), draw(st.booleans()), draw(st.booleans())
    return gap + "[" * bracket + f"{gap},{gap}".join(entries) + gap + "]" * end + gap, said


@many
@given(st.data(), blocks())
def test_whole_calls_come_out_for_every_cut(data, block):
    body, said = block
    reader, told = read(cut(data, body))
    assert not reader.broken
    assert reader.calls == told == read(body)[1]
    assert [call["name"] for call in told] == [name for name, _ in said]
    for call, (_, arguments) in zip(told, said, strict=True):
        arguments = "{}" if arguments == "" else arguments  # a client parses it as JSON
        assert arguments == (call["arguments"] if isinstance(arguments, str) else json.loads(call["arguments"]))


@many
@given(st.data(), blocks(), mixed_texts, st.booleans())
def test_nothing_is_lost_of_a_damaged_block(data, block, noise, closed):
    text = block[0]
    at, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    text = text[:at] + noise + text[end:]
    reader, told = read(cut(data, text), closed=closed)
    again, told_again = read(text, closed=closed)
    assert (reader.broken, reader.calls, reader.unread, told) == (again.broken, again.calls, again.unread, told_again)
    assert text.endswith(reader.unread)
    assert reader.calls == told[: len(reader.calls)]
    if not reader.broken:
        assert told == reader.calls
        assert re.fullmatch(r"[\s,]*\[?[\s,]*\]?[\s,]*", reader.unread)
    elif not reader.calls:
        assert reader.unread == text


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ('[{"name": "f", "arguments": {"a": 1}}]', [("f", '{"a": 1}')]),
        ('{"name": "f", "arguments": "{}"}', [("f", "{}")]),
        ('{"name": "f", "parameters": {"å": "ü"}}]', [("f", '{"å": "ü"}')]),
        ('[{"parameters": {"a": "}]"}, "name": "f"}]', [("f", '{"a": "}]"}')]),
        ('[{"name": "f"}', [("f", "{}")]),
        ('[{"name": "f", "arguments": null}]', [("f", "{}")]),
        ('[{"name": "f", "arguments": {"a": 1}]', [("f", '{"a": 1}')]),
        ('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}', [("f", "{}"), ("g", "{}")]),
        ('{"name": "f"}, {"name": "g"}', [("f", "{}"), ("g", "{}")]),
        (r'[{"name": "f\ud83d", "arguments": "\ud83d\ude00\ud83dx\\\"\n"}]', [("f�", '😀�x\\"\n')]),
        ("[]", []),
        ("", []),
    ],
)
def test_calls_are_read_and_repaired(body, calls):
    reader, told = read(body)
    assert not reader.broken
    assert [(call["name"], call["arguments"]) for call in told] == calls
    assert reader.calls == told


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        ("[1]", 0),
        ("nonsense", 0),
        ('[{"arguments": {}}]', 0),
        ('[{"name": 5}]', 0),
        ('[{"name": "f", "name": "g"}]', 0),
        ('[{"name": "f", "arguments": {}, "parameters": {}}]', 0),
        ('[{"name": "f", "arguments": {"a": 1,}}]', 0),
        ('[{"name": "f", "arguments": {"a": ]}}]', 0),
        ('[{"name": "f", "arguments": {"a": 1', 0),
        ('[{"name": "f", "arguments": "a\\u12"}]', 0),
        ('[{"name": "f", "arguments": "\\x"}]', 0),
        ('[{"name": "f", "arguments": tru}]', 0),
        ('[{"name" "f"}]', 0),
        ('[{"name": "f"}] and more', 1),
        ('[{"name": "f"}, what]', 1),
        ("[" * 100_000, 0),
        ('{"name": "f", "arguments": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001, 0),
    ],
)
def test_what_cannot_be_read_is_told(body, whole):
    reader, _ = read([body])
    assert reader.broken and len(reader.calls) == whole
    assert body.endswith(reader.unread)


def test_the_name_comes_first_and_arguments_as_they_are_written():
    reader, pieces = ToolReader(), []
    for letter in '[{"name": "f", "arguments": {"city": "Oslo"}}]':
        out = []
        reader.push(letter, out)
        pieces += [(delta.get("name"), delta["arguments"]) for delta in out]
    assert pieces == [("f", ""), *((None, letter) for letter in '{"city": "Oslo"}')]


def answer(text: str, **options):
    (said, _), state = answer_of(text, start=ANSWER, **options)
    return said, [call["name"] for call in state.calls], state


def test_several_blocks_in_one_answer():
    one, two = '<TOOLCALL>[{"name": "f"}]</TOOLCALL>', '<TOOLCALL>{"name": "g"}, {"name": "h"}</TOOLCALL>'
    said, names, state = answer(f"a {one} b {two}")
    assert (said, names, state.finish_reason()) == ("a  b ", ["f", "g", "h"], "tool_calls")
    assert not state.unparsed_tool_call


@pytest.mark.parametrize(
    ("text", "said", "names", "reason"),
    [
        ("x<TOOLCALL>what</TOOLCALL>y", "x<TOOLCALL>what</TOOLCALL>y", [], "length"),
        ("x<TOOLCALL>[]</TOOLCALL>y", "xy", [], "length"),
        ('<TOOLCALL>[{"name": "f"}]', "", ["f"], "tool_calls"),
        ("<TOOLCALL>[", "<TOOLCALL>[", [], "length"),
        ('<TOOLCALL>[{"name": "f", "arguments": {"a', '<TOOLCALL>[{"name": "f", "arguments": {"a', [], "length"),
        (
            '<TOOLCALL>[{"name": "f"}, {"name": "g", "arg',
            '<TOOLCALL>, {"name": "g", "arg',
            ["f"],
            "length",
        ),
        (
            '<TOOLCALL>[{]</TOOLCALL><TOOLCALL>[{"name": "g"}]</TOOLCALL>',
            "<TOOLCALL>[{]</TOOLCALL>",
            ["g"],
            "tool_calls",
        ),
    ],
)
def test_what_a_client_gets_of_odd_blocks_at_the_length_limit(text, said, names, reason):
    got, got_names, state = answer(text)
    assert (got, got_names, state.finish_reason(limit=True)) == (said, names, reason)
    assert state.unparsed_tool_call == ("<TOOLCALL>" in said)


def test_indices_go_on_after_a_broken_block():
    text = '<TOOLCALL>[{"name": "f", "arguments": {"a": ]}}]</TOOLCALL><TOOLCALL>[{"name": "g"}]</TOOLCALL>'
    state = Answer(VOCABULARY, POLICY, start=ANSWER, stops=(), end_ids=(), tools=True)
    delta = state.push(TINY.encode(text).ids)
    assert [(d["index"], d["name"]) for d in delta.tool_calls] == [(0, "f"), (1, "g")]
    assert len({d["id"] for d in delta.tool_calls}) == 2
