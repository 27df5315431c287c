"""The scales that an FP8 source brings: no calibration is needed, only one scale for each group of linear layers.

Where the layers of a group have equal scales, their bytes are copied. Where not, the group takes the largest scale, and
the others are rounded a second time; what that costs is measured while it happens, and reported. The largest is the
only choice that cuts nothing off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nemobuild.convert.scales import BlockScales, GroupScales, KvScales, quant_groups
from nemobuild.errors import IntegrityError
from nemobuild.weights.safetensors import TensorInfo, read_array
from nemobuild.weights.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class SourceScales:
    """``blocks`` of the checkpoint to be; by Hugging Face name the scale that each weight has now, and the new one of
    those that have to be rounded again."""

    blocks: tuple[BlockScales, ...]
    weights: Mapping[str, float]
    requantized: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Requantized:
    """A tensor that was rounded a second time: ``relative_error`` is the root mean square of what that changed, as a
    part of the root mean square of the tensor."""

    tensor: str
    source_scale: float
    scale: float
    relative_error: float


def source_scales(snapshot: Snapshot) -> SourceScales:
    """Read the scales of an FP8 snapshot. Raises ``IntegrityError`` that names one that is not finite and positive."""
    found = snapshot.quantization
    assert found is not None
    weights = {name: _value(info) for name, info in found.weight_scales.items()}
    blocks: list[BlockScales] = []
    requantized: dict[str, float] = {}
    for i in range(len(snapshot.spec.blocks)):
        groups = {}
        for group, names in quant_groups(snapshot.spec, i).items():
            scale = max(weights[name] for name in names)
            requantized |= {name: scale for name in names if weights[name] != scale}
            inputs = [_value(found.input_scales[name]) for name in names] if found.static else []
            groups[group] = GroupScales(scale, max(inputs, default=None))
        kv = found.kv_scales.get(i)
        blocks.append(BlockScales(groups, None if kv is None else KvScales(_value(kv[0]), _value(kv[1]))))
    return SourceScales(tuple(blocks), weights, requantized)


def _value(info: TensorInfo) -> float:
    value = float(read_array(info).reshape(-1)[0])
    if not (math.isfinite(value) and value > 0):
        raise IntegrityError(
            "bad-scale",
            f"{info.file} holds {value!r} as {info.name!r}, which must be a number above zero.",
            why="A tensor under such a scale has no values.",
            next="Fetch the file again; if that does not help, the published weights are broken.",
        )
    return value
