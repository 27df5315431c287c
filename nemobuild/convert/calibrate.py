"""The FP8 scales of a model from sample texts, with one block of weights in memory at a time.

Calibration asks one thing: how large do the inputs of every linear, the keys and the values become? The usual way
keeps the whole BF16 model resident. But block n needs only what block n - 1 left of the samples, so the samples go
through the model block by block: read block n, run all samples through it, note the maxima, forget it. Between
blocks the residual streams of the samples wait in a file (on a GPU in its memory), so memory grows neither with the
model nor, on the CPU, with the number of samples.

The pass itself is ``model/forward.py``, the one that verification and the CPU runtime use; the maxima are taken in
its ``LinearFn`` hook and from its KV cache. Scales follow TensorRT-LLM: largest absolute value / 448 per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemobuild.convert.bf16 import Buffers, bf16_bits
from nemobuild.convert.calibrate_devices import PANEL_VALUES, Device, NumpyDevice, Stream, blas_threads
from nemobuild.convert.calibrate_state import State
from nemobuild.convert.calibrate_torch import TorchDevice, gpu_memory_errors, held_bytes, import_torch
from nemobuild.convert.fp8 import scale_of
from nemobuild.convert.scales import BlockScales, GroupScales, KvScales, quant_groups
from nemobuild.convert.workers import available_cpus
from nemobuild.errors import IntegrityError, UsageError
from nemobuild.model.forward import Array, Segment, new_cache, run_block
from nemobuild.model.spec import Attention, Mlp, ModelSpec
from nemobuild.weights.safetensors import read_array
from nemobuild.weights.snapshot import Snapshot

DEVICES = ("cpu", "cuda")
# Bound of the temporary arrays of the batches that run at once. A batch pays for widening the weights to float32,
# which costs as much as the products of about 20 tokens.
BATCH_BYTES = {"cpu": 512 << 20, "cuda": 3 << 30}
MIN_BATCH_TOKENS, MAX_BATCH_TOKENS = 64, {"cpu": 1024, "cuda": 4096}
MAX_THREADS = 32
_SCORE_ROWS = 256  # queries per span in forward.py
_THREAD_BYTES = 24 << 20  # what BLAS packs, the stack, the heap's own slack


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples that share a KV cache: tokens ``first`` to ``last`` of the stream, cut at ``starts``.

    A pack holds as many samples as fit one batch, or a single longer one, which then runs in several batches.
    """

    first: int
    last: int
    starts: tuple[int, ...]

    def batches(self, most: int) -> Iterator[tuple[int, int, list[Segment]]]:
        """(first token, last token, segments) of each batch; rows of the segments count from ``first``."""
        ends = (*self.starts[1:], self.last)
        if self.last - self.first <= most:
            segments = [Segment(a - self.first, 0, b - a) for a, b in zip(self.starts, ends, strict=True)]
            yield self.first, self.last, segments
            return
        for start in range(self.first, self.last, most):
            end = min(start + most, self.last)
            yield start, end, [Segment(0, start - self.first, end - start)]


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """What a calibration needs, known before it starts. ``memory_bytes`` is beyond the bare interpreter.

    Blocks and residual streams are exact. The arrays of a batch are counted at their worst moment; what the libraries
    take themselves, on the host and on the GPU (``device_bytes``), is an estimate.
    """

    device: str
    samples: int
    tokens: int
    threads: int
    batch_tokens: int
    packs: tuple[Pack, ...]
    block_bytes: int
    memory_bytes: int
    device_bytes: int
    disk_bytes: int


