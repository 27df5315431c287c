"""Casting weights to E4M3 by table look-up, and the scales that this needs.

A BF16 or F16 tensor under one scale has only 65,536 possible inputs, so the cast, with its division, rounding and
saturation, is done once for each of them and looked up for all others. For the same reason the largest magnitude is
an integer maximum: without the sign, the order of the bits is the order of the values.

Bytes are ``e4m3(float32(w) / scale)``, as in the TensorRT-LLM form of NVIDIA ModelOpt; its Hugging Face form rounds the
quotient to BF16 first and may be one step away. Both of our formats hold the same bytes, so that one converts to the
other without loss.

Rule for a tensor of zeros: scale 1.0, since any is right and zero would not be.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.bf16 import Buffers, finite_bits, largest_bits
from nemobuild.errors import IntegrityError
from nemobuild.model.e4m3 import DECODE, LARGEST, decode, encode
from nemobuild.weights.safetensors import ITEM_BYTES, TensorInfo, bf16_to_float32

FLOAT8 = "F8_E4M3"
# Indices of this many items stay in the cache.
_LOOKUP_ITEMS = 1 << 15
# The largest weight over its own scale may come out one float32 step above 448.
_ROUNDING = 1 + 2**-20
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)

Array = NDArray[Any]


def scale_of(amax: float) -> float:
    """``amax / 448`` in float32; 1.0 for 0, and never subnormal, since GPUs may flush such a scale to zero."""
    if amax == 0:
        return 1.0
    return max(float(np.float32(amax) / np.float32(LARGEST)), _SMALLEST_SCALE)


def amax_of(data: Array, dtype: str) -> float:
    """Largest magnitude in the bits of BF16 (``<u2``), F16, F32 or E4M3 (``u1``) data; Inf or NaN if it holds one."""
    return magnitude(largest_bits(data, dtype), dtype) if data.size else 0.0


def magnitude(bits: int, dtype: str) -> float:
    """The value of a bit pattern without sign."""
    if dtype == FLOAT8:
        return float(DECODE[bits])
    if dtype == "BF16":
        bits, dtype = bits << 16, "F32"
    unsigned, real = {"F16": ("<u2", "<f2"), "F32": ("<u4", "<f4")}[dtype]
    return float(np.array([bits], unsigned).view(real)[0])


@lru_cache(maxsize=8)
def cast_table(dtype: str, scale: float, source_scale: float = 1.0) -> NDArray[np.uint8]:
    """Code of every bit pattern of ``dtype`` (BF16, F16: 65,536; E4M3 under ``source_scale``: 256) under ``scale``."""
    if dtype == "BF16":
        values = bf16_to_float32(np.arange(1 << 16, dtype=np.uint16))
    elif dtype == "F16":
        values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    elif dtype == FLOAT8:
        if scale == source_scale:
            return np.arange(256, dtype=np.uint8)
        values = decode(np.arange(256), source_scale)
    else:
        raise ValueError(dtype)
    return encode(values, scale)


def fp8_codes(
    raw: Array, source: TensorInfo, first_element: int, scale: float, source_scale: float, buffers: Buffers
) -> tuple[Array, bool]:
    """E4M3 codes (uint8, flat) of the bytes ``raw`` under ``scale``, and whether all of them are zeros.

    ``source_scale`` is that of an E4M3 source. ``first_element`` is the place of the chunk in ``source``, for messages.
    Raises ``IntegrityError`` for NaN and Inf, and for weights that are out of the scale's range.
    """
    largest = finite_bits(raw, source.dtype, source, first_element)
    amax = magnitude(largest, source.dtype) * source_scale
    if amax > scale * LARGEST * _ROUNDING:
        raise IntegrityError(
            "scale-too-small",
            f"Tensor {source.name!r} in {source.file} reaches {amax:.6g}, but its scale only {scale * LARGEST:.6g}.",
            why="The scales are not those of this model.",
            next="Calibrate again.",
        )
    if source.dtype == FLOAT8 and scale == source_scale:
        return raw, largest == 0
    size = raw.nbytes // ITEM_BYTES[source.dtype]
    codes = buffers.get("codes", "u1", size)
    if source.dtype == "F32":
        values = raw.view("<f4")
        for first in range(0, size, _LOOKUP_ITEMS):
            codes[first : first + _LOOKUP_ITEMS] = encode(values[first : first + _LOOKUP_ITEMS], scale)
    else:
        bits = raw.view("u1" if source.dtype == FLOAT8 else "<u2")
        look_up(cast_table(source.dtype, scale, source_scale), bits, codes, buffers.get("indices", "p", _LOOKUP_ITEMS))
    return codes, largest == 0


def look_up(table: NDArray[np.uint8], bits: Array, out: NDArray[np.uint8], indices: Array) -> None:
    """``out = table[bits]`` for flat arrays, in pieces that stay in the cache. ``indices`` is scratch (intp).

    The indices are widened here, into memory that is used again: NumPy would make a fresh array of them.
    """
    for first in range(0, bits.size, len(indices)):
        part = bits[first : first + len(indices)]
        wide = indices[: part.size]
        np.copyto(wide, part)
        # Every index is in the table; "clip" only spares the buffer that "raise" asks for.
        np.take(table, wide, out=out[first : first + part.size], mode="clip")


def count_codes(raw: Array, counts: NDArray[np.int64]) -> None:
    """Add to ``counts`` (256) how often each code is in ``raw``."""
    for first in range(0, raw.size, _LOOKUP_ITEMS):
        counts += np.bincount(raw[first : first + _LOOKUP_ITEMS], minlength=256)


def requantization_error(counts: NDArray[np.int64], source_scale: float, scale: float) -> float:
    """Root mean square of what a second rounding changes, as a part of that of the tensor; ``counts`` as above."""
    codes = np.arange(256)
    before = decode(codes, source_scale).astype(np.float64)
    after = decode(cast_table(FLOAT8, scale, source_scale)).astype(np.float64) * scale
    used = counts > 0
    power = float(np.sum(counts[used] * before[used] ** 2))
    noise = float(np.sum(counts[used] * (after[used] - before[used]) ** 2))
    return (noise / power) ** 0.5 if power else 0.0
