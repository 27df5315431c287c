"""A TensorRT-LLM checkpoint folder, read back into whole weights for the CPU runtime and for verification.

Everything comes from the checkpoint's own ``config.json`` and tensors, by rules written down here a second time and
on purpose: nothing is shared with the converter, so a fault there shows as a refusal or as wrong text. Whatever the
ranks share (norms, duplicated KV heads) must be equal in all of them. Layout: TensorRT-LLM 1.0 to 1.2,
``models/modeling_utils.py`` and ``models/nemotron_nas``; in short:

* rank file = pipeline rank x tp + tensor rank; layer indices start at zero on every pipeline rank;
* ``qkv`` holds the rank's rows of q, k, v; with more ranks than KV heads, neighbouring ranks hold the same head;
* ``fc`` is the SiLU branch (the gate of Hugging Face), ``gate`` is the up projection;
* rows of the vocabulary are padded with zeros to a multiple of tp; an absent ``lm_head`` means tied embeddings;
* with FP8, a linear has E4M3 weights, a scale for them and one for its input, equal on all tensor ranks; attention has
  one scale for keys and values, or one of each, of which the larger counts.

Headers of all files and all scales are checked before the first weight is read; blocks are then loaded one by one.
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
from .fp8 import Fp8Matrix, decode, fuse

Floats = NDArray[np.float32]
_Expected = tuple[str, tuple[int, ...], tuple[str, ...]]

_EMBEDDING, _NORM, _HEAD = "transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"
_DTYPES = ("BF16", "F16", "F32")
_FP8_DTYPES = ("F8_E4M3", "I8")  # bytes that call themselves integers are viewed as E4M3, as in TensorRT-LLM
_WEIGHT_SCALE, _INPUT_SCALE = "weights_scaling_factor", "activation_scaling_factor"
_KV_SCALE, _K_SCALE, _V_SCALE = (f"{part}_cache_scaling_factor" for part in ("kv", "k", "v"))
_KV_RECIPROCAL = "kv_cache_rcp_scaling_factor"  # TensorRT-LLM computes it where it is absent
# Spellings of ModelOpt that TensorRT-LLM renames when it loads DeciLMForCausalLM.
_ALIASES = {".mlp.": ".ffn.", ".attn_replacing_linear.": ".attention.", ".mlp_replacing_linear.": ".ffn."}
# Tables that TensorRT-LLM computes itself and may save along.
_CONSTANTS = ("rotary_inv_freq", "rotary_cos_sin", "embed_positions", "embed_positions_for_gpt_attention")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: headers and scales read and checked, weights still on the disk."""

    folder: Path
    spec: ModelSpec
    config: CheckpointConfig
    ranks: tuple[dict[str, TensorInfo], ...]
    scales: tuple[dict[str, float], ...]
    """Scales of every pipeline stage by tensor name."""

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
        """Weights of block ``index`` (counted over the whole model), sharding undone: float32, or ``Fp8Matrix``."""
        block, (stage, prefix) = self.spec.blocks[index], self._place(index)
        ffn, hidden = f"{prefix}.{self.config.ffn_name}", self.spec.hidden_size
        parts: dict[str, Floats | Fp8Matrix] = {}
        if not isinstance(block.attention, NoOp):
            parts["attention_norm"] = self._replicated(stage, f"{prefix}.input_layernorm.weight")
        if isinstance(block.attention, Attention):
            qkv = self._qkv(stage, f"{prefix}.attention.qkv.weight", block.attention.kv_heads)
            parts["qkv"] = self._scaled(stage, f"{prefix}.attention.qkv", qkv)
            parts["o"] = self._linear(stage, f"{prefix}.attention.dense", "columns")
        elif isinstance(block.attention, Linear):
            parts["attention_linear"] = self._linear(stage, f"{prefix}.attention", "rows")
        if not isinstance(block.ffn, NoOp):
            parts["ffn_norm"] = self._replicated(stage, f"{prefix}.post_layernorm.weight")
        if isinstance(block.ffn, Mlp):
            gate_up = np.empty((2 * block.ffn.width, hidden), np.float32)
            halves = [
                self._scaled(stage, f"{ffn}.{name}", self._whole(stage, f"{ffn}.{name}.weight", "rows", into))
                for name, into in (("fc", gate_up[: block.ffn.width]), ("gate", gate_up[block.ffn.width :]))
            ]
            parts["gate_up"] = fuse(halves, gate_up)
            parts["down"] = self._linear(stage, f"{ffn}.proj", "columns")
        elif isinstance(block.ffn, Linear):
            parts["ffn_linear"] = self._linear(stage, ffn, "rows")
        return BlockWeights(**parts)

    def blocks(self) -> Iterator[BlockWeights]:
        """All blocks in order, each read when it is asked for."""
        return (self.block(index) for index in range(len(self.spec.blocks)))

    def kv_scale(self, index: int) -> float | None:
        """Scale of the keys and values of block ``index``; None where they are not FP8, or there are none."""
        if not self.config.fp8_kv or not isinstance(self.spec.blocks[index].attention, Attention):
            return None
        stage, prefix = self._place(index)
        scales = self.scales[stage]
        pair = [scales.get(f"{prefix}.attention.{name}") for name in (_K_SCALE, _V_SCALE)]
        if pair[0] is None or pair[1] is None:
            return scales[f"{prefix}.attention.{_KV_SCALE}"]
        return max(pair[0], pair[1])

    def _place(self, index: int) -> tuple[int, str]:
        """Pipeline rank and tensor prefix of a block."""
        for stage, layers in enumerate(self.config.stages):
            if index in layers:
                return stage, f"transformer.layers.{index - layers.start}"
        raise IndexError(index)

    def _shards(self, stage: int, name: str) -> list[TensorInfo]:
        tp = self.config.tp
        return [self.ranks[stage * tp + t][name] for t in range(tp)]

    def _linear(self, stage: int, module: str, layout: str) -> Floats | Fp8Matrix:
        return self._scaled(stage, module, self._whole(stage, f"{module}.weight", layout))

    def _scaled(self, stage: int, module: str, values: Floats) -> Floats | Fp8Matrix:
        """``values`` with the scales of their module, when it has any."""
        if not self.config.is_fp8(module):
            return values
        scales = self.scales[stage]
        return Fp8Matrix(values, scales[f"{module}.{_WEIGHT_SCALE}"], scales[f"{module}.{_INPUT_SCALE}"])

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
    """Read ``config.json``, the headers of all ranks of ``folder`` and its scales; check names, shapes and dtypes.

    Raises ``IntegrityError`` for anything missing, damaged, unknown or not supported, ``UsageError`` for a bad path.
    """
    config, spec = read_config(folder)
    ranks = tuple(_read_rank(folder, rank, config) for rank in range(config.tp * config.pp))
    spec = replace(spec, tied_embeddings=_HEAD not in ranks[-1])
    scales: list[dict[str, float]] = []
    for stage in range(config.pp):
        expected = {name: (shape, dtypes) for name, shape, dtypes in _expected(spec, config, stage)}
        tensor_ranks = ranks[stage * config.tp : (stage + 1) * config.tp]
        files = [folder / f"rank{stage * config.tp + t}.safetensors" for t in range(config.tp)]
        for file, tensors in zip(files, tensor_ranks, strict=True):
            _check_rank(file, tensors, expected)
        names = {name for tensors in tensor_ranks for name in tensors if name.endswith("_scaling_factor")}
        for file, tensors in zip(files, tensor_ranks, strict=True):
            if absent := sorted(names - tensors.keys()):  # some scales are optional, but not on one rank alone
                raise _bad(file, "missing-tensor", f"has no {absent[0]!r}, which another rank has")
        scales.append({name: _read_scale([tensors[name] for tensors in tensor_ranks]) for name in names})
    return Checkpoint(folder, spec, config, ranks, tuple(scales))


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


