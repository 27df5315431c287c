"""From logits to tokens, with the rules of TensorRT-LLM's decoder (``penaltyKernels``, ``samplingTopKKernels``).

Order: temperature; repetition, presence and frequency penalty; end ids that come too early; bad words; top-k; top-p.
All three penalties look at prompt and generated tokens together, as that decoder does unless told otherwise. Bad and
stop words may begin in the prompt, but end in a generated token.

A token is drawn by walking down the sorted probabilities to a random point below ``top_p``. So the last token of the
set is drawn with that part of its probability that lies below ``top_p`` (there too), which is a little less than
after renormalising.

Log-probabilities are those of the whole vocabulary after temperature, penalties and bans, before top-k and top-p
(``normalize_log_probs = false`` there). At temperature 0 they are taken at temperature 1.

Every request has a generator of its own and uses one random number per token, so its neighbours in the batch do not
matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..request import FinishReason, Generation

Scores = NDArray[np.floating[Any]]
_FIRST_SHORTLIST = 256  # tokens sorted for top-p at first; grown when they do not hold the mass


class Sampler:
    """State of one request: its tokens so far, their counts, its random numbers."""

    def __init__(self, generation: Generation, vocab_size: int) -> None:
        self.generation = generation
        self.tokens = list(generation.input_ids)
        self.generated = 0
        self._random = np.random.default_rng(generation.seed)
        self._greedy = generation.temperature == 0 or generation.top_k == 1
        self._end_ids = np.array(generation.end_ids, np.int64)
        self._banned = np.array([word[0] for word in generation.bad_words if len(word) == 1], np.int64)
        self._phrases = [tuple(word) for word in generation.bad_words if len(word) > 1]
        self._counts: NDArray[np.int64] | None = None
        if (generation.repetition_penalty, generation.presence_penalty, generation.frequency_penalty) != (1, 0, 0):
            self._counts = np.bincount(self.tokens, minlength=vocab_size)

    def pick(self, logits: NDArray[np.float32]) -> tuple[int, float | None]:
        """The next token after ``logits`` (vocab,), and its log-probability if asked for.

        Raises ``ValueError`` when no token can be chosen: all are banned, or the logits are not numbers.
        """
        scores = self.adjust(logits)
        best = int(scores.argmax())
        if not np.isfinite(scores[best]):
            problem = "the logits are not finite" if not np.isfinite(logits).all() else "every token is banned"
            raise ValueError(f"no token can be chosen: {problem}")
        token = best if self._greedy else self._draw(scores)
        if not self.generation.return_log_probs:
            return token, None
        shifted = scores.astype(np.float64) - scores[best]
        return token, float(shifted[token] - np.log(np.exp(shifted).sum()))

    def accept(self, token: int) -> FinishReason | None:
        """Append ``token``; say whether and why the request ends with it."""
        self.tokens.append(token)
        self.generated += 1
        if self._counts is not None:
            self._counts[token] += 1
        if token in self.generation.end_ids:
            return "end"
        if any(self._ends_with(word) for word in self.generation.stop_words):
            return "stop_word"
        return "length" if self.generated >= self.generation.max_new_tokens else None

    def adjust(self, logits: NDArray[np.float32]) -> Scores:
        """Logits after temperature, penalties and bans. ``logits`` itself stays as it is."""
        wanted = self.generation
        scores = logits / np.float32(wanted.temperature) if wanted.temperature not in (0, 1) else logits.copy()
        if self._counts is not None:
            seen = np.flatnonzero(self._counts)
            values = scores[seen]
            penalty = np.float32(wanted.repetition_penalty)
            values = np.where(values < 0, values * penalty, values / penalty)
            scores[seen] = values - wanted.presence_penalty - wanted.frequency_penalty * self._counts[seen]
        if self.generated < wanted.min_new_tokens:
            scores[self._end_ids] = -np.inf
        scores[self._banned] = -np.inf
        for phrase in self._phrases:
            if self._ends_with(phrase[:-1]):
                scores[phrase[-1]] = -np.inf
        return scores

    def _ends_with(self, word: tuple[int, ...] | Any) -> bool:
        return tuple(self.tokens[-len(word) :]) == tuple(word)

    def _draw(self, scores: Scores) -> int:
        tokens, mass, limit = shortlist(scores, self.generation.top_k, self.generation.top_p)
        point = (1.0 - self._random.random()) * limit  # in (0, limit]: a token without mass is never met
        return int(tokens[np.searchsorted(mass, min(point, mass[-1]))])


def shortlist(scores: Scores, top_k: int, top_p: float) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """Tokens to draw from, their cumulated weights, and the point up to which to draw: ``top_p`` of all weight.

    Weights are ``exp(score - max)``. Tokens are sorted by falling score, then by id; they are the ``top_k`` best, cut
    to the smallest set that holds ``top_p`` of the weight of these. Unsorted, and all, when both are off. Which of
    several equal scores falls to the cut is left open.
    """
    weights = np.exp(scores.astype(np.float64) - scores.max())
    vocab = len(scores)
    if not top_k and top_p >= 1:
        mass = weights.cumsum()
        return np.arange(vocab), mass, float(mass[-1])
    total = float(weights.sum())
    count = min(top_k or _FIRST_SHORTLIST, vocab)
    while True:
        tokens = np.argpartition(-scores, count - 1)[:count]
        tokens = tokens[np.lexsort((tokens, -scores[tokens]))]
        mass = weights[tokens].cumsum()
        limit = top_p * (float(mass[-1]) if top_k else total)
        if top_p >= 1:
            return tokens, mass, limit
        if mass[-1] >= limit or count == vocab:
            last = min(int(np.searchsorted(mass, limit)), count - 1)
            return tokens[: last + 1], mass[: last + 1], limit
        count = min(count * 16, vocab)
