"""What FP8 costs, measured on text that calibration has not seen: the source and the checkpoint side by side.

Both models run over the same texts, one block of each in memory at a time, each with a residual stream of its own, so
what is measured is the whole effect, errors that add up included. Then the head is walked once in blocks of the
vocabulary: divergence, perplexity and the likeliest token need running sums over the vocabulary and no more, so the
logits, of a large model far larger than its blocks, never exist at once.

Divergence is KL(source || checkpoint) of the next token, in nats: it is zero only when nothing changed, and unlike
perplexity it cannot hide one loss behind another gain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.verify_models import HEAD_BLOCK_ROWS, StreamedModel, VocabularyRows, linear
from nemobuild.engine.cpu.fp8 import MAX, Fp8Matrix, Fp8Rows, activation_scale
from nemobuild.errors import UsageError
from nemobuild.model import forward

BATCH_TOKENS = 1024  # bounds what one block needs beside its weights

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class QualityThresholds:
    """The gate. A checkpoint passes when every number is within its bound; each language for itself where so said.

    The defaults suit models of billions of weights. Small ones lose several times more, and their profiles say so.
    """

    max_weight_error: float = 0.04
    """Root mean square of a tensor's error over that of its weights. Rounding alone costs about 0.026."""
    max_saturated_share: float = 1e-3
    """Share of the inputs of a linear, or of the keys or values of a block, that lie beyond 448 times their scale."""
    max_divergence: float = 0.05
    """Mean KL divergence of the next token, nats, over all texts."""
    max_language_divergence: float = 0.10
    """The same, over the texts of any one language."""
    max_perplexity_increase: float = 0.03
    """Perplexity over that of the source, less one, over all texts."""
    min_greedy_agreement: float = 0.90
    """Share of positions at which both models find the same token the likeliest."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < 1e9:
                raise ValueError(f"{field.name} is {value!r}, not a number of at least 0")


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Token ids of one text, its language (``en``), and how errors call it.

    Texts of one language are reported together.
    """

    token_ids: Sequence[int]
    language: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Of all texts of a language, or of all: ``tokens`` are the positions whose next token was compared."""

    language: str
    tokens: int
    divergence: float
    source_perplexity: float
    perplexity: float
    greedy_agreement: float

    @property
    def perplexity_increase(self) -> float:
        return self.perplexity / self.source_perplexity - 1


@dataclass(frozen=True, slots=True)
class Activation:
    """Values that are cast while the model runs: ``peak`` is the largest over what the scale can hold."""

    where: str
    block: int
    peak: float
    saturated_share: float


@dataclass(frozen=True, slots=True)
class QualityReport:
    """``residual_error`` of every block: distance of the two residual streams after it over the length of the source's.

    ``activations`` are sorted, the worst first.
    """

    total: TextQuality
    languages: tuple[TextQuality, ...]
    activations: tuple[Activation, ...]
    residual_error: tuple[float, ...]

    def failures(self, thresholds: QualityThresholds) -> Iterator[tuple[str, str, float]]:
        """(where, what, how far beyond the bound as a ratio) of everything outside of ``thresholds``."""
        total, t = self.total, thresholds
        checks: list[tuple[str, str, float, float]] = [
            ("all texts", "mean KL divergence", total.divergence, t.max_divergence),
            ("all texts", "increase of perplexity", total.perplexity_increase, t.max_perplexity_increase),
            ("all texts", "share of other greedy tokens", 1 - total.greedy_agreement, 1 - t.min_greedy_agreement),
        ]
        checks += [
            (f"language {x.language}", "mean KL divergence", x.divergence, t.max_language_divergence)
            for x in self.languages
        ]
        checks += [
            (a.where, "share of saturated values", a.saturated_share, t.max_saturated_share) for a in self.activations
        ]
        for where, what, value, bound in checks:
            if not value <= bound:  # NaN is within no bound
                ratio = value / bound if bound > 0 else float("inf")
                yield where, f"The {what} is {value:.4g} (allowed: {bound:.4g}).", ratio


def measure_quality(
    source: StreamedModel,
    checkpoint: StreamedModel,
    texts: Sequence[HeldOutText],
    progress: Callable[[int, int], None] | None = None,
) -> QualityReport:
    """Run both models over ``texts``. ``progress`` gets (blocks done, blocks) after every block.

    Raises ``UsageError`` for a text of less than two tokens or with a token outside of the vocabulary.
    """
    if not texts:
        raise UsageError("no-texts", "There is no text to measure on.", next="Give at least one text.")
    check_texts(texts, source.spec.vocab_size)
    batches = _batches(texts)
    ids = [np.concatenate([np.asarray(texts[i].token_ids, np.int64) for i in batch]) for batch in batches]
    streams = [[forward.embed(model.ends, tokens) for tokens in ids] for model in (source, checkpoint)]
    observed: dict[str, _Range] = {}
    residual_error = []
    for index in range(len(source.spec.blocks)):
        for model, stream in zip((source, checkpoint), streams, strict=True):
            watched = observed if model is checkpoint else None
            weights = model.block(index)
            for n, batch in enumerate(batches):
                lengths = [len(texts[i].token_ids) for i in batch]
                stream[n] = _run(model, index, weights, stream[n], lengths, watched)
        residual_error.append(_distance(*streams))
        if progress is not None:
            progress(index + 1, len(source.spec.blocks))
    sums = [_compare_heads(source, checkpoint, *parts) for parts in zip(*streams, ids, strict=True)]
    return _report(texts, batches, sums, observed, residual_error)


def check_texts(texts: Sequence[HeldOutText], vocab: int) -> None:
    """Raise ``UsageError`` for a text of less than two tokens or with a token outside of the vocabulary."""
    for number, text in enumerate(texts):
        name = text.name or f"Text {number}"
        if len(text.token_ids) < 2:
            raise UsageError(
                "bad-text",
                f"{name} is {len(text.token_ids)} token(s) long.",
                why="At least two tokens are needed to compare a next one.",
                next="Give longer texts, or leave this one out.",
            )
        if not all(0 <= token < vocab for token in text.token_ids):
            raise UsageError("bad-text", f"{name} has a token outside of the vocabulary of {vocab}.")


def _batches(texts: Sequence[HeldOutText]) -> list[list[int]]:
    """Indices of texts that run together, about ``BATCH_TOKENS`` tokens each."""
    batches: list[list[int]] = [[]]
    held = 0
    for i, text in enumerate(texts):
        if batches[-1] and held + len(text.token_ids) > BATCH_TOKENS:
            batches.append([])
            held = 0
        batches[-1].append(i)
        held += len(text.token_ids)
    return batches


def _run(
    model: StreamedModel,
    index: int,
    weights: forward.BlockWeights,
    hidden: Array,
    lengths: list[int],
    observed: dict[str, _Range] | None,
) -> Array:
    """The residual stream of one batch after a block; notes the ranges of what is cast in ``observed``."""

    def watch(name: str, x: Array, weight: Any) -> Array:
        if observed is not None and isinstance(weight, Fp8Matrix):
            place = observed.setdefault(f"model.layers.{index}.{name}", _Range(index))
            place.note(np.abs(x), activation_scale(x, weight))
        return linear(name, x, weight)

    starts = np.cumsum([0, *lengths])
    segments = [forward.Segment(int(s), 0, n) for s, n in zip(starts, lengths, strict=False)]
    step = forward.make_step(model.spec, segments, hidden)
    cache = model.new_cache(index, len(hidden))
    if cache is not None and observed is not None:
        for name, rows in (("keys", cache.keys), ("values", cache.values)):
            if isinstance(rows, Fp8Rows):
                rows.observe = observed.setdefault(f"model.layers.{index}.{name}", _Range(index)).note
    result: Array = forward.run_block(model.spec, model.spec.blocks[index], weights, hidden, step, cache, watch)
    return result


class _Range:
    """Counts of the values of one place over all batches."""

    def __init__(self, block: int) -> None:
        self.block, self.peak, self.count, self.saturated = block, 0.0, 0, 0

    def note(self, magnitudes: Array, scale: np.float32) -> None:
        limit = np.float32(MAX) * scale
        self.count += magnitudes.size
        # A value just above the limit by rounding of the scale itself is not lost.
        self.saturated += int(np.count_nonzero(~(magnitudes <= limit * np.float32(1 + 1e-6))))
        self.peak = max(self.peak, float(magnitudes.max(initial=0) / limit))


def _distance(source: list[Array], checkpoint: list[Array]) -> float:
    difference = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(source, checkpoint, strict=True))
    length = sum(float(np.square(a, dtype=np.float64).sum()) for a in source)
    return float(np.sqrt(difference / length)) if length else 0.0


def _compare_heads(source: StreamedModel, checkpoint: StreamedModel, ours: Array, theirs: Array, ids: Array) -> Array:
    """(N, 4) of every position: KL divergence, loss of the source, loss of the checkpoint, whether they agree.

    The loss is that of the next token in ``ids``; that of a text's last token is without meaning.
    """
    hidden = [
        forward.rms_norm(stream, model.ends.norm, model.spec.norm_epsilon)
        for model, stream in ((source, ours), (checkpoint, theirs))
    ]
    count, targets = len(ids), np.roll(ids, -1)
    sums = [_LogSumExp(count) for _ in hidden]
    target_logits = np.zeros((2, count))
    weighted = np.zeros(count)  # sum of exp(source logit - peak) x (source logit - checkpoint logit)
    for start in range(0, source.spec.vocab_size, HEAD_BLOCK_ROWS):
        end = min(start + HEAD_BLOCK_ROWS, source.spec.vocab_size)
        logits = []
        for model, x in zip((source, checkpoint), hidden, strict=True):
            head: VocabularyRows = model.ends.head
            logits.append(x @ head.read(start, end).T)
        here = np.flatnonzero((targets >= start) & (targets < end))
        for k, values in enumerate(logits):
            target_logits[k, here] = values[here, targets[here] - start]
        weights, shrunk = sums[0].add(logits[0], start)
        weighted = weighted * shrunk + np.einsum("nv,nv->n", weights, logits[0] - logits[1])
        sums[1].add(logits[1], start)
    totals = [s.value() for s in sums]
    divergence = weighted / sums[0].sum - totals[0] + totals[1]
    agree = sums[0].likeliest == sums[1].likeliest
    return np.stack([divergence, totals[0] - target_logits[0], totals[1] - target_logits[1], agree], axis=1)


class _LogSumExp:
    """log(sum(exp(logits))) over a vocabulary that comes in pieces, and the likeliest token."""

    def __init__(self, count: int) -> None:
        self.peak = np.full(count, -np.inf)
        self.sum = np.zeros(count)
        self.likeliest: Array = np.zeros(count, np.int64)

    def add(self, logits: Array, start: int) -> tuple[Array, Array]:
        """exp(logits - new peak), and the factor by which sums of earlier pieces shrink."""
        best = logits.argmax(axis=1)
        peaks = logits[np.arange(len(logits)), best].astype(np.float64)
        self.likeliest = np.where(peaks > self.peak, best + start, self.likeliest)
        peak = np.maximum(self.peak, peaks)
        shrunk = np.exp(self.peak - peak)
        weights = np.exp(logits - peak.astype(np.float32)[:, None])
        self.sum = self.sum * shrunk + weights.sum(axis=1, dtype=np.float64)
        self.peak = peak
        return weights, shrunk

    def value(self) -> Array:
        total: Array = self.peak + np.log(self.sum)
        return total


def _report(
    texts: Sequence[HeldOutText],
    batches: list[list[int]],
    sums: list[Array],
    observed: dict[str, _Range],
    residual_error: list[float],
) -> QualityReport:
    by_language: dict[str, list[Array]] = defaultdict(list)
    for batch, rows in zip(batches, sums, strict=True):
        first = 0
        for i in batch:
            last = first + len(texts[i].token_ids)
            by_language[texts[i].language].append(rows[first : last - 1])
            first = last
    everything = [rows for group in by_language.values() for rows in group]
    activations = [Activation(where, r.block, r.peak, r.saturated / max(1, r.count)) for where, r in observed.items()]
    activations.sort(key=lambda a: (-a.saturated_share, -a.peak))
    languages = sorted((_text_quality(name, rows) for name, rows in by_language.items()), key=lambda q: -q.divergence)
    return QualityReport(_text_quality("all", everything), tuple(languages), tuple(activations), tuple(residual_error))


def _text_quality(language: str, parts: list[Array]) -> TextQuality:
    rows = np.concatenate(parts)
    divergence, source_loss, loss, agreement = rows.mean(axis=0)
    return TextQuality(
        language=language,
        tokens=len(rows),
        divergence=max(0.0, float(divergence)) if np.isfinite(divergence) else float("nan"),
        source_perplexity=float(np.exp(source_loss)),
        perplexity=float(np.exp(loss)),
        greedy_agreement=float(agreement),
    )
