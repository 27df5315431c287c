"""A TensorRT-LLM checkpoint folder, read back into whole float32 weights for the CPU runtime and for verification.

Everything comes from the checkpoint's own ``config.json`` and tensors, by rules written down here a second time and
on purpose: nothing is shared with the converter, so a fault there shows as a refusal or as wrong text. Whatever the
ranks share (norms, duplicated KV heads) must be equal in all of them. Layout: TensorRT-LLM 1.0 to 1.2,
``models/modeling_utils.py`` and ``models/nemotron_nas``; in short:

* rank file = pipeline rank x tp + tensor rank; layer indices start at zero on every pipeline rank;
* ``qkv`` holds the rank's rows of q, k, v; with more ranks than KV heads, neighbouring ranks hold the same head;
* ``fc`` is the SiLU branch (the gate of Hugging Face), ``gate`` is the up projection;
* rows of the vocabulary are padded with zeros to a multiple of tp; an absent ``lm_head`` means tied embeddings.

Headers of all files are checked before the first weight is read; blocks are then loaded one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import IntegrityError
from ...model.forward import BlockWeights, EndWeights
from ...model.spec import Attention, Linear, Mlp, ModelSpec, NoOp
from ...weights.safetensors import TensorInfo, read_array, read_header
from .checkpoint_config import CheckpointConfig, read_config

Floats = NDArray[np.float32]

_EMBEDDING, _NORM, _HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"
_DTYPES = ("BF16", "F16", "F32")
# Spellings of ModelOpt that TensorRT-LLM renames when it loads DeciLMForCausalLM.
_ALIASES = {".mlp.": ".ffn.", ".attn_replacing_linear.": ".attention.", ".mlp_replacing_linear.": ".ffn."}
# Tables that TensorRT-LLM computes itself and may save along.
_CONSTANTS = ("rotary_inv_freq", "rotary_cos_sin", "embed_positions", "embed_positions_for_gpt_attention")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: headers read and checked, weights still on the disk."""

    folder: Path
    spec: ModelSpec
    config: CheckpointConfig
    ranks: tuple[dict[str, TensorInfo], ...]

    def ends(self) -> EndWeights:
        """Embedding, final norm and head, float32. One array serves as embedding and head where they are equal."""
        vocab = self.spec.vocab_size
        embedding = self._whole(0, _EMBEDDING, self.config.embedding_layout)[:vocab]
        last = self.config.pp - 1
        norm = self._replicated(last, _NORM)
        if self.spec.tied_embeddings:
            return EndWeights(embedding, norm, embedding)
        head = self._whole(last, _HEAD, "rows")[:vocab]
        return EndWeights(embedding, norm, embedding if np.array_equal(head, embedding) else head)

    def block(self, index: int) -> BlockWeights:
        """Weights of block ``index`` (counted over the whole model), float32, sharding undone."""
        block, (stage, prefix) = self.spec.blocks[index], self._place(index)
        ffn, hidden = f"{prefix}.{self.config.ffn_name}", self.spec.hidden_size
        parts: dict[str, Floats] = {}
        if not isinstance(block.attention, NoOp):
            parts["attention_norm"] = self._replicated(stage, f"{prefix}.input_layernorm.weight")
        if isinstance(block.attention, Attention):
            parts["qkv"] = self._qkv(stage, f"{prefix}.attention.qkv.weight", block.attention.kv_heads)
            parts["o"] = self._whole(stage, f"{prefix}.attention.dense.weight", "columns")
        elif isinstance(block.attention, Linear):
            parts["attention_linear"] = self._whole(stage, f"{prefix}.attention.weight", "rows")
        if not isinstance(block.ffn, NoOp):
            parts["ffn_norm"] = self._replicated(stage, f"{prefix}.post_layernorm.weight")
        if isinstance(block.ffn, Mlp):
            gate_up = np.empty((2 * block.ffn.width, hidden), np.float32)
            self._whole(stage, f"{ffn}.fc.weight", "rows", gate_up[: block.ffn.width])
            self._whole(stage, f"{ffn}.gate.weight", "rows", gate_up[block.ffn.width :])
            parts |= {"gate_up": gate_up, "down": self._whole(stage, f"{ffn}.proj.weight", "columns")}
        elif isinstance(block.ffn, Linear):
            parts["ffn_linear"] = self._whole(stage, f"{ffn}.weight", "rows")
        return BlockWeights(**parts)

    def blocks(self) -> Iterator[BlockWeights]:
        """All blocks in order, each read when it is asked for."""
        return (self.block(index) for index in range(len(self.spec.blocks)))

    def _place(self, index: int) -> tuple[int, str]:
        """Pipeline rank and tensor prefix of a block."""
        for stage, layers in enumerate(self.config.stages):
            if index in layers:
                return stage, f"transformer.layers.{index - layers.start}"
        raise IndexError(index)

    def _shards(self, stage: int, name: str) -> list[TensorInfo]:
        tp = self.config.tp
        return [self.ranks[stage * tp + t][name] for t in range(tp)]

    def _whole(self, stage: int, name: str, layout: str, into: Floats | None = None) -> Floats:
        """The shards of all tensor ranks side by side (``rows``, ``columns``), or the first one (``copy``)."""
        shards = self._shards(stage, name)
        if layout == "copy" or (len(shards) == 1 and into is None):
            return _read(shards[0])
        rows, columns = shards[0].shape
        along_rows = layout == "rows"
        if into is None:
            shape = (rows * len(shards), columns) if along_rows else (rows, columns * len(shards))
            into = np.empty(shape, np.float32)
        for t, shard in enumerate(shards):
            if along_rows:
                into[t * rows : (t + 1) * rows] = _read(shard)
            else:
                into[:, t * columns : (t + 1) * columns] = _read(shard)
        return into

    def _replicated(self, stage: int, name: str) -> Floats:
        first, *others = self._shards(stage, name)
        array = _read(first)
        for other in others:
            _require_equal(array, _read(other), first, other, "a copy of the same norm")
        return array

    def _qkv(self, stage: int, name: str, kv_heads: int) -> Floats:
        tp, size, width = self.config.tp, self.spec.head_size, self.spec.query_width
        share, local_heads = width // tp, max(1, kv_heads // tp)
        whole = np.empty((width + 2 * kv_heads * size, self.spec.hidden_size), np.float32)
        keys, values = whole[width : width + kv_heads * size], whole[width + kv_heads * size :]
        shards = self._shards(stage, name)
        for t, shard in enumerate(shards):
            local = _read(shard)
            whole[t * share : (t + 1) * share] = local[:share]
            first = t * kv_heads // tp
            rows = slice(first * size, (first + local_heads) * size)
            repeated = t > 0 and (t - 1) * kv_heads // tp == first
            for target, part in zip((keys, values), np.split(local[share:], 2), strict=True):
                if repeated:
                    _require_equal(target[rows], part, shards[t - 1], shard, "a copy of the same KV head")
                target[rows] = part
        return whole


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json`` and the headers of all ranks of ``folder``, and check names, shapes and dtypes.

    Raises ``IntegrityError`` for anything missing, damaged, unknown or not supported, ``UsageError`` for a bad path.
    """
    config, spec = read_config(folder)
    ranks = tuple(_read_rank(folder, rank, config) for rank in range(config.tp * config.pp))
    spec = replace(spec, tied_embeddings=_HEAD not in ranks[-1])
    for rank, tensors in enumerate(ranks):
        _check_rank(folder, rank, tensors, dict(_expected(spec, config, rank // config.tp)))
    return Checkpoint(folder, spec, config, ranks)


def _read_rank(folder: Path, rank: int, config: CheckpointConfig) -> dict[str, TensorInfo]:
    """Tensors of a rank file by TensorRT-LLM's own names, without constants."""
    file = folder / f"rank{rank}.safetensors"
    if not file.is_file():
        raise IntegrityError(
            "missing-rank-file",
            f"{file} does not exist.",
            why=f"config.json speaks of tp {config.tp} x pp {config.pp} = {config.tp * config.pp} ranks.",
            next="Convert the model again.",
        )
    tensors: dict[str, TensorInfo] = {}
    for given, info in read_header(file).items():
        if given.rpartition(".")[2] in _CONSTANTS:
            continue
        name = given
        if config.ffn_name == "ffn":
            for alias, own in _ALIASES.items():
                name = name.replace(alias, own)
        if name in tensors:
            raise _bad(file, "duplicate-tensor", f"holds {name!r} under two names")
        tensors[name] = info
    return tensors


