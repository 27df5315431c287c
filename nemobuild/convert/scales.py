"""Scales of an FP8 model, and which weights share one.

A *group* is a set of linear layers that read the same input: they get one weight scale and one input scale, so that
every reader can fuse them without rounding twice. The runtime fuses q, k and v always and gate and up by default.
The names are those that ``model.forward`` gives its linear layers; embedding, ``lm_head`` and norms stay as they are.

Scales are float32 numbers held in Python floats; JSON keeps them exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemobuild.errors import IntegrityError
from nemobuild.model.spec import Attention, Linear, Mlp, ModelSpec


@dataclass(frozen=True, slots=True)
class GroupScales:
    """Largest magnitude / 448 of the weights and of the input; ``input`` None: scaled while running."""

    weight: float
    input: float | None


@dataclass(frozen=True, slots=True)
class KvScales:
    """Largest magnitude / 448 of the keys after RoPE and of the values, not clamped."""

    key: float
    value: float


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Scales of one block by group name; ``kv`` None: no attention, or a KV cache that is not FP8."""

    groups: Mapping[str, GroupScales]
    kv: KvScales | None


def quant_groups(spec: ModelSpec, i: int) -> dict[str, tuple[str, ...]]:
    """Group name -> Hugging Face names of its weights, of block ``i``, in the order in which they are stacked."""
    block, prefix = spec.blocks[i], f"model.layers.{i}"
    parts: dict[str, tuple[str, ...]] = {}
    if isinstance(block.attention, Attention):
        parts["qkv"] = tuple(f"self_attn.{x}_proj" for x in "qkv")
        parts["o"] = ("self_attn.o_proj",)
    elif isinstance(block.attention, Linear):
        parts["attention_linear"] = ("self_attn.linear_attn",)
    if isinstance(block.ffn, Mlp):
        parts["gate_up"] = ("mlp.gate_proj", "mlp.up_proj")
        parts["down"] = ("mlp.down_proj",)
    elif isinstance(block.ffn, Linear):
        parts["ffn_linear"] = ("mlp.linear_mlp",)
    return {f"{prefix}.{group}": tuple(f"{prefix}.{n}.weight" for n in names) for group, names in parts.items()}


def group_of(spec: ModelSpec) -> dict[str, str]:
    """Hugging Face weight name -> group, of every weight that is quantised."""
    return {
        name: group for i in range(len(spec.blocks)) for group, names in quant_groups(spec, i).items() for name in names
    }


def block_of(group: str) -> int:
    """Index of the block that a group belongs to."""
    return int(group.split(".")[2])


def check_scales(scales: BlockScales, spec: ModelSpec, i: int, *, static: bool, kv: bool) -> None:
    """Raise ``IntegrityError`` unless ``scales`` has exactly the groups of block ``i``, finite and positive.

    ``static`` asks for input scales, ``kv`` for KV scales of blocks with attention.
    """
    expected = set(quant_groups(spec, i))
    if set(scales.groups) != expected:
        odd = sorted(set(scales.groups) ^ expected)[0]
        raise _bad(f"block {i} has no scales, or unexpected ones, for {odd!r}")
    for group, pair in scales.groups.items():
        _check(f"weight scale of {group!r}", pair.weight)
        if pair.input is not None:
            _check(f"input scale of {group!r}", pair.input)
        elif static:
            raise _bad(f"{group!r} has no input scale")
    if scales.kv is not None:
        _check(f"key scale of block {i}", scales.kv.key)
        _check(f"value scale of block {i}", scales.kv.value)
    elif kv and isinstance(spec.blocks[i].attention, Attention):
        raise _bad(f"block {i} has no KV scales")


def dump_scales(blocks: Sequence[BlockScales]) -> str:
    """JSON of the scales of all blocks; ``load_scales`` gives back equal ones."""
    return json.dumps([block_to_json(block) for block in blocks], indent=1) + "\n"


def load_scales(text: str, source: str = "scales") -> list[BlockScales]:
    """The scales that ``dump_scales`` wrote. Raises ``IntegrityError``, naming ``source``."""
    try:
        return [block_from_json(value) for value in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _bad(f"{source} is not a list of the scales of blocks ({error!r})") from error


def block_to_json(block: BlockScales) -> dict[str, Any]:
    groups = {name: {"weight": pair.weight, "input": pair.input} for name, pair in block.groups.items()}
    return {"groups": groups, "kv": None if block.kv is None else {"key": block.kv.key, "value": block.kv.value}}


def block_from_json(value: Mapping[str, Any]) -> BlockScales:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else than ``block_to_json`` makes."""
    groups = {
        str(name): GroupScales(_float32(pair["weight"]), None if pair["input"] is None else _float32(pair["input"]))
        for name, pair in value["groups"].items()
    }
    kv = value["kv"]
    return BlockScales(groups, None if kv is None else KvScales(_float32(kv["key"]), _float32(kv["value"])))


def _float32(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or float(np.float32(value)) != value:
        raise ValueError(f"{value!r} is not a float32 number")
    return float(value)


def _check(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0) or float(np.float32(value)) != value:
        raise _bad(f"the {what} is {value!r}, not a positive float32 number")


def _bad(problem: str) -> IntegrityError:
    return IntegrityError(
        "bad-scales",
        f"The scales cannot be used: {problem}.",
        why="FP8 weights and activations are worthless under a wrong scale.",
        next="Calibrate again.",
    )
