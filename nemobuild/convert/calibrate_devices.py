"""Where calibration computes: NumPy on the CPU, or torch on a GPU. Both run the same ``forward.run_block``.

On the CPU the weights of a block stay as they are stored (two bytes each in BF16) and are widened to float32 panel
by panel inside the product; a whole block in float32 would double the memory. The residual streams are in a file.

On a GPU the products are in the precision of the weights, the next block is read and sent while one runs, and the
residual streams stay in its memory, saved only as often as saving costs little.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.calibrate_state import State
from nemobuild.convert.fp8 import amax_of
from nemobuild.convert.scales import quant_groups
from nemobuild.errors import ToolchainError, from_os_error
from nemobuild.model.forward import Array, BlockWeights
from nemobuild.model.spec import NoOp
from nemobuild.weights.safetensors import NUMPY_TYPES, TensorInfo, bf16_to_float32, read_array, read_into
from nemobuild.weights.snapshot import Snapshot

PANEL_VALUES = 1 << 20
# Share of the time that saving the residual streams of a GPU may cost.
SAVE_SHARE = 0.05


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
        return _FileStream(state, tokens, self.snapshot.spec.hidden_size)

    def embed(self, ids: NDArray[np.int64]) -> Array:
        return _embedding_rows(self.snapshot, ids)

    def blocks(self, start: int) -> Iterator[tuple[int, BlockWeights]]:
        for i in range(start, len(self.snapshot.spec.blocks)):
            yield i, self._read(i)

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
        parts: dict[str, Any] = {name: read_array(info) for name, info in _norms(self.snapshot, index).items()}
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
    """Two files in turn: block n reads one and writes the other, so a kill never harms what block n started from."""

    def __init__(self, state: State, tokens: int, hidden_size: int) -> None:
        self._state, self._shape = state, (tokens, hidden_size)
        self._block = state.saved or 0
        self._begun = state.saved is not None
        for side in (0, 1):  # here, since several threads ask for them later
            state.stream_file(side)

    def read(self, first: int, last: int) -> Array:
        hidden = np.empty((last - first, self._shape[1]), np.float32)
        fd, path = self._state.stream_file(self._block)
        read_into(fd, hidden.data, first * self._shape[1] * 4, path)
        return hidden

    def write(self, first: int, hidden: Array) -> None:
        self._state.write_stream(self._block + self._begun, first * self._shape[1] * 4, np.ascontiguousarray(hidden))

    def turn(self, block: int) -> bool:
        self._block, self._begun = block, True
        return True


class TorchDevice:
    """torch on ``cuda``. Raises ``ToolchainError`` when there is no torch or no GPU."""

    HOST_BYTES = 1 << 30  # torch and CUDA themselves
    STAGING_BYTES = 64 << 20

    def __init__(self, snapshot: Snapshot, place: str = "cuda") -> None:
        try:
            import torch
        except ImportError as error:
            raise ToolchainError(
                "no-torch",
                "--device cuda needs PyTorch.",
                why=f"{error}.",
                next="Install torch for your CUDA version, or use --device cpu.",
            ) from error
        if place == "cuda" and not torch.cuda.is_available():
            raise ToolchainError(
                "no-gpu", "PyTorch sees no CUDA device.", next="Check `nvidia-smi`, or use --device cpu."
            )
        self.snapshot, self._torch, self._place = snapshot, torch, torch.device(place)
        pinned = place == "cuda"
        self._staging = torch.empty(self.STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
        self._upload = torch.cuda.Stream() if pinned else None

    def free_bytes(self) -> int | None:
        """Free memory of the GPU; ``None`` where there is none."""
        return int(self._torch.cuda.mem_get_info()[0]) if self._place.type == "cuda" else None

    def stream(self, state: State, tokens: int) -> Stream:
        return _DeviceStream(self._torch, self._place, state, tokens, self.snapshot.spec.hidden_size)

    def embed(self, ids: NDArray[np.int64]) -> Array:
        return self._torch.from_numpy(_embedding_rows(self.snapshot, ids)).to(self._place)

    def blocks(self, start: int) -> Iterator[tuple[int, BlockWeights]]:
        count = len(self.snapshot.spec.blocks)
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._read, start) if start < count else None
            for i in range(start, count):
                assert coming is not None
                weights = coming.result()
                coming = pool.submit(self._read, i + 1) if i + 1 < count else None
                yield i, weights
                del weights

    def linear(self, x: Array, weight: Any) -> Array:
        return (x.to(weight.dtype) @ weight.T).float()

    def weight_amax(self, weight: Any) -> float:
        # In parts: the absolute values of a whole matrix would be a second matrix.
        return float(np.max([float(part.abs().amax()) for part in weight.split(4096)]))

    def amax(self, x: Array) -> Array:
        return self._torch.maximum(x.max(), -x.min())

    def larger(self, a: Array, b: Array) -> Array:
        return self._torch.maximum(a, b)

    def _read(self, index: int) -> BlockWeights:
        torch, tensors = self._torch, self.snapshot.tensors
        with torch.cuda.stream(self._upload) if self._upload else contextlib.nullcontext():
            parts: dict[str, Any] = {
                name: torch.from_numpy(read_array(info).astype(np.float32)).to(self._place)
                for name, info in _norms(self.snapshot, index).items()
            }
            for group, names in quant_groups(self.snapshot.spec, index).items():
                infos = [tensors[n] for n in names]
                dtypes = {self._dtype(info) for info in infos}
                dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
                shape = (sum(info.shape[0] for info in infos), infos[0].shape[1])
                matrix = torch.empty(shape, dtype=dtype, device=self._place)
                at = 0
                for info in infos:
                    self._fill(matrix[at : at + info.shape[0]], info)
                    at += info.shape[0]
                parts[group.rsplit(".", 1)[-1]] = matrix
            if self._upload:
                self._upload.synchronize()
        return BlockWeights(**parts)

    def _fill(self, target: Any, info: TensorInfo) -> None:
        """Rows of the file into ``target``, through the pinned buffer."""
        row_bytes = info.nbytes // info.shape[0]
        step = max(1, self.STAGING_BYTES // row_bytes)
        fd = _open(info)
        try:
            for start in range(0, info.shape[0], step):
                end = min(start + step, info.shape[0])
                staging = self._staging[: (end - start) * row_bytes]
                read_into(fd, staging.numpy().data, info.offset + start * row_bytes, info.file)
                target[start:end].copy_(staging.view(self._dtype(info)).view(end - start, -1))
        finally:
            os.close(fd)

    def _dtype(self, info: TensorInfo) -> Any:
        torch = self._torch
        return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[info.dtype]


class _DeviceStream:
    """In the GPU's memory, changed in place; a copy goes to a file when the last copy has paid for itself."""

    def __init__(self, torch: Any, place: Any, state: State, tokens: int, hidden_size: int) -> None:
        self._state = state
        self._hidden = torch.empty((tokens, hidden_size), dtype=torch.float32, device=place)
        self._saved_s, self._cost_s = time.monotonic(), 0.0
        self._step = max(1, (64 << 20) // (4 * hidden_size))
        if state.saved is not None:
            fd, path = state.stream_file(state.saved)
            for first in range(0, tokens, self._step):
                part = np.empty((min(self._step, tokens - first), hidden_size), np.float32)
                read_into(fd, part.data, first * hidden_size * 4, path)
                self._hidden[first : first + len(part)] = torch.from_numpy(part).to(place)

    def read(self, first: int, last: int) -> Array:
        return self._hidden[first:last]

    def write(self, first: int, hidden: Array) -> None:
        self._hidden[first : first + len(hidden)] = hidden

    def turn(self, block: int) -> bool:
        begin_s = time.monotonic()
        if self._cost_s > SAVE_SHARE * (begin_s - self._saved_s):
            return False
        tokens, size = self._hidden.shape
        for first in range(0, tokens, self._step):
            part = self._hidden[first : first + self._step].cpu().numpy()
            self._state.write_stream(block, first * size * 4, part)
        self._saved_s = time.monotonic()
        self._cost_s = self._saved_s - begin_s
        return True


@contextlib.contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Let each product use ``count`` threads. Batches side by side share the cores better than one product does."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(max(1, count), user_api="blas"):
        yield


def _norms(snapshot: Snapshot, index: int) -> dict[str, TensorInfo]:
    block, prefix = snapshot.spec.blocks[index], f"model.layers.{index}"
    norms = {}
    if not isinstance(block.attention, NoOp):
        norms["attention_norm"] = snapshot.tensors[f"{prefix}.input_layernorm.weight"]
    if not isinstance(block.ffn, NoOp):
        norms["ffn_norm"] = snapshot.tensors[f"{prefix}.post_attention_layernorm.weight"]
    return norms


def _embedding_rows(snapshot: Snapshot, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows (N, hidden) of the embedding, read one by one: the table may be larger than a block."""
    info = snapshot.tensors["model.embed_tokens.weight"]
    wanted, places = np.unique(ids, return_inverse=True)
    rows = np.empty((len(wanted), info.shape[1]), NUMPY_TYPES[info.dtype])
    row_bytes = info.nbytes // info.shape[0]
    fd = _open(info)
    try:
        for row, token in zip(rows, wanted, strict=True):
            read_into(fd, row.data, info.offset + int(token) * row_bytes, info.file)
    finally:
        os.close(fd)
    wide = bf16_to_float32(rows) if info.dtype == "BF16" else rows.astype(np.float32)
    rows_of_ids: NDArray[np.float32] = wide[places.reshape(-1)]
    return rows_of_ids


def _open(info: TensorInfo) -> int:
    try:
        return os.open(info.file, os.O_RDONLY)
    except OSError as error:
        raise from_os_error(error, info.file, "reading") from error