def _expected(spec: ModelSpec, config: CheckpointConfig, stage: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes that every file of a pipeline rank must hold."""
    tp, hidden, padded = config.tp, spec.hidden_size, -(-spec.vocab_size // config.tp)
    if stage == 0:
        vocab = spec.vocab_size
        shapes = {"copy": (vocab, hidden), "rows": (padded, hidden), "columns": (vocab, hidden // tp)}
        yield _EMBEDDING, shapes[config.embedding_layout]
    for local, index in enumerate(config.stages[stage]):
        block, prefix = spec.blocks[index], f"transformer.layers.{local}"
        if not isinstance(block.attention, NoOp):
            yield f"{prefix}.input_layernorm.weight", (hidden,)
        if isinstance(block.attention, Attention):
            rows = spec.query_width // tp + 2 * max(1, block.attention.kv_heads // tp) * spec.head_size
            yield f"{prefix}.attention.qkv.weight", (rows, hidden)
            yield f"{prefix}.attention.dense.weight", (hidden, spec.query_width // tp)
        elif isinstance(block.attention, Linear):
            yield f"{prefix}.attention.weight", (hidden // tp, hidden)
        if not isinstance(block.ffn, NoOp):
            yield f"{prefix}.post_layernorm.weight", (hidden,)
        if isinstance(block.ffn, Mlp):
            yield f"{prefix}.{config.ffn_name}.fc.weight", (block.ffn.width // tp, hidden)
            yield f"{prefix}.{config.ffn_name}.gate.weight", (block.ffn.width // tp, hidden)
            yield f"{prefix}.{config.ffn_name}.proj.weight", (hidden, block.ffn.width // tp)
        elif isinstance(block.ffn, Linear):
            yield f"{prefix}.{config.ffn_name}.weight", (hidden // tp, hidden)
    if stage == config.pp - 1:
        yield _NORM, (hidden,)
        if not spec.tied_embeddings:
            yield _HEAD, (padded, hidden)


def _check_rank(folder: Path, rank: int, tensors: dict[str, TensorInfo], expected: dict[str, tuple[int, ...]]) -> None:
    file = folder / f"rank{rank}.safetensors"
    if missing := [name for name in expected if name not in tensors]:
        raise _bad(file, "missing-tensor", f"lacks {_some(missing)}")
    if surplus := [name for name in tensors if name not in expected]:
        raise _bad(file, "surplus-tensor", f"holds {_some(surplus)}, which the model has no place for")
    for name, shape in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise _bad(file, "wrong-shape", f"holds {name!r} with shape {info.shape}, but config.json asks for {shape}")
        if info.dtype not in _DTYPES:
            raise _bad(file, "unsupported-dtype", f"holds {name!r} as {info.dtype}, not as {', '.join(_DTYPES)}")


def _read(info: TensorInfo) -> Floats:
    # The place where FP8 weights will be multiplied by their scales.
    array: Floats = read_array(info).astype(np.float32, copy=False)
    return array


def _require_equal(a: Floats, b: Floats, first: TensorInfo, other: TensorInfo, what: str) -> None:
    if not np.array_equal(a, b):
        raise _bad(other.file, "ranks-disagree", f"holds a {other.name!r} that differs from {first.file.name}", what)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bad(file: Path, code: str, problem: str, why: str = "") -> IntegrityError:
    reason = f"It must be {why}." if why else ""
    return IntegrityError(code, f"{file} {problem}.", why=reason, next="Convert the model again.")
