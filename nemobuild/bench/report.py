"""Samples to numbers: percentiles of what a user waits for, and what the endpoint gave in that time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from nemobuild.bench.load import Load, Sample

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Times:
    """Percentiles in seconds; ``None`` where nothing was measured."""

    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One endpoint in one reasoning mode under one level of load.

    ``inter_token`` is per request, from the first piece to the last over the tokens between; ``gap`` is each wait
    between two pieces, so its highest values are the stalls that a reader sees.
    """

    url: str
    reasoning: str
    kind: str
    level: float
    requests: int
    errors: dict[str, int]
    elapsed_s: float
    requests_per_s: float
    tokens_per_s: float
    prompt_tokens: float
    completion_tokens: float
    thinking_share: float
    first_token: Times
    inter_token: Times
    gap: Times
    end_to_end: Times

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarise(url: str, reasoning: str, load: Load, samples: Sequence[Sample]) -> Cell:
    good = [sample for sample in samples if sample.error is None]
    elapsed_s = max((s.end_s for s in samples), default=0.0) - min((s.due_s for s in samples), default=0.0)
    tokens = sum(_count(s, "completion_tokens") for s in good)
    spoken = [s for s in good if s.arrivals_s]
    return Cell(
        url=url,
        reasoning=reasoning,
        kind=load.kind,
        level=load.level,
        requests=len(samples),
        errors=dict(Counter(s.error for s in samples if s.error is not None)),
        elapsed_s=elapsed_s,
        requests_per_s=len(good) / elapsed_s if elapsed_s else 0.0,
        tokens_per_s=tokens / elapsed_s if elapsed_s else 0.0,
        prompt_tokens=sum(_count(s, "prompt_tokens") for s in good) / max(1, len(good)),
        completion_tokens=tokens / max(1, len(good)),
        thinking_share=sum(_count(s, "reasoning_tokens") for s in good) / max(1, tokens),
        first_token=times([s.arrivals_s[0] - s.due_s for s in spoken]),
        inter_token=times(
            [
                (s.arrivals_s[-1] - s.arrivals_s[0]) / (_count(s, "completion_tokens") - 1)
                for s in spoken
                if len(s.arrivals_s) > 1 and _count(s, "completion_tokens") > 1
            ]
        ),
        gap=times([b - a for s in spoken for a, b in pairwise(s.arrivals_s)]),
        end_to_end=times([s.end_s - s.due_s for s in good]),
    )


def times(values_s: Sequence[float]) -> Times:
    """Percentiles by the nearest rank: each is a time that was measured."""
    ordered = sorted(values_s)
    if not ordered:
        return Times(None, None, None, None)
    p50, p90, p99 = (ordered[math.ceil(len(ordered) * p / 100) - 1] for p in _PERCENTILES)
    return Times(p50, p90, p99, ordered[-1])


HEAD = (
    "endpoint",
    "reasoning",
    "load",
    "requests",
    "errors",
    "tokens/s",
    "first token p50",
    "p99",
    "per token p50",
    "p99",
    "whole p50",
    "p99",
)


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Rows of the table under ``HEAD``; times in milliseconds."""
    return [
        (
            cell.url,
            cell.reasoning,
            f"{cell.level:g} {'at once' if cell.kind == 'concurrency' else 'per s'}",
            str(cell.requests),
            str(sum(cell.errors.values())),
            f"{cell.tokens_per_s:.1f}",
            *(
                "-" if value is None else f"{value * 1000:.1f} ms"
                for t in (cell.first_token, cell.inter_token, cell.end_to_end)
                for value in (t.p50, t.p99)
            ),
        )
        for cell in cells
    ]


def _count(sample: Sample, name: str) -> int:
    return int(sample.outputs.get(name) or 0)
