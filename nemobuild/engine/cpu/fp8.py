"""Per-tensor FP8 (E4M3) as a GPU multiplies it: activations rounded by their static scale, and sums scaled at the end.

A matrix is held as the E4M3 values themselves in float32, not multiplied by its scale. The product of two E4M3 values
is exact in float32, so what remains different from a GPU is the order of the sum alone, and the two scales are applied
once, to the result. The KV cache likewise holds what an FP8 cache would give back.

NumPy has no E4M3. Rounding to it is done in float32: adding and taking away a number 2**20 times as large as a
value's power of two leaves three bits behind the leading one, rounded to nearest even, which is what E4M3 keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...model.forward import KvCache
from ...model.spec import Attention, Block, ModelSpec
from . import panels
from .panels import Panels

Floats = NDArray[np.float32]

MAX = 448.0
_LEAST_NORMAL = np.float32(2.0**-6)  # below it the step stays at 2**-9
_EXPONENT = np.uint32(0x7F800000)
_SHIFT = np.float32(1.5 * 2**20)
_LEAST_SCALE = np.float32(2.0**-126)  # keeps an all-zero row from dividing by zero


def _decode_table() -> Floats:
    """Values of the 256 codes: sign, four bits of exponent (bias 7), three of mantissa; S.1111.111 is NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[127] = np.nan
    both: Floats = np.concatenate((values, -values)).astype(np.float32)
    return both


DECODED = _decode_table()


def decode(codes: NDArray[np.uint8]) -> Floats:
    """float32 values of E4M3 bytes, of the same shape."""
    found: Floats = DECODED[codes.view(np.uint8)]
    return found


def round_e4m3(x: Floats) -> Floats:
    """The E4M3 value nearest to each of ``x`` (ties to even), as float32; beyond +-448 the largest, NaN stays."""
    x = np.clip(x, -MAX, MAX)
    step = (x.view(np.uint32) & _EXPONENT).view(np.float32)
    np.maximum(step, _LEAST_NORMAL, out=step)
    step *= _SHIFT
    x += step
    x -= step
    return x


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix (out, in) of E4M3 ``values``, to be multiplied by ``weight_scale``.

    ``input_scale`` is that of its activations; None takes it from the rows at hand (amax / 448).
    """

    values: Floats | Panels
    weight_scale: float
    input_scale: float | None

    def dequantised(self) -> Floats:
        """The weights in float32."""
        assert not isinstance(self.values, Panels)
        return self.values * np.float32(self.weight_scale)


def linear(name: str, x: Floats, weight: Fp8Matrix | Panels | Floats) -> Floats:
    """``LinearFn`` for all forms in which weights are held: x (N, in) -> (N, out)."""
    if not isinstance(weight, Fp8Matrix):
        return panels.linear(name, x, weight)
    scale = activation_scale(x, weight)
    result = panels.linear(name, round_e4m3(x / scale), weight.values)
    result *= scale * np.float32(weight.weight_scale)
    return result


def activation_scale(x: Floats, weight: Fp8Matrix) -> np.float32:
    """What ``x`` is divided by before it is rounded."""
    if weight.input_scale is not None:
        return np.float32(weight.input_scale)
    return np.float32(max(np.abs(x).max(initial=0) / np.float32(MAX), _LEAST_SCALE))


def fuse(halves: Sequence[Floats | Fp8Matrix], whole: Floats) -> Floats | Fp8Matrix:
    """``whole``, of which ``halves`` are views one below the other, with one scale where they are FP8.

    Unequal scales become the larger one and the values are rounded again, as in TensorRT-LLM's fused MLP.
    """
    fp8 = [half for half in halves if isinstance(half, Fp8Matrix)]
    if not fp8:
        return whole
    scale = max(half.weight_scale for half in fp8)
    for half in fp8:
        if half.weight_scale != scale:
            assert not isinstance(half.values, Panels)
            half.values[:] = round_e4m3(half.dequantised() / np.float32(scale))
    inputs = [half.input_scale for half in fp8 if half.input_scale is not None]
    return Fp8Matrix(whole, scale, max(inputs) if len(inputs) == len(fp8) else None)


class Fp8Rows:
    """Keys or values of a KV cache: what is written is rounded to E4M3 by ``scale``, what is read is multiplied again.

    Held in float32, since every step reads all rows of a sequence and writes one.
    """

    def __init__(self, shape: tuple[int, ...], scale: float) -> None:
        self.rows: Floats = np.zeros(shape, np.float32)
        self.scale = np.float32(scale)
        self.observe: Callable[[Floats, np.float32], None] | None = None
        """Called with the magnitudes that are written, and the scale."""

    def __setitem__(self, where: Any, values: Floats) -> None:
        if self.observe is not None:
            self.observe(np.abs(values), self.scale)
        self.rows[where] = round_e4m3(values / self.scale) * self.scale

    def __getitem__(self, where: Any) -> Floats:
        found: Floats = self.rows[where]
        return found


def new_cache(spec: ModelSpec, block: Block, rows: int, key_scale: float, value_scale: float | None = None) -> KvCache:
    """An empty FP8 cache of ``rows`` tokens for ``block``, which has attention; one scale serves both by default."""
    assert isinstance(block.attention, Attention)
    shape = (block.attention.kv_heads, rows, spec.head_size)
    return KvCache(Fp8Rows(shape, key_scale), Fp8Rows(shape, key_scale if value_scale is None else value_scale))
