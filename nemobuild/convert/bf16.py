"""Chunks of BF16, F16 or F32 -> BF16 bits, in reused memory, and the search for what must not be in weights.

NaN and Inf have all exponent bits set, so they are the largest bit patterns of either sign: two integer maxima
find them, several times faster than floating-point tests and without a mask array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.errors import IntegrityError
from nemobuild.weights.safetensors import ITEM_BYTES, TensorInfo

# Signed and unsigned type of the bits, and the bits of +Inf: larger patterns are NaN. E4M3 has no Inf and one NaN.
_INFINITY = {
    "BF16": ("<i2", "<u2", 0x7F80),
    "F16": ("<i2", "<u2", 0x7C00),
    "F32": ("<i4", "<u4", 0x7F800000),
    "F8_E4M3": ("i1", "u1", 0x7F),
}
# Bytes that one worker holds for each byte of a chunk, at worst (F16: source, float32, rounded, BF16, gathered).
BUFFERS_PER_CHUNK = 7

Array = NDArray[Any]


class Buffers:
    """Memory of one worker, reused for every chunk."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def get(self, name: str, dtype: str, size: int) -> Array:
        """``size`` items whose content is left from the last use."""
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = np.empty(size, dtype)
        return held[:size]


def bf16_bits(raw: Array, source: TensorInfo, first_element: int, buffers: Buffers) -> Array:
    """BF16 bits (uint16, flat) of the bytes ``raw``, rounded to nearest, ties to even.

    ``first_element`` is the place of the chunk in ``source``, for messages. Raises ``IntegrityError`` for NaN, Inf
    and for float32 values that round to Inf in BF16.
    """
    finite_bits(raw, source.dtype, source, first_element)
    if source.dtype == "BF16":
        return raw.view("<u2")
    size = raw.nbytes // ITEM_BYTES[source.dtype]
    if source.dtype == "F16":
        # Every float16 is a float32, and its exponent fits BF16: only the mantissa is rounded below.
        bits = buffers.get("float32", "<u4", size)
        np.copyto(bits.view("<f4"), raw.view("<f2"))
    else:
        bits = raw.view("<u4")
    # Add just less than half of the last kept bit, and that bit itself: ties go to even.
    rounded = buffers.get("rounded", "<u4", size)
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    narrow = buffers.get("bf16", "<u2", size)
    np.copyto(narrow, rounded, casting="unsafe")
    finite_bits(narrow, "BF16", source, first_element, "a value too large for BF16")
    return narrow


def largest_bits(data: Array, dtype: str) -> int:
    """The largest bit pattern of ``data`` without the sign, found by two maxima and without a temporary array.

    The order of such patterns is the order of magnitudes, NaN above Inf above all others.
    """
    signed, unsigned, _ = _INFINITY[dtype]
    sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
    return max(int(data.view(signed).max()), int(data.view(unsigned).max()) - sign)


def finite_bits(data: Array, dtype: str, source: TensorInfo, first_element: int, kind: str = "NaN or Inf") -> int:
    """``largest_bits``; raises ``IntegrityError`` when these are of ``kind``, naming the element of ``source``."""
    _, unsigned, infinity = _INFINITY[dtype]
    largest = largest_bits(data, dtype)
    if largest < infinity:
        return largest
    sign = 1 << (8 * ITEM_BYTES[dtype] - 1)
    element = first_element + int(np.flatnonzero((data.view(unsigned) & (sign - 1)) >= infinity)[0])
    index = ", ".join(str(i) for i in np.unravel_index(element, source.shape))
    raise IntegrityError(
        "not-finite",
        f"Tensor {source.name!r} in {source.file} holds {kind} at [{index}].",
        why="One such weight makes every answer of the model worthless.",
        next="Fetch the file again; if that does not help, the published weights are broken.",
    )
