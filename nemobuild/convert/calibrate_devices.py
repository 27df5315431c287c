"""Where calibration computes: what a device has to offer, and NumPy on the CPU. All run ``forward.run_block``.

On the CPU the weights of a block stay as they are stored (two bytes each in BF16) and are widened to float32 panel
by panel inside the product; a whole block in float32 would double the memory. The residual streams are in a file.
For a GPU see ``calibrate_torch``.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.calibrate_state import State
from nemobuild.convert.fp8 import amax_of
from nemobuild.convert.scales import quant_groups
from nemobuild.errors import from_os_error
from nemobuild.model.forward import Array, BlockWeights, Segment, Step, make_step
from nemobuild.model.spec import NoOp
from nemobuild.weights.safetensors import NUMPY_TYPES, TensorInfo, bf16_to_float32, read_array, read_into
from nemobuild.weights.snapshot import Snapshot

PANEL_VALUES = 1 << 20


class Stream(Protocol):
    """Residual streams of all samples, (tokens, hidden), of the block that runs and of the one after it."""

    def read(self, first: int, last: int) -> Array: ...

    def write(self, first: int, hidden: Array) -> None: ...

    def turn(self, block: int) -> bool:
        """What was written is now the input of ``block``. True when it would survive the end of the process."""
        ...


class Device(Protocol):
    snapshot: Snapshot

    def stream(self, state: State, tokens: int) -> Stream: ...

    def embed(self, ids: NDArray[np.int64]) -> Array: ...

    def blocks(self, start: int) -> Iterator[tuple[int, BlockWeights]]:
        """Every block from ``start`` on; its linears are in the device's own form."""
        ...

    def step(self, segments: Sequence[Segment], hidden: Array) -> Step: ...

    def linear(self, x: Array, weight: Any) -> Array: ...

    def weight_amax(self, weight: Any) -> float: ...

    def amax(self, x: Array) -> Array: ...

    def larger(self, a: Array, b: Array) -> Array: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A linear as the file holds it: parts (out, in) one below the other, BF16 and F16 as bits."""

    parts: tuple[tuple[NDArray[Any], str], ...]


class NumpyDevice:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._scratch = threading.local()

    def stream(self, state: State, tokens: int) -> Stream:
        return _FileStream(state, self.snapshot.spec.hidden_size)

    def embed(self, ids: NDArray[np.int64]) -> Array:
        return embedding_rows(self.snapshot, ids)

    def blocks(self, start: int) -> Iterator[tuple[int, BlockWeights]]:
        for i in range(start, len(self.snapshot.spec.blocks)):
            yield i, self._read(i)

    def step(self, segments: Sequence[Segment], hidden: Array) -> Step:
        return make_step(self.snapshot.spec, segments, hidden)

    def linear(self, x: Array, weight: Stored) -> Array:
        rows = sum(len(raw) for raw, _ in weight.parts)
        result = np.empty((len(x), rows), np.float32)
        at = 0
        for raw, dtype in weight.parts:
            step = max(1, PANEL_VALUES // raw.shape[1])
            for start in range(0, len(raw), step):
                panel = self._widen(raw[start : start + step], dtype)
                np.matmul(x, panel.T, out=result[:, at : at + len(panel)])
                at += len(panel)
        return result

    def weight_amax(self, weight: Stored) -> float:
        # Not max(), which passes over NaN.
        return float(np.max([amax_of(raw, dtype) for raw, dtype in weight.parts]))

    def amax(self, x: Array) -> Array:
        return np.maximum(x.max(), -x.min())

    def larger(self, a: Array, b: Array) -> Array:
        return np.maximum(a, b)

    def _read(self, index: int) -> BlockWeights:
        tensors = self.snapshot.tensors
        parts: dict[str, Any] = {name: read_array(info) for name, info in norms(self.snapshot, index).items()}
        for group, names in quant_groups(self.snapshot.spec, index).items():
            stored = tuple((read_array(tensors[n], bits=True), tensors[n].dtype) for n in names)
            parts[group.rsplit(".", 1)[-1]] = Stored(stored)
        return BlockWeights(**parts)

    def _widen(self, raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
        if dtype == "F32":
            return raw
        held = getattr(self._scratch, "panel", None)
        if held is None or held.size < raw.size:
            held = self._scratch.panel = np.empty(max(raw.size, PANEL_VALUES), np.float32)
        panel: NDArray[np.float32] = held[: raw.size].reshape(raw.shape)
        if dtype == "BF16":
            np.left_shift(raw, 16, out=panel.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(panel, raw)
        return panel


class _FileStream:
    """Two files in turn: a block reads what was saved and writes the other file, and every turn is a save."""

    def __init__(self, state: State, hidden_size: int) -> None:
        self._state, self._size = state, hidden_size
        for slot in (0, 1):  # here, since several threads ask for them later
            state.stream_file(slot)

    def read(self, first: int, last: int) -> Array:
        hidden = np.empty((last - first, self._size), np.float32)
        self._state.read_stream(first * self._size * 4, hidden.data)
        return hidden

    def write(self, first: int, hidden: Array) -> None:
        self._state.write_stream(first * self._size * 4, np.ascontiguousarray(hidden).data)

    def turn(self, block: int) -> bool:
        return True


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Let each product use ``count`` threads. Batches side by side share the cores better than one product does."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(max(1, count), user_api="blas"):
        yield


def norms(snapshot: Snapshot, index: int) -> dict[str, TensorInfo]:
    block, prefix = snapshot.spec.blocks[index], f"model.layers.{index}"
    norms = {}
    if not isinstance(block.attention, NoOp):
        norms["attention_norm"] = snapshot.tensors[f"{prefix}.input_layernorm.weight"]
    if not isinstance(block.ffn, NoOp):
        norms["ffn_norm"] = snapshot.tensors[f"{prefix}.post_attention_layernorm.weight"]
    return norms


def embedding_rows(snapshot: Snapshot, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows (N, hidden) of the embedding, read one by one: the table may be larger than a block."""
    info = snapshot.tensors["model.embed_tokens.weight"]
    wanted, places = np.unique(ids, return_inverse=True)
    rows = np.empty((len(wanted), info.shape[1]), NUMPY_TYPES[info.dtype])
    row_bytes = info.nbytes // info.shape[0]
    fd = open_file(info)
    try:
        for row, token in zip(rows, wanted, strict=True):
            read_into(fd, row.data, info.offset + int(token) * row_bytes, info.file)
    finally:
        os.close(fd)
    wide = bf16_to_float32(rows) if info.dtype == "BF16" else rows.astype(np.float32)
    rows_of_ids: NDArray[np.float32] = wide[places.reshape(-1)]
    return rows_of_ids


def open_file(info: TensorInfo) -> int:
    try:
        return os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise from_os_error(error, info.file, "reading") from error
