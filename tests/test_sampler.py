"""The sampler: properties over random logits, and the rules of TensorRT-LLM by example."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemobuild.engine.cpu import Generation, RequestError
from nemobuild.engine.cpu.sampler import Sampler, shortlist
from nemobuild.engine.request import Limits, check

VOCAB = 40
LIMITS = Limits(VOCAB, 64, 64)
logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB)
tokens = st.integers(0, VOCAB - 1)


def sampler(vocab: int = VOCAB, prompt: tuple[int, ...] = (1, 2), **fields: Any) -> Sampler:
    wanted = Generation(prompt, 32, **fields)
    return Sampler(check(wanted, Limits(vocab, 64, 64)), vocab)


def draw(s: Sampler, logits: np.ndarray, count: int) -> list[int]:
    drawn = []
    for _ in range(count):
        token, _ = s.pick(logits)
        s.accept(token)
        drawn.append(token)
    return drawn


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


@given(
    logits_lists,
    st.sampled_from([{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_k": 1, "temperature": 3.0}]),
)
def test_greedy_is_argmax(values: list[float], fields: dict[str, Any]) -> None:
    logits = np.array(values, np.float32)
    token, _ = sampler(**fields).pick(logits)
    # After a division two neighbours may become equal, so compare values.
    assert logits[token] == pytest.approx(logits.max(), rel=1e-6)


@given(logits_lists, st.integers(1, VOCAB))
def test_top_k_keeps_the_k_best(values: list[float], k: int) -> None:
    scores = np.array(values, np.float32)
    kept, _, _ = shortlist(scores, k, 1.0)
    assert len(set(kept.tolist())) == k
    assert sorted(scores[kept]) == sorted(scores)[VOCAB - k :]


@given(logits_lists, st.floats(0.01, 0.999), st.sampled_from([0, 5, VOCAB]))
def test_top_p_is_the_smallest_set_that_holds_the_mass(values: list[float], p: float, k: int) -> None:
    scores = np.array(values, np.float32)
    kept, mass, limit = shortlist(scores, k, p)
    chances = np.sort(softmax(scores))[::-1]
    if k:
        chances = chances[:k] / chances[:k].sum()
    needed = int(np.searchsorted(chances.cumsum(), p)) + 1
    sure = np.abs(chances.cumsum() - p).min() > 1e-9  # a sum that hits p exactly may fall on either side
    assert len(kept) == needed or not sure
    assert mass[-1] >= limit or not sure
    assert scores[kept].min() >= np.delete(scores, kept).max(initial=-np.inf)


def test_top_p_over_a_large_flat_vocabulary_grows_its_shortlist() -> None:
    scores = np.zeros(5000, np.float32)
    kept, _, _ = shortlist(scores, 0, 0.5)
    assert len(kept) == 2500
    assert (np.diff(kept) > 0).all()  # equal scores are sorted by id


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    drawn = [sampler(4, seed=seed).pick(logits)[0] for seed in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    hot = [sampler(4, seed=seed, temperature=0.5).pick(logits)[0] for seed in range(4000)]
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(np.bincount(hot, minlength=4) / 4000, squared / squared.sum(), atol=0.03)
    cut = [sampler(4, seed=seed, top_p=0.6).pick(logits)[0] for seed in range(4000)]
    # The walk ends at 0.6: token 1 keeps 0.1 of its 0.3.
    np.testing.assert_allclose(np.bincount(cut, minlength=4) / 4000, [5 / 6, 1 / 6, 0, 0], atol=0.03)


@given(logits_lists, st.integers(0, 2**64 - 1))
@settings(max_examples=30)
def test_a_seed_repeats_itself_and_another_differs(values: list[float], seed: int) -> None:
    logits = np.array(values, np.float32)
    first, again = (draw(sampler(seed=seed, top_p=0.95), logits, 20) for _ in range(2))
    assert first == again
    flat = np.zeros(VOCAB, np.float32)
    other = (seed + 1) % 2**64
    assert draw(sampler(seed=seed), flat, 20) != draw(sampler(seed=other), flat, 20)


@given(logits_lists, st.sets(tokens, max_size=5), st.integers(0, 6))
def test_end_ids_are_forbidden_until_min_new_tokens(values: list[float], end_ids: set[int], least: int) -> None:
    logits = np.array(values, np.float32)
    logits[list(end_ids)] = 30
    s = sampler(end_ids=tuple(end_ids), min_new_tokens=least, seed=1)
    drawn = draw(s, logits, 8)
    assert not end_ids & set(drawn[:least])
    if end_ids:
        assert set(drawn[least:]) <= end_ids


@given(logits_lists, st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=6), st.integers(0, 9))
def test_bad_words_never_appear(values: list[float], words: list[list[int]], seed: int) -> None:
    logits = np.array(values, np.float32)
    for word in words:
        logits[word] = 25
    s = sampler(bad_words=words, seed=seed, top_p=0.9)
    drawn = draw(s, logits, 25)
    text = [1, 2, *drawn]  # a word may begin in the prompt
    for word in words:
        starts = range(max(0, 3 - len(word)), len(text) - len(word) + 1)
        assert not any(text[i : i + len(word)] == word for i in starts)


def test_a_phrase_is_banned_only_after_its_beginning() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[5] = 9
    s = sampler(bad_words=[[7, 5]], temperature=0.0)
    assert s.pick(logits)[0] == 5
    s.accept(7)
    assert s.pick(logits)[0] != 5


def test_penalties_by_hand() -> None:
    """Prompt 1 1 2, generated 2: counts 2 and 2. Temperature first, then repetition, presence, frequency."""
    s = sampler(prompt=(1, 1, 2), temperature=2.0, repetition_penalty=1.5, presence_penalty=0.25, frequency_penalty=0.5)
    s.accept(2)
    logits = np.zeros(VOCAB, np.float32)
    logits[:4] = [6, 6, -6, -6]
    scores = s.adjust(logits)
    assert scores[:4].tolist() == [3, 3 / 1.5 - 0.25 - 2 * 0.5, -3 * 1.5 - 0.25 - 2 * 0.5, -3]
    assert logits[1] == 6, "the caller's logits must stay"


@given(logits_lists, st.floats(1.0, 3.0), st.floats(0, 2), st.floats(0, 2))
def test_penalties_only_lower_and_only_what_was_seen(values: list[float], r: float, p: float, f: float) -> None:
    logits = np.array(values, np.float32)
    scores = sampler(prompt=(3, 4, 4), repetition_penalty=r, presence_penalty=p, frequency_penalty=f).adjust(logits)
    unseen = np.delete(np.arange(VOCAB), [3, 4])
    assert (scores[unseen] == logits[unseen]).all()
    assert (scores[[3, 4]] <= logits[[3, 4]] + 1e-6).all()


def test_log_probs_are_of_the_whole_vocabulary_after_temperature() -> None:
    logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32) * 3
    for fields, scale in (
        ({"temperature": 0.5}, 0.5),
        ({"top_k": 3}, 1.0),
        ({"temperature": 0.0}, 1.0),
        ({"top_p": 0.3}, 1),
    ):
        token, log_prob = sampler(return_log_probs=True, **fields).pick(logits)
        assert log_prob == pytest.approx(np.log(softmax(logits / np.float32(scale))[token]), abs=1e-5)
    assert sampler().pick(logits)[1] is None


def test_reasons_to_end() -> None:
    s = sampler(end_ids=(9,), stop_words=[[4, 5], [2, 8]])
    assert s.accept(5) is None
    assert s.accept(4) is None
    assert s.accept(5) == "stop_word"
    assert sampler(stop_words=[[2, 8]]).accept(8) == "stop_word"  # begins in the prompt
    assert s.accept(9) == "end"
    short = Sampler(check(Generation((1,), 2), LIMITS), VOCAB)
    assert [short.accept(3), short.accept(3)] == [None, "length"]


def test_no_token_left_is_an_error() -> None:
    logits = np.zeros(VOCAB, np.float32)
    with pytest.raises(ValueError, match="every token is banned"):
        sampler(bad_words=[[t] for t in range(VOCAB)]).pick(logits)
    logits[3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        sampler().pick(logits)


BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("input_ids", {"input_ids": []}),
    ("input_ids", {"input_ids": [VOCAB]}),
    ("input_ids", {"input_ids": [-1]}),
    ("input_ids", {"input_ids": [1.5]}),
    ("input_ids", {"input_ids": None}),
    ("input_ids", {"input_ids": [1] * 64}),
    ("max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", {"max_new_tokens": -5}),
    ("max_new_tokens", {"max_new_tokens": "7"}),
    ("max_new_tokens", {"max_new_tokens": 63}),
    ("min_new_tokens", {"min_new_tokens": -1}),
    ("min_new_tokens", {"min_new_tokens": 9}),
    ("end_ids", {"end_ids": [VOCAB]}),
    ("stop_words", {"stop_words": [[]]}),
    ("stop_words", {"stop_words": [[VOCAB]]}),
    ("stop_words", {"stop_words": None}),
    ("bad_words", {"bad_words": [3]}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": float("nan")}),
    ("top_k", {"top_k": -1}),
    ("top_k", {"top_k": 1025}),
    ("top_p", {"top_p": 1.5}),
    ("top_p", {"top_p": -0.5}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("presence_penalty", {"presence_penalty": float("inf")}),
    ("frequency_penalty", {"frequency_penalty": None}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**64}),
]


@pytest.mark.parametrize(("field", "change"), BAD_REQUESTS, ids=[str(c)[:40] for _, c in BAD_REQUESTS])
def test_a_bad_field_is_named(field: str, change: dict[str, Any]) -> None:
    wanted = {"input_ids": [1, 2], "max_new_tokens": 8} | change
    with pytest.raises(RequestError, match=field) as caught:
        check(Generation(**wanted), LIMITS)
    assert caught.value.field == field


def test_numpy_values_are_taken() -> None:
    wanted = Generation(np.array([1, 2], np.int32), np.int32(8), seed=np.uint64(2**64 - 1), top_p=np.float32(0.5))  # type: ignore[arg-type]
    checked = check(wanted, LIMITS)
    assert checked.input_ids == (1, 2)
    assert (type(checked.max_new_tokens), checked.seed, checked.top_p) == (int, 2**64 - 1, 0.5)


def test_the_smaller_limit_counts() -> None:
    check(Generation([1] * 10, 10), Limits(VOCAB, 20, 20))
    for limits in (Limits(VOCAB, 19, 100), Limits(VOCAB, 100, 19)):
        with pytest.raises(RequestError, match="= 19"):
            check(Generation([1] * 10, 10), limits)