def plan_calibration(snapshot: Snapshot, lengths: Sequence[int], device: str = "cpu") -> CalibrationPlan:
    """Batches and peak memory for samples of ``lengths`` tokens. Reads no weights.

    On the CPU: the largest block as it is stored, and for each thread a widened panel and the arrays of one batch. On
    a GPU: two buffers of the largest block (one is filled while the other runs), all residual streams, the positions of
    all batches, the arrays of one batch, and a constant for CUDA itself.
    """
    _check_name(device)
    if not lengths or min(lengths) < 1:
        raise UsageError("calibration-empty", "There is no text to calibrate with.", next="Give at least one sample.")
    spec = snapshot.spec
    per_token = _bytes_per_token(spec)
    threads = min(MAX_THREADS, available_cpus()) if device == "cpu" else 1
    fits = BATCH_BYTES[device] // (threads * per_token)
    # Enough batches to keep all threads busy to the end.
    share = -(-sum(lengths) // (4 * threads))
    batch = max(MIN_BATCH_TOKENS, min(MAX_BATCH_TOKENS[device], fits, share))
    packs = tuple(_packs(lengths, batch))
    threads = min(threads, len(packs))
    longest = max(pack.last - pack.first for pack in packs)
    kv_bytes = 2 * max(spec.kv_heads_per_block) * spec.head_size * 4 * longest
    # Scores of one span, and of the softmax and the fold that follow.
    score_bytes = 2 * spec.query_heads * min(_SCORE_ROWS, max(lengths)) * max(lengths) * 4
    batch_bytes = min(batch, longest) * per_token + kv_bytes + (score_bytes if spec.attention_blocks else 0)
    block_bytes = max(_block_bytes(snapshot, i) for i in range(len(spec.blocks)))
    stream_bytes = sum(lengths) * spec.hidden_size * 4
    on_gpu, device_bytes = device == "cuda", 0
    if on_gpu:
        held = max(held_bytes(snapshot, i) for i in range(len(spec.blocks)))
        step_bytes = sum(lengths) * (4 * spec.head_size + 8)
        device_bytes = 2 * held + stream_bytes + step_bytes + batch_bytes + TorchDevice.FIXED_BYTES
    return CalibrationPlan(
        device=device,
        samples=len(lengths),
        tokens=sum(lengths),
        threads=threads,
        batch_tokens=batch,
        packs=packs,
        block_bytes=block_bytes,
        memory_bytes=TorchDevice.HOST_BYTES
        if on_gpu
        else block_bytes + threads * (batch_bytes + 4 * PANEL_VALUES + _THREAD_BYTES),
        device_bytes=device_bytes,
        disk_bytes=2 * stream_bytes,
    )


def check_device(device: str) -> None:
    """Raise ``UsageError`` for an unknown device, ``ToolchainError`` for one that is not there."""
    _check_name(device)
    if device == "cuda":
        import_torch(device)


def calibrate(
    snapshot: Snapshot,
    sequences: Sequence[Sequence[int]],
    plan: CalibrationPlan,
    state: State,
    *,
    device: Device | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[BlockScales]:
    """Scales of block 0, 1, ... of ``snapshot`` for token ids ``sequences``, each as soon as it is known.

    Blocks that ``state`` knows from an interrupted run come at once and unchanged. Ends early, without an error,
    when ``stopped()``. Raises ``IntegrityError`` when an activation is NaN or Inf, with the block and the linear, and
    ``DoesNotFit`` when the GPU's memory is full.
    """
    with gpu_memory_errors():
        yield from _calibrate(snapshot, sequences, plan, state, device, stopped)


def _calibrate(
    snapshot: Snapshot,
    sequences: Sequence[Sequence[int]],
    plan: CalibrationPlan,
    state: State,
    device: Device | None,
    stopped: Callable[[], bool],
) -> Iterator[BlockScales]:
    spec = snapshot.spec
    device = device or (NumpyDevice(snapshot) if plan.device == "cpu" else TorchDevice(snapshot))
    known = state.scales()
    yield from known
    if len(known) == len(spec.blocks):
        return
    stream = device.stream(state, plan.tokens)
    if state.saved is None:
        _embed(device, stream, sequences, plan)
        state.begin()
    with blas_threads(available_cpus() // plan.threads), ThreadPoolExecutor(plan.threads) as pool:
        for i, weights in device.blocks(state.saved or 0):
            scales = _run(device, i, weights, stream, plan, pool, stopped)
            del weights
            if scales is None:
                return
            saved = stream.turn(i + 1)
            if i >= len(known):
                state.add(i, scales, saved=saved)
                yield scales
            elif saved:
                # The writer may have used the earlier result; the two differ only if the machine does.
                state.note_saved(i + 1)


def weight_scales(snapshot: Snapshot) -> Iterator[BlockScales]:
    """Scales of the weights alone, block by block: activations are left to be scaled at run time."""
    device = NumpyDevice(snapshot)
    for i, weights in device.blocks(0):
        maxima = _weight_maxima(device, i, weights)
        del weights
        yield BlockScales({group: GroupScales(scale_of(amax), None) for group, amax in maxima.items()}, None)


class _Watch:
    """``LinearFn`` that notes the largest absolute input of every linear. NaN and Inf show in the maximum."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.maxima: dict[str, Array] = {}

    def __call__(self, name: str, x: Array, weight: Any) -> Array:
        self.note(name, x)
        return self._device.linear(x, weight)

    def note(self, name: str, x: Array) -> None:
        self.keep(name, self._device.amax(x))

    def keep(self, name: str, peak: Array) -> None:
        before = self.maxima.get(name)
        self.maxima[name] = peak if before is None else self._device.larger(before, peak)


def _run(
    device: Device,
    index: int,
    weights: Any,
    stream: Stream,
    plan: CalibrationPlan,
    pool: ThreadPoolExecutor,
    stopped: Callable[[], bool],
) -> BlockScales | None:
    """All samples through one block. ``None`` when it was told to stop."""
    # First, since a broken weight is better named than the activations that it breaks.
    weight_maxima = _weight_maxima(device, index, weights)
    watch = _Watch(device)

    def work(pack: Pack) -> dict[str, Array]:
        return {} if stopped() else _run_pack(device, index, weights, stream, plan.batch_tokens, pack)

    for found in pool.map(work, plan.packs):
        for name, peak in found.items():
            watch.keep(name, peak)
    if stopped():
        return None
    maxima = {name: float(value) for name, value in watch.maxima.items()}
    for name, amax in maxima.items():
        if not math.isfinite(amax):
            raise _not_finite(index, name)
    scales = {
        group: GroupScales(scale_of(amax), scale_of(maxima[_short(group)])) for group, amax in weight_maxima.items()
    }
    kv = KvScales(scale_of(maxima["keys"]), scale_of(maxima["values"])) if "keys" in maxima else None
    return BlockScales(scales, kv)


def _run_pack(device: Device, index: int, weights: Any, stream: Stream, most: int, pack: Pack) -> dict[str, Array]:
    """The samples of one pack through one block; the maxima that they gave."""
    spec, block = device.snapshot.spec, device.snapshot.spec.blocks[index]
    watch = _Watch(device)
    cache: Any = None
    with np.errstate(all="ignore"):  # NaN and Inf are looked for by name
        for first, last, segments in pack.batches(most):
            hidden = stream.read(first, last)
            if cache is None:
                cache = new_cache(spec, block, pack.last - pack.first, hidden)
            # Only attention looks at positions.
            step: Any = device.step(segments, hidden) if cache is not None else None
            stream.write(first, run_block(spec, block, weights, hidden, step, cache, watch))
        if cache is not None:
            watch.note("keys", cache.keys)
            watch.note("values", cache.values)
    return watch.maxima


def _weight_maxima(device: Device, index: int, weights: Any) -> dict[str, float]:
    """Largest absolute weight of every group. Raises ``IntegrityError`` with the tensor and the place of NaN or Inf."""
    maxima = {}
    for group, names in quant_groups(device.snapshot.spec, index).items():
        maxima[group] = device.weight_amax(getattr(weights, _short(group)))
        if not math.isfinite(maxima[group]):
            for info in (device.snapshot.tensors[name] for name in names):
                bf16_bits(read_array(info, bits=True).reshape(-1).view(np.uint8), info, 0, Buffers())
    return maxima


def _embed(device: Device, stream: Stream, sequences: Sequence[Sequence[int]], plan: CalibrationPlan) -> None:
    ids = np.concatenate([np.asarray(s, np.int64) for s in sequences])
    for first in range(0, plan.tokens, plan.batch_tokens):
        part = ids[first : first + plan.batch_tokens]
        stream.write(first, device.embed(part))
    stream.turn(0)


def _check_name(device: str) -> None:
    if device not in DEVICES:
        raise UsageError("bad-device", f"--device {device!r} is unknown.", why=f"Known: {', '.join(DEVICES)}.")


def _short(group: str) -> str:
    """``qkv`` of ``model.layers.3.qkv``: the name in ``BlockWeights``."""
    return group.rsplit(".", 1)[-1]


def _packs(lengths: Sequence[int], most: int) -> Iterator[Pack]:
    """Neighbouring samples together, up to ``most`` tokens."""
    first, starts, at = 0, [0], lengths[0]
    for length in lengths[1:]:
        if at + length - first > most:
            yield Pack(first, at, tuple(starts))
            first, starts = at, []
        starts.append(at)
        at += length
    yield Pack(first, at, tuple(starts))


def _bytes_per_token(spec: ModelSpec) -> int:
    """Bytes of all temporary float32 arrays for one token of a batch, at the worst moment of the widest block."""
    hidden = 3 * spec.hidden_size  # the stream, its normalised form, the sum
    widest = 0
    for block in spec.blocks:
        if isinstance(block.attention, Attention):
            kv_width = block.attention.kv_heads * spec.head_size
            # q and k before and after the rotation with one product, v, the scaled queries, the context and its fold.
            widest = max(widest, 6 * (spec.query_width + kv_width) + kv_width)
        if isinstance(block.ffn, Mlp):
            # gate and up, and two or three of the results of SiLU.
            widest = max(widest, 5 * block.ffn.width)
    return 4 * (hidden + max(widest, spec.hidden_size))


def _block_bytes(snapshot: Snapshot, index: int) -> int:
    prefix = f"model.layers.{index}."
    return sum(t.nbytes for name, t in snapshot.tensors.items() if name.startswith(prefix))


def _not_finite(index: int, name: str) -> IntegrityError:
    where = f"the {name} of block {index}" if name in ("keys", "values") else f"the input of {name} in block {index}"
    return IntegrityError(
        "activation-not-finite",
        f"Calibration met NaN or Inf in {where}.",
        why="The weights before that place are broken, or grow the activations beyond float32.",
        next="Fetch the model again; if that does not help, the published weights are broken.",
    )
