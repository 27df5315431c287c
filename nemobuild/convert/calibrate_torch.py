"""Calibration on a GPU, with torch.

Inputs of products with BF16 weights are rounded to BF16, and the results are float32; other weights are widened panel
by panel, as on the CPU. The next block is read and sent while one runs, and the residual streams stay in the GPU's
memory, saved only as often as saving costs little. torch is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.calibrate_devices import PANEL_VALUES, Stream, embedding_rows, norms, open_file
from nemobuild.convert.calibrate_state import State
from nemobuild.convert.scales import quant_groups
from nemobuild.errors import DoesNotFit, ToolchainError
from nemobuild.model.forward import Array, BlockWeights, Segment, Step, make_step
from nemobuild.weights.safetensors import ITEM_BYTES, TensorInfo, read_into
from nemobuild.weights.snapshot import Snapshot

# Share of the time that saving the residual streams may cost.
SAVE_SHARE = 0.05


class TorchDevice:
    """torch on ``cuda``. Raises ``ToolchainError`` when there is no torch or no GPU.

    Weights live in two buffers of the largest block, taken once and used in turn: the allocator never sees blocks of
    different sizes come and go, so what is planned for them is exact.
    """

    HOST_BYTES = 1 << 30  # torch and CUDA themselves, and the pinned buffer: an estimate
    # On the GPU: context and kernels, what cuBLAS works in, widened panels, gaps of the allocator: an estimate.
    FIXED_BYTES = 1 << 30
    STAGING_BYTES = 64 << 20

    def __init__(self, snapshot: Snapshot, place: str = "cuda") -> None:
        torch = import_torch(place)
        self.snapshot, self._torch, self._place = snapshot, torch, torch.device(place)
        on_gpu = place == "cuda"
        self._staging = torch.empty(self.STAGING_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self._upload = torch.cuda.Stream() if on_gpu else None
        # torch has it since 2.8, on CUDA; otherwise sums are rounded to BF16 once.
        self._float_output = on_gpu and "dtype" in torch.ops.aten.mm.overloads()
        self._steps: dict[tuple[Segment, ...], Step] = {}

    def free_bytes(self) -> int | None:
        """Free memory of the GPU, of which this process has taken its context already; ``None`` where there is none."""
        return int(self._torch.cuda.mem_get_info()[0]) if self._place.type == "cuda" else None

    def stream(self, state: State, tokens: int) -> Stream:
        torch, shape = self._torch, (tokens, self.snapshot.spec.hidden_size)
        held = torch.empty(shape, dtype=torch.float32, device=self._place)
        return HeldStream(state, held, lambda part: torch.from_numpy(part).to(self._place), lambda x: x.cpu().numpy())

    def embed(self, ids: NDArray[np.int64]) -> Array:
        return self._torch.from_numpy(embedding_rows(self.snapshot, ids)).to(self._place)

    def blocks(self, start: int) -> Iterator[tuple[int, BlockWeights]]:
        torch, count = self._torch, len(self.snapshot.spec.blocks)
        if start >= count:
            return
        size = max(held_bytes(self.snapshot, i) for i in range(start, count))
        buffers = [torch.empty(size, dtype=torch.uint8, device=self._place) for _ in range(2)]
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self._read, start, buffers[start % 2], self._launched())
            for i in range(start, count):
                weights = coming.result()
                if i + 1 < count:
                    # That buffer holds block i - 1, all of whose kernels are launched but perhaps not done.
                    coming = pool.submit(self._read, i + 1, buffers[(i + 1) % 2], self._launched())
                yield i, weights
                del weights

    def step(self, segments: Sequence[Segment], hidden: Array) -> Step:
        # Kept, since making one on the host and sending it takes about as long as a block; equal batches share one.
        key = tuple(segments)
        if key not in self._steps:
            self._steps[key] = make_step(self.snapshot.spec, segments, hidden)
        return self._steps[key]

    def linear(self, x: Array, weight: Any) -> Array:
        torch = self._torch
        if weight.dtype == torch.bfloat16:
            if self._float_output:
                return torch.mm(x.to(weight.dtype), weight.T, out_dtype=torch.float32)
            return (x.to(weight.dtype) @ weight.T).float()
        # Not in F16, where an activation above 65504 would become Inf.
        result = torch.empty((len(x), len(weight)), dtype=torch.float32, device=x.device)
        at = 0
        for panel in weight.split(max(1, 16 * PANEL_VALUES // weight.shape[1])):
            result[:, at : at + len(panel)] = x @ panel.float().T
            at += len(panel)
        return result

    def weight_amax(self, weight: Any) -> float:
        return float(self.amax(weight))

    def amax(self, x: Array) -> Array:
        # Not abs(), which would be a second array. NaN goes through.
        return self._torch.maximum(x.max(), -x.min())

    def larger(self, a: Array, b: Array) -> Array:
        return self._torch.maximum(a, b)

    def _launched(self) -> Any:
        """A mark behind everything that was launched to compute so far."""
        if self._upload is None:
            return None
        event = self._torch.cuda.Event()
        event.record()
        return event

    def _read(self, index: int, buffer: Any, before: Any) -> BlockWeights:
        """Block ``index`` into ``buffer``, once ``before`` is reached. Allocates nothing on the GPU."""
        parts, at = {}, 0
        with self._torch.cuda.stream(self._upload) if self._upload else contextlib.nullcontext():
            if self._upload:
                self._upload.wait_event(before)
            for name, infos, dtype in _parts(self.snapshot, index):
                shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
                end = at + math.prod(shape) * ITEM_BYTES[dtype]
                parts[name] = target = buffer[at:end].view(self._dtype(dtype)).view(shape)
                row = 0
                for info in infos:
                    self._fill(target[row : row + info.shape[0]], info)
                    row += info.shape[0]
                at += _aligned(end - at)
            if self._upload:
                self._upload.synchronize()  # before the computing stream, which knows nothing of this one, goes on
        return BlockWeights(**parts)

    def _fill(self, target: Any, info: TensorInfo) -> None:
        """Rows of the file into ``target``, through the pinned buffer; another type is made of them on the host."""
        row_bytes = info.nbytes // info.shape[0]
        step = max(1, self.STAGING_BYTES // row_bytes)
        fd = open_file(info)
        try:
            for start in range(0, info.shape[0], step):
                end = min(start + step, info.shape[0])
                staging = self._staging[: (end - start) * row_bytes]
                read_into(fd, staging.numpy().data, info.offset + start * row_bytes, info.file)
                target[start:end].copy_(staging.view(self._dtype(info.dtype)).view(end - start, *info.shape[1:]))
        finally:
            os.close(fd)

    def _dtype(self, name: str) -> Any:
        torch = self._torch
        return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[name]


def import_torch(place: str) -> Any:
    """torch, able to compute on ``place``. Raises ``ToolchainError``."""
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
        raise ToolchainError("no-gpu", "PyTorch sees no CUDA device.", next="Check `nvidia-smi`, or use --device cpu.")
    return torch


@contextlib.contextmanager
def gpu_memory_errors() -> Iterator[None]:
    """Turn torch's way to say that the GPU's memory is full into ours."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch may not be installed
            raise
        raise DoesNotFit(
            "gpu-memory-too-small",
            "The GPU's memory was full while calibrating.",
            why=f"Another program may have taken it since the start. torch says: {str(error).splitlines()[0]}",
            next="Stop other programs on the GPU, give fewer --samples, or take --device cpu.",
        ) from error


