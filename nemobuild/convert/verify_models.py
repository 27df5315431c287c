"""Models that are run one block at a time: the source and the checkpoint, each in BF16 or FP8, from their files.

One form for all: Hugging Face folders (sources, and FP8 folders that we wrote) and TensorRT-LLM checkpoints. Weights of
a block are read when they are asked for; the two matrices over the vocabulary, in large models far larger than a
block, stay on the disk and are read by rows. FP8 runs with the arithmetic of the CPU runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.engine.cpu import fp8
from nemobuild.engine.cpu.checkpoint import open_checkpoint
from nemobuild.errors import IntegrityError
from nemobuild.model import forward
from nemobuild.model.spec import Attention, ModelSpec
from nemobuild.weights.quantized import FLOAT8
from nemobuild.weights.safetensors import TensorInfo, bf16_to_float32, read_array, read_header

HEAD_BLOCK_ROWS = 4096

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class StreamedModel:
    """``block(i)`` reads the weights of a block, ``kv_scales(i)`` gives the scales of keys and values if these are FP8.

    The embedding and the head of ``ends`` give rows only: use ``linear`` of this module.
    """

    spec: ModelSpec
    ends: forward.EndWeights
    block: Callable[[int], forward.BlockWeights]
    kv_scales: Callable[[int], tuple[float, float] | None]

    def blocks(self) -> Iterator[forward.BlockWeights]:
        return (self.block(i) for i in range(len(self.spec.blocks)))

    def new_cache(self, index: int, rows: int) -> forward.KvCache | None:
        """A cache for ``rows`` tokens of block ``index``, FP8 where the model's is."""
        block, scales = self.spec.blocks[index], self.kv_scales(index)
        if scales is None:
            return forward.new_cache(self.spec, block, rows, np.empty(0, np.float32))
        return fp8.new_cache(self.spec, block, rows, *scales)


