"""One source tensor against all its places in a checkpoint: equal bits where it was copied, near enough where cast.

E4M3 keeps three bits behind the leading one, so a weight may be off by half a step: 2**(e - 4) x scale in the binade
of 2**e x scale, and never less than 2**-10 x scale. An error beyond that is a fault, whatever its size. A cast by way
of BF16, as in some exporters, adds a sixteenth of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.verify_models import read_scale, rounded_bits
from nemobuild.convert.verify_places import Layout, Place, Scale
from nemobuild.engine.cpu.fp8 import decode
from nemobuild.weights.quantized import FLOAT8
from nemobuild.weights.safetensors import TensorInfo, read_array

ROW_BLOCK_BYTES = 4 << 20
HALF_STEPS_ALLOWED = 1 + 1 / 16 + 1e-3

Array = NDArray[Any]


@dataclass(slots=True)
class Difference:
    """What was found at one place. Counts of values; ``where`` is the first wrong one."""

    place: Place
    wrong: int = 0
    where: str = ""
    values: int = 0
    squared_error: float = 0.0
    squared: float = 0.0
    half_steps: float = 0.0
    """Largest error over half a step of E4M3."""

    @property
    def exact(self) -> bool:
        return not self.place.scale


@dataclass(frozen=True, slots=True)
class WeightError:
    """Of one FP8 tensor: root mean square of error over that of the weights, and the largest error in half steps."""

    where: str
    group: str
    error: float
    half_steps: float


@dataclass(frozen=True, slots=True)
class Source:
    """Tensors of the source by name, and the scales beside those that are FP8 already."""

    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, TensorInfo] = field(default_factory=dict)

    def bits(self, name: str, rows: tuple[int, int]) -> Array:
        """BF16 bits of rows of a tensor, rounded."""
        return rounded_bits(self.tensors[name], rows)

    def values(self, name: str, rows: tuple[int, int]) -> Array:
        """Rows of a tensor in float32, FP8 multiplied by its scale."""
        info = self.tensors[name]
        array = read_array(info, rows=rows if len(info.shape) > 1 else None)
        if info.dtype != FLOAT8:
            return array.astype(np.float32, copy=False)
        return decode(array) * np.float32(read_scale(self.scales, name, "weight_scale") or 0)


def compare_source(
    source: Source, name: str, places: Sequence[Place], layout: Layout, scales: Mapping[tuple[int, str], float]
) -> list[Difference]:
    """Walk a source tensor once, by blocks of rows, and compare each with all its places."""
    info = source.tensors[name]
    rows, columns = info.shape if len(info.shape) == 2 else (1, info.shape[0])
    step = max(1, ROW_BLOCK_BYTES * rows // max(1, info.nbytes))
    differences = [Difference(place) for place in places]
    for start in range(0, rows if places else 0, step):
        end = min(start + step, rows)
        bits = values = None
        for difference in differences:
            place = difference.place
            r0, r1 = max(start, place.rows[0]), min(end, place.rows[1])
            if r0 >= r1:
                continue
            at, part = place.at + r0 - place.rows[0], (slice(r0 - start, r1 - start), slice(*place.columns))
            tensor = layout.tensors[place.rank][place.name]
            if place.scale:
                values = source.values(name, (start, end)) if values is None else values
                codes = read_array(tensor, rows=(at, at + r1 - r0))
                wrong = _compare_fp8(difference, codes, values[part], np.float32(scales[place.rank, place.scale]))
            else:
                if bits is None:
                    bits = source.bits(name, (start, end)).reshape(end - start, columns)
                found = rounded_bits(tensor, (at, at + r1 - r0)).reshape(r1 - r0, -1)
                wrong = found != bits[part]
            count = int(np.count_nonzero(wrong))
            if count and not difference.wrong:
                row, column = np.argwhere(wrong)[0]
                difference.where = f"[{at + row}, {column}]" if len(tensor.shape) == 2 else f"[{column}]"
            difference.wrong += count
            difference.values += wrong.size
    return differences


def _compare_fp8(difference: Difference, codes: Array, values: Array, scale: np.float32) -> Array:
    """Add to ``difference``; which values are further off than rounding explains. NaN always is."""
    with np.errstate(over="ignore", invalid="ignore"):
        units = values / scale
        error = np.abs(decode(codes) - units)
        half_step = np.maximum((np.abs(units).view(np.uint32) & 0x7F800000).view(np.float32), np.float32(2.0**-6)) / 16
        half_steps = error / half_step
        difference.squared_error += float(np.square(error).sum(dtype=np.float64)) * float(scale) ** 2
    difference.squared += float(np.square(values).sum(dtype=np.float64))
    difference.half_steps = float(np.maximum(difference.half_steps, half_steps.max(initial=0)))
    wrong: Array = ~(half_steps <= HALF_STEPS_ALLOWED)
    return wrong


def weight_errors(differences: Sequence[Difference], layout: Layout) -> tuple[WeightError, ...]:
    """One for every FP8 tensor, the worst first; places of one tensor (q, k and v) are taken together."""
    together: dict[tuple[int, str], list[Difference]] = {}
    for difference in differences:
        if difference.place.scale and difference.values:
            together.setdefault((difference.place.rank, difference.place.name), []).append(difference)
    errors = []
    for (rank, name), parts in together.items():
        squared = sum(part.squared for part in parts)
        error = (sum(part.squared_error for part in parts) / squared) ** 0.5 if squared else 0.0
        half_steps = max(part.half_steps for part in parts)
        errors.append(WeightError(layout.label(rank, name), parts[0].place.group, error, half_steps))
    errors.sort(key=lambda e: (-e.error if e.error == e.error else -np.inf, -e.half_steps))
    return tuple(errors)


def check_scales(layout: Layout) -> tuple[dict[tuple[int, str], float], list[tuple[str, str]]]:
    """Usable scales by (rank, name), and (where, what) of each that is absent, malformed, not positive or unequal."""
    usable: dict[tuple[int, str], float] = {}
    faults: list[tuple[str, str]] = []
    groups: dict[str, Scale] = {}
    for scale in layout.scales:
        where, info = layout.label(scale.rank, scale.name), layout.tensors[scale.rank].get(scale.name)
        if info is None:
            if not scale.optional:
                faults.append((where, "The scale is not there."))
            continue
        if info.dtype != "F32" or info.shape not in layout.scale_shapes:
            faults.append((where, f"The scale is {info.dtype} of shape {info.shape}, not one F32 number."))
            continue
        value = float(read_array(info).reshape(-1)[0])
        if not (np.isfinite(value) and value > 0):
            faults.append((where, f"The scale is {value!r}, not a number above zero."))
            continue
        usable[scale.rank, scale.name] = value
        first = groups.setdefault(scale.group, scale)
        if (other := usable[first.rank, first.name]) != value:
            label = layout.label(first.rank, first.name)
            faults.append((where, f"The scale is {value:.9g}, that of {label} is {other:.9g}; they must be equal."))
    return usable, faults + _kv_contradictions(layout, usable)


def _kv_contradictions(layout: Layout, usable: Mapping[tuple[int, str], float]) -> list[tuple[str, str]]:
    """Where the one scale that a TensorRT-LLM reader takes for a KV cache is not the larger one of both beside it."""
    faults = []
    for (rank, name), value in usable.items():
        stem, found, _ = name.partition("kv_cache_scaling_factor")
        both = [usable.get((rank, f"{stem}{kind}_cache_scaling_factor"), 0.0) for kind in "kv"]
        if found and all(both) and value != max(both):
            what = (
                f"The scale is {value:.9g}, the larger one of keys and values is {max(both):.9g}; they must be equal."
            )
            faults.append((layout.label(rank, name), what))
    return faults


def dirty_padding(layout: Layout, ranks: range, vocab: int, usable: set[tuple[int, str]]) -> Iterator[str]:
    """Where rows beyond the vocabulary are not zero, of the last pipeline stage's ``ranks``."""
    name = "lm_head.weight"
    for t, rank in enumerate(ranks):
        if (rank, name) in usable:
            info = layout.tensors[rank][name]
            held = min(max(vocab - t * info.shape[0], 0), info.shape[0])
            if rounded_bits(info, (held, info.shape[0])).any():
                yield layout.label(rank, name)
