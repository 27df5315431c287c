"""The thinking budget: reasoning ends in time, at a good place, once, and the answer goes on from the same context."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemobuild.runtime.answer import Answer
from nemobuild.runtime.budget import longest_reasoning
from nemobuild.runtime.splitter import ANSWER, MAYBE, REASONING
from tests.corpus import cut, mixed_texts, one_by_one, token_runs
from tests.test_text import POLICY, TINY, VOCABULARY, Vocabulary, llama3

assert llama3  # a fixture of this module, too
many = settings(max_examples=2000, deadline=None)
PLENTY = 10**6


def generate(pieces, then, budget, *, vocabulary=VOCABULARY, start=MAYBE, stops=(), tools=False, max_tokens=PLENTY):
    """An answer to a model that writes the ids of ``pieces``, and ``then`` when its reasoning was closed for it.

    Returns it with (answer, reasoning), and the ids that the model goes on from, or ``None``.
    """
    answer = Answer(
        vocabulary,
        POLICY,
        start=start,
        stops=stops,
        end_ids=(),
        tools=tools,
        max_tokens=max_tokens,
        max_thinking_tokens=budget,
    )
    deltas, context = [], None
    for piece in pieces:
        deltas.append(answer.push(piece[: max_tokens - len(answer.ids)]))
        if answer.cut:
            assert not answer.push(piece) and context is None
            deltas.append(answer.close_reasoning())
            context = list(answer.ids)
            deltas.append(answer.push(then[: max_tokens - len(answer.ids)]))
            break
    deltas.append(answer.finish())
    return answer, ("".join(d.answer for d in deltas), "".join(d.reasoning for d in deltas)), context


def ids_of(text: str) -> list[int]:
    return VOCABULARY.encode(text)


runs = st.tuples(st.sampled_from(["", "<think>", "<think>\n"]).map(ids_of), token_runs(TINY)).map(lambda p: p[0] + p[1])


@many
@given(st.data(), runs, mixed_texts, st.integers(0, 60), st.sampled_from([ANSWER, MAYBE, REASONING]), st.booleans())
def test_a_budget_cuts_once_and_only_reasoning_for_every_cut_of_the_stream(data, ids, rest, budget, start, tools):
    then = ids_of(rest)
    free, (free_answer, free_reasoning), _ = generate([ids], [], None, start=start, tools=tools)
    answer, (said, thought), context = generate(cut(data, ids), then, budget, start=start, tools=tools)
    again, texts, context_again = generate(one_by_one(ids), then, budget, start=start, tools=tools)
    assert ((said, thought), context, answer.calls) == (texts, context_again, again.calls)
    assert answer.reasoning_tokens == again.reasoning_tokens <= longest_reasoning(budget)
    if context is None:
        assert (said, thought, answer.ids) == (free_answer, free_reasoning, free.ids)
        assert answer.reasoning_tokens == free.reasoning_tokens
        return
    # The model's own tokens stand before the tag, and those after it are told as an answer.
    raw = TINY.decode(context)
    assert raw.count("</think>") == 1 and raw.endswith("</think>\n\n")
    closings = [ids_of("\n" * ends + "</think>\n\n") for ends in range(3)]
    assert any(context == ids[: len(context) - len(closing)] + closing for closing in closings)
    head = raw.removesuffix("</think>\n\n")
    assert thought == (head.lstrip().removeprefix("<think>") if start == MAYBE else head)
    plain = Answer(VOCABULARY, POLICY, start=ANSWER, stops=(), end_ids=(), tools=tools)
    first, last = plain.push(then), plain.finish()
    assert said == "\n\n" + first.answer + last.answer
    assert answer.calls == plain.calls
    assert answer.ids == context + then
    assert free.reasoning_tokens >= budget


@many
@given(data=st.data())
def test_a_budget_holds_with_the_real_tokenizer(llama3: Vocabulary, data):
    ids = llama3.encode("<think>\n") + data.draw(token_runs(llama3.tokenizer))
    budget, then = data.draw(st.integers(0, 30)), llama3.encode("Also ครับ.")
    answer, (said, thought), context = generate(cut(data, ids), then, budget, vocabulary=llama3)
    assert answer.reasoning_tokens <= longest_reasoning(budget)
    raw = llama3.decode(answer.ids)
    assert "<think>" + thought + "</think>" * ("</think>" in raw) + said == raw
    if context is not None:
        assert said == "\n\nAlso ครับ." and llama3.decode(context).endswith("\n</think>\n\n")


LINES = "<think>\n" + "word word\n" * 40


@pytest.mark.parametrize(
    ("text", "budget", "thought"),
    [
        (LINES, 0, "\n\n"),
        (LINES, 1, "\n\n"),
        (LINES, 20, "\n" + "word word\n" * 2),
        (LINES, 99, "\n" + "word word\n" * 10),
        ("<think>\nOne. Two. Three is long and has no end", 10, "\nOne. Two.\n"),
        ("<think>\npi is 3.14 or so, and so on and so on and on", 10, "\npi is 3.1\n"),
        ("<think>\nपहला वाक्य। दूसरा वाक्य अभी बाकी है और चलता रहता है", 32, "\nपहला वाक्य।\n"),
        ("<think>" + "x" * 200, 100, "x" * 109 + "\n"),
        ("<think>" + "ไ" * 60, 100, "ไ" * 37 + "\n"),
        ("<think>" + "x" * 107 + "</think> so", 100, "x" * 107),
        ("<think>" + "x" * 100 + "\n</think>\n\n so", 100, "x" * 100 + "\n"),
    ],
)
def test_where_the_reasoning_ends(text, budget, thought):
    _, (_, got), _ = generate(one_by_one(ids_of(text)), ids_of("Yes."), budget)
    assert got == thought


def test_an_empty_reasoning_is_closed_as_the_template_closes_it():
    for begun in ("<think>", "<think>\n", "<think>\n\n"):
        _, (said, _), context = generate([ids_of(begun), ids_of("why")], ids_of("Yes."), 0 if begun == "<think>" else 1)
        assert TINY.decode(context) == "<think>\n\n</think>\n\n"
        assert said == "\n\nYes."


def test_a_character_is_not_broken_and_half_a_tag_is_finished():
    _, (_, thought), _ = generate([ids_of("<think>" + "x" * 9 + "🙂🙂🙂")], ids_of("Yes."), 11)
    assert "�" not in thought and thought.endswith("🙂\n")
    _, (said, thought), context = generate([ids_of("<think>" + "x" * 9 + "</think> so")], [], 11)
    assert (said, thought, context) == (" so", "x" * 9, None)


def test_no_second_closing_tag_where_a_stop_string_held_the_models_own_back():
    text = one_by_one(ids_of("<think>" + "x" * 100 + "</think>" + "z" * 29))
    _, (said, thought), context = generate(text, ids_of(" so"), 100, stops=["</think>" + "z" * 30])
    assert thought == "x" * 100 and said.startswith("z") and said.endswith(" so")
    assert context is not None and TINY.decode(context).count("</think>") == 1


def test_max_tokens_bounds_the_whole():
    text = ids_of("<think>" + "x" * 200)
    for limit in range(100, 140):
        answer, _, context = generate(one_by_one(text), ids_of("Yes." * 20), 90, max_tokens=limit)
        assert answer.completion_tokens <= limit
        assert answer.finish_reason(limit=answer.completion_tokens >= limit) == "length"
        room = limit - len("<think>") - (90 + 9 - 1) - len("\n</think>\n\n")
        assert (context is not None) == (room > 0)
        if context is not None:
            assert len(context) < limit


def test_stop_strings_do_not_match_what_the_model_did_not_write():
    text = ids_of("<think>" + "one line\n" * 20)
    _, (said, thought), _ = generate([text], ids_of("Yes. END no"), 18, stops=["\n</th", "\n\nYes", "\n\n", "END"])
    assert thought == "one line\n" * 2
    assert said == "\n\nYes. "


def test_usage_counts_what_was_thought_with_its_closing_tag():
    answer, _, context = generate([ids_of("<think>" + "x" * 50)], ids_of("Yes."), 10)
    assert answer.reasoning_tokens == len(">" + "x" * 10 + "\n</think>\n\n")
    assert answer.completion_tokens == len(context) + len("Yes.")
