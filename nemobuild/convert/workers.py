"""The jobs of a conversion and the threads that do them.

The work is cut by source, not by target: a job reads a run of rows of one source tensor once and serves every
rank file from it, so the source is read once however many ranks there are. Threads are enough, since read,
write and the NumPy loops all release the interpreter. Chunks stay in the cache between the read, the search
for NaN and Inf, the cast, and the write.

A job of an FP8 model needs the scales of its block, and may have to wait for the calibration to find them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemobuild.convert.bf16 import Buffers, bf16_bits
from nemobuild.convert.fp8 import count_codes, fp8_codes
from nemobuild.convert.scales import BlockScales, block_of
from nemobuild.convert.tensor_map import TensorMap, as_matrix
from nemobuild.errors import from_os_error
from nemobuild.weights.safetensors import ITEM_BYTES, ShardWriter, TensorInfo, read_into, write_from

CHUNK_BYTES = 1 << 20
JOB_BYTES = 32 << 20
MAX_WORKERS = 8
PROGRESS_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """``done_bytes`` of ``total_bytes`` of the source are converted, ``resumed_bytes`` of them by an earlier run."""

    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    elapsed_s: float
    tensor: str


@dataclass(frozen=True, slots=True)
class _Move:
    """Rows x columns of the source go to ``offset`` (of the first row) in the file of ``rank``."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    offset: int