def _expected(spec: ModelSpec, config: CheckpointConfig, stage: int) -> Iterator[_Expected]:
    """Names, shapes and dtypes of what every file of a pipeline rank must hold."""
    tp, hidden, padded = config.tp, spec.hidden_size, -(-spec.vocab_size // config.tp)
    if stage == 0:
        vocab = spec.vocab_size
        shapes = {"copy": (vocab, hidden), "rows": (padded, hidden), "columns": (vocab, hidden // tp)}
        yield _EMBEDDING, shapes[config.embedding_layout], _DTYPES
    for local, index in enumerate(config.stages[stage]):
        block, prefix = spec.blocks[index], f"transformer.layers.{local}"
        ffn = f"{prefix}.{config.ffn_name}"
        if not isinstance(block.attention, NoOp):
            yield f"{prefix}.input_layernorm.weight", (hidden,), _DTYPES
        if isinstance(block.attention, Attention):
            rows = spec.query_width // tp + 2 * max(1, block.attention.kv_heads // tp) * spec.head_size
            yield from _expected_linear(config, f"{prefix}.attention.qkv", (rows, hidden))
            yield from _expected_linear(config, f"{prefix}.attention.dense", (hidden, spec.query_width // tp))
            if config.fp8_kv:
                yield f"{prefix}.attention.{_KV_SCALE}", (1,), ("F32",)
        elif isinstance(block.attention, Linear):
            yield from _expected_linear(config, f"{prefix}.attention", (hidden // tp, hidden))
        if not isinstance(block.ffn, NoOp):
            yield f"{prefix}.post_layernorm.weight", (hidden,), _DTYPES
        if isinstance(block.ffn, Mlp):
            if config.is_fp8(f"{ffn}.fc") != config.is_fp8(f"{ffn}.gate"):
                problem = f"excludes one of {ffn}.fc and {ffn}.gate, which are one matrix when the model runs"
                raise _bad(Path("config.json"), "bad-checkpoint-config", problem)
            yield from _expected_linear(config, f"{ffn}.fc", (block.ffn.width // tp, hidden))
            yield from _expected_linear(config, f"{ffn}.gate", (block.ffn.width // tp, hidden))
            yield from _expected_linear(config, f"{ffn}.proj", (hidden, block.ffn.width // tp))
        elif isinstance(block.ffn, Linear):
            yield from _expected_linear(config, ffn, (hidden // tp, hidden))
    if stage == config.pp - 1:
        yield _NORM, (hidden,), _DTYPES
        if not spec.tied_embeddings:
            yield _HEAD, (padded, hidden), _DTYPES


def _expected_linear(config: CheckpointConfig, module: str, shape: tuple[int, int]) -> Iterator[_Expected]:
    fp8 = config.is_fp8(module)
    yield f"{module}.weight", shape, _FP8_DTYPES if fp8 else _DTYPES
    for scale in (_WEIGHT_SCALE, _INPUT_SCALE) if fp8 else ():
        yield f"{module}.{scale}", (1,), ("F32",)


def _check_rank(
    file: Path, tensors: dict[str, TensorInfo], expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
) -> None:
    # Beside a KV scale others may stand, and one of keys and one of values may stand for it.
    optional = {
        name.replace(_KV_SCALE, other)
        for name in expected
        if name.endswith(_KV_SCALE)
        for other in (_K_SCALE, _V_SCALE, _KV_RECIPROCAL)
    }
    missing = [name for name in expected if name not in tensors]
    pairs = ({name.replace(_KV_SCALE, other) for other in (_K_SCALE, _V_SCALE)} for name in missing)
    missing = [
        n for n, pair in zip(missing, pairs, strict=True) if not (n.endswith(_KV_SCALE) and pair <= set(tensors))
    ]
    if missing:
        raise _bad(file, "missing-tensor", f"lacks {_some(missing)}")
    if surplus := [name for name in tensors if name not in expected and name not in optional]:
        raise _bad(file, "surplus-tensor", f"holds {_some(surplus)}, which the model has no place for")
    for name, info in tensors.items():
        shape, dtypes = expected.get(name, ((1,), ("F32",)))
        if info.shape != shape:
            raise _bad(file, "wrong-shape", f"holds {name!r} with shape {info.shape}, but config.json asks for {shape}")
        if info.dtype not in dtypes:
            raise _bad(file, "unsupported-dtype", f"holds {name!r} as {info.dtype}, not as {', '.join(dtypes)}")


def _read_scale(shards: list[TensorInfo]) -> float:
    """A scale, which must be the same on all tensor ranks: there is one for the whole tensor."""
    values = [read_array(shard) for shard in shards]
    for shard, value in zip(shards, values, strict=True):
        if not np.isfinite(value[0]) or value[0] <= 0:
            raise _bad(shard.file, "bad-scale", f"holds the scale {float(value[0])!r} as {shard.name!r}", "above zero")
        _require_equal(values[0], value, shards[0], shard, "the scale of the same tensor")
    return float(values[0][0])


def _read(info: TensorInfo) -> Floats:
    """The tensor in float32; E4M3 values are not multiplied by their scale."""
    if info.dtype not in _FP8_DTYPES:
        array: Floats = read_array(info).astype(np.float32, copy=False)
        return array
    values = decode(read_array(info))
    if np.isnan(values).any():
        raise _bad(info.file, "nan-weight", f"holds NaN in {info.name!r}", "a number everywhere")
    return values


def _require_equal(a: Floats, b: Floats, first: TensorInfo, other: TensorInfo, what: str) -> None:
    if not np.array_equal(a, b):
        raise _bad(other.file, "ranks-disagree", f"holds a {other.name!r} that differs from {first.file.name}", what)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bad(file: Path, code: str, problem: str, why: str = "") -> IntegrityError:
    reason = f"It must be {why}." if why else ""
    return IntegrityError(code, f"{file} {problem}.", why=reason, next="Convert the model again.")
