"""Weights and KV cache of one checkpoint in memory, and the pass over a packed batch.

NumPy multiplies neither BF16 nor FP8, so weights are held as float32, each read straight into the form it is used in
(``fp8`` says how FP8 checkpoints keep the arithmetic of FP8). The cache is one pool of rows per block, reserved whole
at the start. A sequence owns one unbroken range of rows, taken for its prompt and all its new tokens when it is
admitted: attention then works on plain slices, nothing is ever evicted, and a sequence that was admitted can always
finish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import DoesNotFit
from ...model import forward
from ...model.forward import BlockWeights, EndWeights, KvCache, Segment
from ...model.spec import ModelSpec
from . import fp8, panels
from .checkpoint import Checkpoint
from .memory import CGROUP, MEMINFO, available_memory_bytes

Layout = Literal["auto", "panels", "plain"]
_FLOAT_BYTES = 4
_MATRICES = ("qkv", "o", "attention_linear", "gate_up", "down", "ffn_linear")


class Runner:
    """Runs steps of packed sequences. Not safe for several threads."""

    def __init__(self, checkpoint: Checkpoint, kv_cache_tokens: int, layout: Layout = "auto") -> None:
        """Load all weights. Raises ``DoesNotFit`` when they and the KV pool exceed the memory that is available."""
        self.spec: ModelSpec = checkpoint.spec
        require_memory(self.spec, kv_cache_tokens)
        self.uses_panels = panels.panels_pay() if layout == "auto" else layout == "panels"
        self.blocks = [self._block(checkpoint.block(index)) for index in range(len(self.spec.blocks))]
        self.ends = self._ends(checkpoint.ends())
        self.caches = [self._cache(checkpoint, index, kv_cache_tokens) for index in range(len(self.spec.blocks))]

    def step(self, segments: Sequence[Segment], token_ids: Sequence[int], wanted: Sequence[int]) -> NDArray[np.float32]:
        """Run the packed tokens of ``segments``; logits (len(wanted), vocab) after the packed tokens ``wanted``."""
        hidden = forward.embed(self.ends, np.asarray(token_ids, np.int64))
        step = forward.make_step(self.spec, segments, hidden)
        for block, weights, cache in zip(self.spec.blocks, self.blocks, self.caches, strict=True):
            hidden = forward.run_block(self.spec, block, weights, hidden, step, cache, fp8.linear)
        if not len(wanted):  # only pieces of prompts: the head is the largest matrix
            return np.empty((0, self.spec.vocab_size), np.float32)
        logits: NDArray[np.float32] = forward.head(
            self.spec, self.ends, hidden[np.asarray(wanted, np.int64)], panels.linear
        )
        return logits

    def _block(self, weights: BlockWeights) -> BlockWeights:
        if not self.uses_panels:
            return weights
        parts = {name: getattr(weights, name) for name in _MATRICES}
        return replace(weights, **{name: _in_panels(part) for name, part in parts.items() if part is not None})

    def _cache(self, checkpoint: Checkpoint, index: int, rows: int) -> KvCache | None:
        block, scale = self.spec.blocks[index], checkpoint.kv_scale(index)
        return (
            forward.new_cache(self.spec, block, rows, self.ends.norm)
            if scale is None
            else fp8.new_cache(self.spec, block, rows, scale)
        )

    def _ends(self, ends: EndWeights) -> EndWeights:
        if not self.uses_panels:
            return ends
        head = panels.to_panels(ends.head)
        return EndWeights(head if ends.embedding is ends.head else ends.embedding, ends.norm, head)


def _in_panels(weight: Any) -> Any:
    if isinstance(weight, fp8.Fp8Matrix):
        assert not isinstance(weight.values, panels.Panels)
        return replace(weight, values=panels.to_panels(weight.values))
    return panels.to_panels(weight)


class RowPool:
    """Hands out unbroken ranges of cache rows, the first that fits."""

    def __init__(self, rows: int) -> None:
        self.rows, self.used = rows, 0
        self._free = [(0, rows)]  # (first row, count), sorted, never touching

    def take(self, count: int) -> int | None:
        """First row of a range of ``count`` rows, or ``None`` when no free range is long enough."""
        for i, (first, free) in enumerate(self._free):
            if free >= count:
                self._free[i : i + 1] = [(first + count, free - count)] if free > count else []
                self.used += count
                return first
        return None

    def give(self, first: int, count: int) -> None:
        """Return a range that ``take`` gave."""
        self.used -= count
        merged: list[tuple[int, int]] = []
        for start, free in sorted([*self._free, (first, count)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + free)
            else:
                merged.append((start, free))
        self._free = merged


def require_memory(spec: ModelSpec, kv_cache_tokens: int, meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> None:
    """Raise ``DoesNotFit`` when float32 weights and KV pool exceed the memory. Nothing to compare with: no check."""
    available_bytes = available_memory_bytes(meminfo, cgroup)
    if available_bytes is None:
        return
    weight_bytes = spec.parameter_count * _FLOAT_BYTES
    kv_bytes = spec.kv_bytes_per_token(_FLOAT_BYTES) * kv_cache_tokens
    if weight_bytes + kv_bytes > available_bytes:
        raise DoesNotFit(
            "memory-too-small",
            f"The CPU runtime needs {weight_bytes + kv_bytes:,} bytes of memory, {available_bytes:,} are available.",
            why=f"Weights as float32 take {weight_bytes:,} bytes, {kv_cache_tokens:,} cached tokens {kv_bytes:,}.",
            next="Close other programs, lower the number of cached tokens, or use a machine with more memory.",
        )