@dataclass(frozen=True, slots=True)
class Job:
    """Rows of one source and everything that is made of them. Zeros have no source; ``group`` is set for FP8."""

    name: str
    source: TensorInfo | None
    rows: tuple[int, int]
    source_bytes: int
    moves: tuple[_Move, ...]
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A finished job; ``zeros``: all its weights are zero."""

    number: int
    zeros: bool


@dataclass(slots=True)
class Run:
    """What the threads of one conversion share.

    ``scales`` gives the scales of a block and may block; ``source_scales`` are those of FP8 sources by weight.
    ``counts`` has 256 counters for each weight whose codes are to be counted.
    """

    jobs: Iterator[tuple[int, Job]]
    writers: list[ShardWriter]
    progress: Callable[[Progress], None] | None
    total_bytes: int
    resumed_bytes: int
    done_bytes: int
    started_s: float
    scales: Callable[[int], BlockScales] | None = None
    source_scales: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    reported_s: float = 0.0
    stop: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: SimpleQueue[Done | BaseException | None] = field(default_factory=SimpleQueue)


def default_workers() -> int:
    """One per CPU; beyond a few the disk is the limit."""
    return min(MAX_WORKERS, available_cpus())


def available_cpus() -> int:
    """CPUs that this process may run on, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def make_jobs(tensor_map: TensorMap, sources: Mapping[str, TensorInfo], writers: list[ShardWriter]) -> Iterator[Job]:
    """The map turned around: by source, cut into runs of rows of about ``JOB_BYTES``."""
    uses: dict[str, list[_Move]] = {}
    groups: dict[str, str | None] = {}
    for rank, (targets, writer) in enumerate(zip(tensor_map.ranks, writers, strict=True)):
        for target in targets:
            if not target.pieces:
                continue
            place = writer.tensors[target.name]
            row_bytes = as_matrix(target.shape)[1] * ITEM_BYTES[target.dtype]
            for piece in target.pieces:
                move = _Move(rank, piece.rows, piece.columns, place.offset + piece.at * row_bytes)
                if piece.source is None:
                    yield Job(target.name, None, piece.rows, 0, (move,))
                else:
                    uses.setdefault(piece.source, []).append(move)
                    groups[piece.source] = piece.group
    for name, moves in uses.items():
        source = sources[name]
        rows, columns = as_matrix(source.shape)
        row_bytes = columns * ITEM_BYTES[source.dtype]
        step = max(1, JOB_BYTES // row_bytes)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            part = tuple(m for m in moves if m.rows[0] < last and first < m.rows[1])
            yield Job(name, source, (first, last), (last - first) * row_bytes, part, groups[name])


def start(run: Run, count: int) -> list[threading.Thread]:
    """Start ``count`` workers. Each puts what is done into ``run.finished``, an error if one ends it, and None."""
    threads = [threading.Thread(target=_work, args=(run,), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def _work(run: Run) -> None:
    buffers = Buffers()
    try:
        while not run.stop:
            with run.lock:
                number, job = next(run.jobs, (-1, None))
            if job is None:
                break
            zeros = _do(run, job, buffers)
            if zeros is not None:
                run.finished.put(Done(number, zeros))
    except BaseException as error:
        run.stop = True
        run.finished.put(error)
    finally:
        run.finished.put(None)


def _do(run: Run, job: Job, buffers: Buffers) -> bool | None:
    """Carry one job out. Tells whether all its weights are zero (FP8 only), or None when it was told to stop."""
    if job.source is None:
        for move in job.moves:
            count = (move.rows[1] - move.rows[0]) * (move.columns[1] - move.columns[0])
            writer = run.writers[move.rank]
            write_from(writer.fd, np.zeros(count, np.uint16).data, move.offset, writer.path)
        return False
    scale, zeros = 0.0, job.group is not None
    if job.group is not None:
        assert run.scales is not None
        scale = run.scales(block_of(job.group)).groups[job.group].weight
    columns = as_matrix(job.source.shape)[1]
    for start, raw in chunks(job, buffers):
        if run.stop:
            return None
        if job.group is None:
            block = bf16_bits(raw, job.source, start * columns, buffers)
        else:
            source_scale = run.source_scales.get(job.name, 1.0)
            block, empty = fp8_codes(raw, job.source, start * columns, scale, source_scale, buffers)
            zeros = zeros and empty
            _count(run, job.name, raw)
        block = block.reshape(-1, columns)
        for move in job.moves:
            _put(run.writers[move.rank], move, block, start, buffers)
        _tell(run, job, raw.nbytes, final=start + len(block) == job.rows[1])
    return zeros


def chunks(job: Job, buffers: Buffers) -> Iterator[tuple[int, NDArray[Any]]]:
    """First row and bytes of each chunk of the source of ``job``; the memory is used again for the next."""
    assert job.source is not None
    row_bytes = as_matrix(job.source.shape)[1] * ITEM_BYTES[job.source.dtype]
    step = max(1, CHUNK_BYTES // row_bytes)
    try:
        fd = os.open(job.source.file, os.O_RDONLY)
    except OSError as error:
        raise from_os_error(error, job.source.file, "reading") from error
    try:
        for start in range(*job.rows, step):
            raw = buffers.get("raw", "u1", (min(start + step, job.rows[1]) - start) * row_bytes)
            read_into(fd, raw.data, job.source.offset + start * row_bytes, job.source.file)
            yield start, raw
    finally:
        os.close(fd)


def count_job(run: Run, job: Job, buffers: Buffers) -> None:
    """Count the codes of a job that an earlier run did."""
    for _, raw in chunks(job, buffers):
        _count(run, job.name, raw)


def _count(run: Run, name: str, raw: NDArray[Any]) -> None:
    if name in run.counts:
        counts = np.zeros(256, np.int64)
        count_codes(raw, counts)
        with run.lock:
            run.counts[name][...] += counts


def _put(writer: ShardWriter, move: _Move, block: NDArray[Any], start: int, buffers: Buffers) -> None:
    """Write what ``move`` takes of ``block``, whose first row is row ``start`` of the source."""
    r0, r1 = max(start, move.rows[0]), min(start + len(block), move.rows[1])
    if r0 >= r1:
        return
    c0, c1 = move.columns
    part = block[r0 - start : r1 - start, c0:c1]
    if c1 - c0 < block.shape[1]:
        gathered = buffers.get("gathered", "u1", part.nbytes).view(block.dtype).reshape(part.shape)
        np.copyto(gathered, part)
        part = gathered
    write_from(writer.fd, part.data, move.offset + (r0 - move.rows[0]) * (c1 - c0) * part.itemsize, writer.path)


def _tell(run: Run, job: Job, count_bytes: int, *, final: bool) -> None:
    with run.lock:
        run.done_bytes += count_bytes
        if run.progress is None:
            return
        now_s = time.monotonic()
        if final or now_s - run.reported_s >= PROGRESS_INTERVAL_S:
            run.reported_s = now_s
            elapsed_s = now_s - run.started_s
            run.progress(Progress(run.done_bytes, run.total_bytes, run.resumed_bytes, elapsed_s, job.name))
