"""E4M3, the 8-bit float of FP8 checkpoints: one sign, four exponent and three mantissa bits, no infinity.

The largest finite value is 448 (0x7E), 0x7F and 0xFF are NaN, the smallest step is 2**-9. Every tensor has one scale:
``value = scale * code``. Values beyond 448 x scale saturate, and rounding is to nearest, ties to even, as on the GPU.
The arithmetic is exact float32 and integer work, so that the bytes are those of any correct implementation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 448.0
NAN_CODE = 0x7F
# float32 bits: 448, the smallest normal of E4M3 (2**-6), and 2**14, whose float32 neighbour is 2**-9 away.
_LARGEST_BITS, _NORMAL_BITS, _STEP_BITS = 0x43E00000, 0x3C800000, 0x46800000
_INFINITY_BITS = 0x7F800000
# Exponents count from -127 in float32 and from -7 in E4M3, above three mantissa bits.
_REBIAS = (127 - 7) << 3


def _decode_table() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    magnitude[(codes & 0x7F) == NAN_CODE] = np.nan
    table: NDArray[np.float32] = np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)
    return table


DECODE = _decode_table()
"""float32 value of each of the 256 codes at scale 1."""
DECODE.flags.writeable = False


def encode(values: NDArray[np.float32], scale: float = 1.0) -> NDArray[np.uint8]:
    """Codes of ``values / scale``, which is float32: saturating, to nearest, ties to even. NaN stays NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        bits = np.divide(values, np.float32(scale), dtype=np.float32).view(np.uint32)
    sign = ((bits >> 24) & 0x80).astype(np.uint8)
    bits &= 0x7FFFFFFF
    special = bits > _INFINITY_BITS
    np.minimum(bits, _LARGEST_BITS, out=bits)
    # Subnormals: adding 2**14 leaves a whole number of steps of 2**-9 in the low bits, rounded by the addition.
    shifted = np.minimum(bits, _NORMAL_BITS).view(np.float32) + np.float32(2.0**14)
    small = shifted.view(np.uint32) - np.uint32(_STEP_BITS)
    # Normals: add just less than half of the last kept bit, and that bit itself: ties go to even.
    codes = bits + (0x7FFFF + ((bits >> 20) & 1))
    codes >>= 20
    codes -= np.uint32(_REBIAS)
    result = np.where(bits < _NORMAL_BITS, small, codes).astype(np.uint8)
    result[special] = NAN_CODE
    result |= sign
    return result


def decode(codes: NDArray[Any], scale: float = 1.0) -> NDArray[np.float32]:
    """float32 values ``code x scale``."""
    values: NDArray[np.float32] = DECODE[codes]
    if scale != 1.0:
        values *= np.float32(scale)
    return values
