"""From the map of a BF16 conversion to that of an FP8 one.

What is quantised is decided in one place for both formats: a target whose sources all belong to one group of linear
layers becomes E4M3, and its scales follow it as tensors of their own. A source is never read for a scale; the bytes of
scale tensors come from the calibration, or from the scales that an FP8 source has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemobuild.convert.scales import BlockScales, block_of, group_of
from nemobuild.convert.tensor_map import ScaleRef, Target, TensorMap
from nemobuild.model.spec import ModelSpec

FLOAT8 = "F8_E4M3"


@dataclass(frozen=True, slots=True)
class ScaleNames:
    """How a format names scales: what takes the place of ``weight``, and where KV scales go.

    ``kv`` has (end of a weight's name, end of the scale's name, kind) and says after which weight they come.
    """

    weight: str
    input: str
    shape: tuple[int, ...]
    kv: tuple[tuple[str, str, str], ...]


def with_fp8(tensor_map: TensorMap, spec: ModelSpec, names: ScaleNames, *, kv: bool, static: bool) -> TensorMap:
    """``tensor_map`` with E4M3 linear layers and their scales; ``static`` False leaves the input scales out."""
    groups = group_of(spec)
    ranks = (
        tuple(t for target in rank for t in _quantized(target, groups, names, kv, static)) for rank in tensor_map.ranks
    )
    return TensorMap(tuple(ranks), tensor_map.copies)


def _quantized(target: Target, groups: dict[str, str], names: ScaleNames, kv: bool, static: bool) -> Iterator[Target]:
    found = {groups.get(piece.source or "") for piece in target.pieces}
    group = found.pop()
    if found or group is None:
        yield target
        return
    yield replace(target, dtype=FLOAT8, pieces=tuple(replace(piece, group=group) for piece in target.pieces))
    block, stem = block_of(group), target.name.removesuffix("weight")
    yield Target(stem + names.weight, "F32", names.shape, (), ScaleRef(block, "weight", group))
    if static:
        yield Target(stem + names.input, "F32", names.shape, (), ScaleRef(block, "input", group))
    for weight, scale, kind in names.kv if kv else ():
        if target.name.endswith(weight):
            yield Target(target.name.removesuffix(weight) + scale, "F32", names.shape, (), ScaleRef(block, kind))


def scale_value(ref: ScaleRef, scales: BlockScales, *, clamp_kv: bool) -> float:
    """The number that the tensor of ``ref`` holds. ``scales`` was checked to have it.

    With ``clamp_kv`` KV scales are at least 1: NVIDIA ModelOpt's exporter of this form writes them so, it is all that
    the runtimes up to TensorRT-LLM 1.2 were tried with, and some readers take any scale for 1. It costs what lies below
    E4M3's smallest normal value, 2**-6: little for the keys and values of large models, much for those of small ones.
    """
    if ref.group is not None:
        value = scales.groups[ref.group].weight if ref.kind == "weight" else scales.groups[ref.group].input
    else:
        assert scales.kv is not None
        both = {"key": scales.kv.key, "value": scales.kv.value, "kv": max(scales.kv.key, scales.kv.value)}
        value = max(both[ref.kind], 1.0) if clamp_kv else both[ref.kind]
    assert value is not None
    return value
