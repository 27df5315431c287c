"""Detokenising, stops and splitting: nothing lost, for every way to cut the stream."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nemobuild.runtime.answer import Answer
from nemobuild.runtime.detokenizer import Vocabulary, _byte_alphabet
from nemobuild.runtime.settings import ReasoningPolicy
from nemobuild.runtime.splitter import ANSWER, MAYBE, REASONING, TAG, Splitter
from nemobuild.runtime.stops import StopMatcher
from tests.corpus import cut, mixed_texts, one_by_one, token_runs
from tests.llama3 import llama3_tokenizer
from tests.scripted import _byte_of
from tests.tiny import EOT, tiny_tokenizer

POLICY = ReasoningPolicy("directive", "/think", "/no_think", "<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>")
TINY = tiny_tokenizer()
VOCABULARY = Vocabulary(TINY)
many = settings(max_examples=2000, deadline=None)


@pytest.fixture(scope="module")
def llama3():
    return Vocabulary(llama3_tokenizer())


def test_the_byte_alphabet_is_the_published_one():
    assert _byte_alphabet() == _byte_of()


def joined(vocabulary: Vocabulary, pieces) -> str:
    stream = vocabulary.stream()
    return "".join([stream.push(piece) for piece in pieces]) + stream.finish()


@many
@given(st.data(), token_runs(TINY))
def test_joined_stream_equals_one_shot_decode(data, ids):
    assert joined(VOCABULARY, cut(data, ids)) == TINY.decode(ids, skip_special_tokens=True)


@many
@given(data=st.data())
def test_joined_stream_equals_one_shot_decode_with_the_real_tokenizer(llama3, data):
    ids = data.draw(token_runs(llama3.tokenizer))
    whole = llama3.tokenizer.decode(ids, skip_special_tokens=True)
    assert joined(llama3, cut(data, ids)) == joined(llama3, one_by_one(ids)) == whole


def test_a_character_appears_only_when_it_is_whole():
    stream = VOCABULARY.stream()
    pieces = [stream.push([i]) for i in TINY.encode("ไ🙂").ids]
    assert pieces == ["", "", "ไ", "", "", "", "🙂"]
    assert stream.finish() == ""


def test_ids_outside_the_vocabulary_are_no_text():
    assert VOCABULARY.stream().push([-1, 10**6]) == ""


def sentencepiece_like() -> Tokenizer:
    """Words with a mark for the space, and single bytes for what is not in the vocabulary."""
    words = ["<unk>", "▁Hello", "▁", "world", "!", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["▁Hello", "▁world", "!", "▁né"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("make", [metaspace, sentencepiece_like])
@many
@given(data=st.data())
def test_tokenizers_that_are_not_byte_level(make, data):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=12))
    assert joined(Vocabulary(tokenizer), cut(data, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_control_token_within_a_run_of_bytes_changes_nothing():
    tokenizer = sentencepiece_like()
    ids = [tokenizer.token_to_id(t) for t in ("▁Hello", "<0xE0>", "<0xB8>", "</s>", "<0x84>", "world")]
    stream = Vocabulary(tokenizer).stream()
    assert [stream.push([i]) for i in ids] == ["Hello", "", "", "", "", "คworld"]
    assert stream.finish() == stream.finish() == "" and stream.push(ids[:1]) == " Hello"


@many
@given(st.data(), st.text("ab<|>", max_size=40), st.lists(st.text("ab<|>", min_size=1, max_size=5), max_size=3))
def test_the_stop_that_is_complete_first_ends_the_text(data, text, stops):
    matcher = StopMatcher(stops)
    passed = "".join([matcher.push(piece) for piece in cut(data, text)]) + matcher.finish()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert passed == (text[: min(found)[1]] if found else text)
    assert (matcher.hit is not None) == bool(found)


@many
@given(st.data(), mixed_texts)
def test_stops_from_the_text_itself(data, text):
    first, last = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    stop = text[first : min(last, first + 12)]
    matcher = StopMatcher([stop])
    passed = "".join([matcher.push(piece) for piece in cut(data, text)]) + matcher.finish()
    assert passed == (text.partition(stop)[0] if stop else text)


def test_text_is_held_back_only_while_it_may_become_a_stop():
    matcher = StopMatcher(["\n\nUser:"])
    assert [matcher.push(p) for p in ("a\n", "\n", "b", "\n\nUs", "x")] == ["a", "", "\n\nb", "", "\n\nUsx"]


def split(pieces, start: str = MAYBE, *, tools: bool = True) -> list[list[str]]:
    """Parts of the text ``pieces``, those of one kind that follow each other joined."""
    splitter = Splitter(POLICY, start, tools=tools)
    parts: list[list[str]] = []
    for kind, text in [part for piece in pieces for part in splitter.push(piece)] + splitter.finish():
        if parts and parts[-1][0] == kind != TAG:
            parts[-1][1] += text
        else:
            parts.append([kind, text])
    return parts


@many
@given(st.data(), mixed_texts, st.sampled_from([ANSWER, MAYBE, REASONING]), st.booleans())
def test_parts_and_tags_are_the_raw_text_for_every_cut(data, text, start, tools):
    parts = split(cut(data, text), start, tools=tools)
    assert "".join(text for _, text in parts) == text
    assert parts == split([text], start, tools=tools) == split(text, start, tools=tools)
    tags = {"<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>"} if tools else {"<think>", "</think>"}
    assert all((text.strip() in tags) for kind, text in parts if kind == TAG)
    if start == ANSWER:
        assert not any(kind == REASONING for kind, _ in parts)


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
        ("\n <think>why", MAYBE, [["tag", "\n <think>"], ["reasoning", "why"]]),
        ("<think></think>", MAYBE, [["tag", "<think>"], ["tag", "</think>"]]),
        ("<thin", MAYBE, [["answer", "<thin"]]),
        ("a <think> b", MAYBE, [["answer", "a <think> b"]]),
        ("no opening</think>tag", MAYBE, [["answer", "no opening</think>tag"]]),
        ("<think> literal", ANSWER, [["answer", "<think> literal"]]),
        ("why</think>so", REASONING, [["reasoning", "why"], ["tag", "</think>"], ["answer", "so"]]),
        ("a <TOOLCALL> b</think>c", REASONING, [["reasoning", "a <TOOLCALL> b"], ["tag", "</think>"], ["answer", "c"]]),
        ("a</thin", REASONING, [["reasoning", "a</thin"]]),
        ("<<TOOLCALL>[</TOOL", ANSWER, [["answer", "<"], ["tag", "<TOOLCALL>"], ["tool", "[</TOOL"]]),
    ],
)
def test_odd_shapes(text, start, expected):
    assert split(text, start) == expected


def test_without_tools_a_tool_tag_is_text():
    assert split("<TOOLCALL>[]</TOOLCALL>", ANSWER, tools=False) == [["answer", "<TOOLCALL>[]</TOOLCALL>"]]


def answer_of(text: str, cuts=one_by_one, *, stops=(), start=MAYBE, tools=True, end_ids=(EOT,)):
    answer = Answer(VOCABULARY, POLICY, start=start, stops=stops, end_ids=end_ids, tools=tools)
    deltas = [answer.push(piece) for piece in cuts(TINY.encode(text).ids)] + [answer.finish()]
    return ("".join(d.answer for d in deltas), "".join(d.reasoning for d in deltas)), answer


@many
@given(st.data(), mixed_texts, st.lists(st.sampled_from(["b", "<", "é ", "\n"]), max_size=2))
def test_an_answer_is_the_same_whole_or_in_pieces(data, text, stops):
    whole, a = answer_of(text, lambda ids: [ids], stops=stops)
    for cuts in (lambda ids: cut(data, ids), one_by_one):
        pieces, b = answer_of(text, cuts, stops=stops)
        assert whole == pieces
        assert (a.ids, a.reasoning_tokens, a.calls) == (b.ids, b.reasoning_tokens, b.calls)
        assert (a.unparsed_tool_call, a.finish_reason()) == (b.unparsed_tool_call, b.finish_reason())
    assert not any(stop in whole[0] or stop in whole[1] for stop in stops)


def test_counts_and_reasons():
    (answer, reasoning), state = answer_of("<think>ab</think>cd<|eot_id|>ignored", lambda ids: [ids])
    assert (answer, reasoning) == ("cd", "ab")
    assert state.completion_tokens == len("<think>ab</think>cd") + 1
    assert state.reasoning_tokens == len(">ab</think>")
    assert state.finish_reason() == "stop" == state.finish_reason(limit=True)
    assert answer_of("cd")[1].finish_reason(limit=True) == "length"
    assert answer_of("cd", stops=["d"])[1].finish_reason(limit=True) == "stop"
    assert answer_of("cd")[1].finish_reason(cancelled=True) == "cancelled"


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"])
def test_each_of_several_end_ids_ends_the_answer(end):
    (answer, _), state = answer_of(f"cd{end}more", end_ids=[TINY.token_to_id(t) for t in (end, "<|eot_id|>")])
    assert (answer, state.stopped, state.completion_tokens) == ("cd", True, 3)