class VocabularyRows:
    """A (vocab, hidden) matrix that stays on the disk: tensors one below the other, read by rows."""

    def __init__(self, parts: list[TensorInfo], count: int) -> None:
        self.parts, self.count = parts, count

    def __getitem__(self, token_ids: Array) -> Array:
        return np.stack([self.read(int(i), int(i) + 1)[0] for i in token_ids])

    def read(self, start: int, end: int) -> Array:
        """Rows ``start`` to ``end``, float32."""
        rows = self.parts[0].shape[0]
        blocks = []
        for i in range(start // rows, (end - 1) // rows + 1):
            low, high = max(start, i * rows) - i * rows, min(end, (i + 1) * rows) - i * rows
            blocks.append(bf16_to_float32(rounded_bits(self.parts[i], (low, high))))
        return np.concatenate(blocks)


def linear(name: str, x: Array, weight: Any) -> Array:
    """``LinearFn`` of a ``StreamedModel``."""
    if not isinstance(weight, VocabularyRows):
        return fp8.linear(name, x, weight)
    starts = range(0, weight.count, HEAD_BLOCK_ROWS)
    blocks = [x @ weight.read(s, min(s + HEAD_BLOCK_ROWS, weight.count)).T for s in starts]
    return np.concatenate(blocks, axis=1)


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


def trtllm_model(folder: Path) -> StreamedModel:
    """A TensorRT-LLM checkpoint folder. Raises ``IntegrityError`` for what the CPU runtime refuses."""
    opened = open_checkpoint(folder)
    vocab, last = opened.spec.vocab_size, (opened.config.pp - 1) * opened.config.tp
    embedding = VocabularyRows([opened.ranks[0]["transformer.vocab_embedding.weight"]], vocab)
    head = embedding
    if not opened.spec.tied_embeddings:
        head = VocabularyRows([rank["lm_head.weight"] for rank in opened.ranks[last:]], vocab)
    norm = read_array(opened.ranks[last]["transformer.ln_f.weight"]).astype(np.float32)

    def kv_scales(index: int) -> tuple[float, float] | None:
        scale = opened.kv_scale(index)
        return None if scale is None else (scale, scale)

    return StreamedModel(opened.spec, forward.EndWeights(embedding, norm, head), opened.block, kv_scales)


def hf_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of all files of a Hugging Face folder, scales too."""
    return {name: info for file in sorted(folder.glob("*.safetensors")) for name, info in read_header(file).items()}


def hf_model(spec: ModelSpec, tensors: Mapping[str, TensorInfo]) -> StreamedModel:
    """A Hugging Face model of ``tensors``: matrices in E4M3 have scales beside them, wider ones are rounded to BF16."""

    def read(name: str) -> Any:
        info = tensors[name]
        if info.dtype != FLOAT8:
            return bf16_to_float32(rounded_bits(info))
        weight_scale = read_scale(tensors, name, "weight_scale")
        assert weight_scale is not None
        return fp8.Fp8Matrix(fp8.decode(read_array(info)), weight_scale, read_scale(tensors, name, "input_scale"))

    def kv_scales(index: int) -> tuple[float, float] | None:
        if not isinstance(spec.blocks[index].attention, Attention):
            return None
        prefix = f"model.layers.{index}.self_attn"
        pair = [tensors.get(f"{prefix}.{x}_proj.{x}_scale", tensors.get(f"{prefix}.{x}_scale")) for x in "kv"]
        if pair[0] is None or pair[1] is None:
            return None
        return _scalar(pair[0]), _scalar(pair[1])

    vocab = spec.vocab_size
    embedding = VocabularyRows([tensors["model.embed_tokens.weight"]], vocab)
    head = embedding if spec.tied_embeddings else VocabularyRows([tensors["lm_head.weight"]], vocab)
    ends = forward.EndWeights(embedding, read("model.norm.weight"), head)
    return StreamedModel(spec, ends, lambda i: forward.hf_block(spec, i, read, _stack), kv_scales)


def read_scale(tensors: Mapping[str, TensorInfo], weight: str, kind: str) -> float | None:
    """``weight_scale`` or ``input_scale`` beside a weight; the first must be there, or ``IntegrityError`` is raised."""
    info = tensors.get(weight.removesuffix("weight") + kind)
    if info is not None:
        return _scalar(info)
    if kind == "input_scale":
        return None
    raise IntegrityError("missing-tensor", f"{weight!r} is FP8 and has no {kind}.", next="Fetch the model again.")


def logit_error(checkpoint: StreamedModel, source: StreamedModel, prompts: list[list[int]]) -> float:
    """Largest absolute difference of any logit at any position; NaN when a logit is NaN.

    The source is rounded to BF16 first, so a right conversion to BF16 gives zero.
    """
    both = [forward.forward(m.spec, m.ends, m.blocks(), prompts, linear) for m in (checkpoint, source)]
    return float(np.max([np.max(np.abs(a - b)) for a, b in zip(*both, strict=True)]))


def _scalar(info: TensorInfo) -> float:
    value = read_array(info).astype(np.float32).reshape(-1)
    if value.size != 1 or not np.isfinite(value[0]) or value[0] <= 0:
        raise IntegrityError(
            "bad-scale", f"{info.file} holds {value[:3]!s} as {info.name!r}, which must be one number above zero."
        )
    return float(value[0])


def _stack(parts: list[Any]) -> Any:
    """Projections of one input, one below the other."""
    if not isinstance(parts[0], fp8.Fp8Matrix):
        return np.concatenate(parts)
    whole = np.concatenate([part.values for part in parts])
    ends = np.cumsum([0, *(len(part.values) for part in parts)])
    views = [
        fp8.Fp8Matrix(whole[a:b], part.weight_scale, part.input_scale)
        for part, a, b in zip(parts, ends, ends[1:], strict=False)
    ]
    return fp8.fuse(views, whole)