def held_bytes(snapshot: Snapshot, index: int) -> int:
    """Bytes of block ``index`` on the GPU: matrices as they are stored, norms and mixed parts as float32. Exact."""
    return sum(
        _aligned(sum(math.prod(info.shape) for info in infos) * ITEM_BYTES[dtype])
        for _, infos, dtype in _parts(snapshot, index)
    )


def _parts(snapshot: Snapshot, index: int) -> Iterator[tuple[str, list[TensorInfo], str]]:
    """Field of ``BlockWeights``, the tensors that it is stacked of, and its type on the GPU."""
    for name, info in norms(snapshot, index).items():
        yield name, [info], "F32"
    for group, names in quant_groups(snapshot.spec, index).items():
        infos = [snapshot.tensors[n] for n in names]
        dtypes = {info.dtype for info in infos}
        yield group.rsplit(".", 1)[-1], infos, dtypes.pop() if len(dtypes) == 1 else "F32"


def _aligned(count_bytes: int) -> int:
    """As the allocator and the kernels have it."""
    return -(-count_bytes // 512) * 512


class HeldStream:
    """One array in the device's memory, changed in place; a copy goes to a file when the last one has paid for itself.

    ``to_device`` and ``to_host`` copy rows from and to NumPy.
    """

    def __init__(
        self,
        state: State,
        held: Array,
        to_device: Callable[[NDArray[np.float32]], Array],
        to_host: Callable[[Array], NDArray[np.float32]],
    ) -> None:
        self._state, self._held, self._to_host = state, held, to_host
        self._saved_s, self._cost_s = time.monotonic(), 0.0
        tokens, size = held.shape
        self._step, self._row_bytes = max(1, (64 << 20) // (4 * size)), 4 * size
        if state.saved is not None:
            for first in range(0, tokens, self._step):
                part = np.empty((min(self._step, tokens - first), size), np.float32)
                state.read_stream(first * self._row_bytes, part.data)
                held[first : first + len(part)] = to_device(part)

    def read(self, first: int, last: int) -> Array:
        return self._held[first:last]

    def write(self, first: int, hidden: Array) -> None:
        self._held[first : first + len(hidden)] = hidden

    def turn(self, block: int) -> bool:
        begin_s = time.monotonic()
        if self._cost_s > SAVE_SHARE * (begin_s - self._saved_s):
            return False
        for first in range(0, len(self._held), self._step):
            part = self._to_host(self._held[first : first + self._step])
            self._state.write_stream(first * self._row_bytes, part.data)
        self._saved_s = time.monotonic()
        self._cost_s = self._saved_s - begin_s
        return True
