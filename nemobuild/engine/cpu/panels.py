"""Weight matrices cut into narrow panels, so that a product with few rows reads each weight once and copies nothing.

A decode step multiplies 1 to 64 rows with every matrix of the model. BLAS packs the whole matrix into its own layout
before such a product (unless there is one row only), and that copy costs two to three times the product itself. Here
the copy is made once, at load: (out, in) becomes (out / 32, in, 32). Each panel product is then small enough for
the kernel of OpenBLAS that does without packing, and NumPy loops over the panels without Python.

That kernel exists for some processors only (AVX-512, SVE); elsewhere panels are slower than plain matrices. So
``panels_pay`` tries both on this machine, which takes a few milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...model.forward import linear as plain_linear

WIDTH = 32  # two AVX-512 registers of float32
_ROWS = 16  # rows x WIDTH x in must stay below a million for the kernel that does not pack


@dataclass(frozen=True, slots=True)
class Panels:
    """A float32 matrix (out, in) as ``panels`` (ceil(out / WIDTH), in, WIDTH), rows beyond ``out`` zero."""

    panels: NDArray[np.float32]
    out: int

    def __getitem__(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Rows of the matrix, (N, in): what an embedding is asked for."""
        found: NDArray[np.float32] = self.panels[rows // WIDTH, :, rows % WIDTH]
        return found


def to_panels(weight: NDArray[np.float32]) -> Panels:
    """Cut ``weight`` (out, in)."""
    out, columns = weight.shape
    panels = np.zeros((-(-out // WIDTH), columns, WIDTH), np.float32)
    whole = out // WIDTH
    panels[:whole] = weight[: whole * WIDTH].reshape(whole, WIDTH, columns).swapaxes(1, 2)
    if rest := out % WIDTH:
        panels[whole, :, :rest] = weight[whole * WIDTH :].T
    return Panels(panels, out)


def linear(name: str, x: NDArray[np.float32], weight: Panels | NDArray[np.float32]) -> NDArray[np.float32]:
    """``LinearFn`` for panels and plain matrices alike: x (N, in) -> (N, out)."""
    if not isinstance(weight, Panels):
        return plain_linear(name, x, weight)  # type: ignore[no-any-return]
    count = len(x)
    if count == 1:
        x = np.concatenate((x, x))  # NumPy multiplies a single row by another routine, slower here than two rows
    result = np.empty((len(x), len(weight.panels), WIDTH), np.float32)
    by_panel = result.swapaxes(0, 1)
    for start in range(0, len(x), _ROWS):
        np.matmul(x[start : start + _ROWS], weight.panels, out=by_panel[:, start : start + _ROWS])
    return result.reshape(len(x), len(weight.panels) * WIDTH)[:count, : weight.out]


def panels_pay(rows: int = 8, repeats: int = 7) -> bool:
    """Whether ``linear`` is faster with panels than without, for ``rows`` rows and 3072 x 576 weights (7 MB)."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3072, 576), dtype=np.float32)
    x = rng.standard_normal((rows, 576), dtype=np.float32)
    panels = to_panels(weight)
    plain_s = _best_time_s(lambda: plain_linear("", x, weight), repeats)
    panels_s = _best_time_s(lambda: linear("", x, panels), repeats)
    return panels_s < plain_s


def _best_time_s(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
