"""Logits of a checkpoint against those of its source, for models that do not fit into memory.

Both sides run the one forward pass of the project, one block of weights at a time. The two matrices over the
vocabulary, in large models far larger than a block, stay on the disk and are read by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.engine.cpu.checkpoint import Checkpoint, open_checkpoint
from nemobuild.model import forward
from nemobuild.weights.safetensors import TensorInfo, bf16_to_float32, read_array
from nemobuild.weights.snapshot import Snapshot

HEAD_BLOCK_ROWS = 4096

Array = NDArray[Any]


def logit_error(checkpoint: Path, against: Snapshot, prompts: list[list[int]]) -> float:
    """Largest absolute difference of any logit at any position; NaN when a logit is NaN.

    The source is rounded to BF16 first, so a right conversion gives zero. Raises ``IntegrityError`` for a checkpoint
    that the CPU runtime refuses.
    """
    spec, opened = against.spec, open_checkpoint(checkpoint)
    theirs = forward.forward(spec, _source_ends(against), _source_blocks(against), prompts, _linear)
    ours = forward.forward(opened.spec, _checkpoint_ends(opened), opened.blocks(), prompts, _linear)
    return float(np.max([np.max(np.abs(a - b)) for a, b in zip(ours, theirs, strict=True)]))


def rounded_bits(info: TensorInfo, rows: tuple[int, int] | None = None) -> Array:
    """BF16 bits of a tensor or of ``rows`` of it, rounded to nearest even where the tensor is wider."""
    array = read_array(info, bits=True, rows=rows if len(info.shape) > 1 else None)
    if info.dtype == "BF16":
        return array
    wide = array.astype(np.float32).view(np.uint32).astype(np.uint64)
    low, kept = wide & 0xFFFF, wide >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (kept & 1 == 1))
    bits: Array = (kept + up).astype(np.uint16)
    return bits


class _Rows:
    """A (vocab, hidden) matrix that stays on the disk: tensors one below the other, read by rows."""

    def __init__(self, parts: list[TensorInfo], count: int) -> None:
        self.parts, self.count = parts, count

    def __getitem__(self, token_ids: Array) -> Array:
        return np.stack([self.read(int(i), int(i) + 1)[0] for i in token_ids])

    def read(self, start: int, end: int) -> Array:
        rows = self.parts[0].shape[0]
        blocks = []
        for i in range(start // rows, (end - 1) // rows + 1):
            low, high = max(start, i * rows) - i * rows, min(end, (i + 1) * rows) - i * rows
            blocks.append(bf16_to_float32(rounded_bits(self.parts[i], (low, high))))
        return np.concatenate(blocks)


def _linear(name: str, x: Array, weight: Array | _Rows) -> Array:
    if not isinstance(weight, _Rows):
        result: Array = forward.linear(name, x, weight)
        return result
    starts = range(0, weight.count, HEAD_BLOCK_ROWS)
    blocks = [x @ weight.read(s, min(s + HEAD_BLOCK_ROWS, weight.count)).T for s in starts]
    return np.concatenate(blocks, axis=1)


def _source_read(against: Snapshot, name: str) -> Array:
    return bf16_to_float32(rounded_bits(against.tensors[name]))


def _source_blocks(against: Snapshot) -> Iterator[forward.BlockWeights]:
    return forward.hf_blocks(against.spec, lambda name: _source_read(against, name))


def _source_ends(against: Snapshot) -> forward.EndWeights:
    vocab = against.spec.vocab_size
    embedding = _Rows([against.tensors["model.embed_tokens.weight"]], vocab)
    head = embedding if against.spec.tied_embeddings else _Rows([against.tensors["lm_head.weight"]], vocab)
    return forward.EndWeights(embedding, _source_read(against, "model.norm.weight"), head)


def _checkpoint_ends(opened: Checkpoint) -> forward.EndWeights:
    vocab, last = opened.spec.vocab_size, (opened.config.pp - 1) * opened.config.tp
    embedding = _Rows([opened.ranks[0]["transformer.vocab_embedding.weight"]], vocab)
    head = embedding
    if not opened.spec.tied_embeddings:
        head = _Rows([rank["lm_head.weight"] for rank in opened.ranks[last:]], vocab)
    return forward.EndWeights(embedding, read_array(opened.ranks[last]["transformer.ln_f.weight"]), head)
