"""Carries a conversion out: in parallel, with memory that does not grow with the model, all or nothing.

The main thread flushes the rank files while the workers go on, and only then notes the flushed jobs in the
journal. That starts write-back early, keeps the last flush short, and makes the journal true after a power cut.

A finished folder appears by one rename. Wrong data leave nothing behind; a kill leaves the partial folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from nemobuild.convert import trtllm
from nemobuild.convert.bf16 import BUFFERS_PER_CHUNK
from nemobuild.convert.journal import Journal, partial_folder, refuse_existing
from nemobuild.convert.tensor_map import TensorMap, as_matrix, check
from nemobuild.convert.workers import CHUNK_BYTES, JOB_BYTES, Job, Progress, Run, default_workers, make_jobs, start
from nemobuild.errors import DoesNotFit, IntegrityError, NemobuildError, UsageError, from_os_error
from nemobuild.units import format_bytes
from nemobuild.weights.safetensors import ITEM_BYTES, ShardWriter
from nemobuild.weights.snapshot import Snapshot, fingerprint

SYNC_BYTES = 64 << 20
# Interpreter with NumPy and the CLI, and the head room of the allocator.
BASE_MEMORY_BYTES = 96 << 20
# Room for config.json, manifest.json, the journal and the folder itself.
SMALL_FILES_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do, proved, before any weight is read."""

    tensor_map: TensorMap
    config: dict[str, Any]
    inputs: dict[str, Any]
    source_bytes: int
    target_bytes: int
    workers: int
    peak_memory_bytes: int

    @property
    def key(self) -> str:
        """sha256 (hex) of all inputs and tool versions; equal keys give equal bytes."""
        return hashlib.sha256(_canonical(self.inputs).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Report:
    """What was done. ``source_bytes`` counts the whole model, ``resumed_bytes`` what an earlier run had done."""

    output: Path
    key: str
    files: dict[str, int]
    source_bytes: int
    target_bytes: int
    resumed_bytes: int
    elapsed_s: float
    workers: int
    peak_memory_bytes: int


def prepare(snapshot: Snapshot, *, tp: int = 1, pp: int = 1, workers: int | None = None) -> Plan:
    """Plan and prove a BF16 conversion to a TensorRT-LLM checkpoint; reads no weights.

    Raises ``UsageError`` for a split that the model does not allow.
    """
    tensor_map = trtllm.tensor_map(snapshot.spec, tp, pp)
    check(tensor_map, snapshot.tensors)
    config = trtllm.checkpoint_config(snapshot.spec, tp, pp)
    targets = [t for rank in tensor_map.ranks for t in rank]
    widest = max(as_matrix(t.shape)[1] for t in snapshot.tensors.values())
    if workers is None:
        workers = default_workers()
    if workers < 1:
        raise UsageError("bad-workers", f"{workers} workers cannot convert anything.", next="Give at least 1.")
    worker_bytes = BUFFERS_PER_CHUNK * max(CHUNK_BYTES, 4 * widest)
    inputs = {
        "stage": "convert",
        "format": "trtllm",
        "snapshot": snapshot.fingerprint,
        "tensor_map": tensor_map.digest(),
        "config": config,
        "tools": {"nemobuild": _version()},
    }
    return Plan(
        tensor_map=tensor_map,
        config=config,
        inputs=inputs,
        source_bytes=snapshot.weight_bytes,
        target_bytes=sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in targets),
        workers=workers,
        peak_memory_bytes=BASE_MEMORY_BYTES + workers * worker_bytes,
    )


def convert(
    snapshot: Snapshot,
    output: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    workers: int | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    durable: bool = True,
) -> Report:
    """Write the BF16 TensorRT-LLM checkpoint of ``snapshot`` to the new folder ``output``.

    ``progress`` is called from the worker threads, one call at a time. ``durable=False`` leaves write-back to the
    kernel, as ``cp`` does: a power cut may then damage the result, a kill may not.

    Raises ``UsageError`` (path, split, leftover), ``DoesNotFit`` (disk), ``IntegrityError`` (weights that are damaged,
    not finite or too large for BF16). After any of these nothing is left; after a kill or an interrupt, and after a
    device error, the partial folder stays for ``resume``.
    """
    started_s = time.monotonic()
    output = Path(output).absolute()
    plan = prepare(snapshot, tp=tp, pp=pp, workers=workers)
    refuse_existing(output)
    _check_space(output, plan)
    journal = Journal(output, _identity(plan, snapshot, tp, pp), resume=resume)
    try:
        files, resumed_bytes = _execute(snapshot, plan, journal, progress, started_s, durable)
        _commit(snapshot, plan, journal, files)
    except NemobuildError as error:
        if error.code != "io-error":
            journal.discard()
        raise
    finally:
        journal.close()
    return Report(
        output=output,
        key=plan.key,
        files=files,
        source_bytes=plan.source_bytes,
        target_bytes=plan.target_bytes,
        resumed_bytes=resumed_bytes,
        elapsed_s=time.monotonic() - started_s,
        workers=plan.workers,
        peak_memory_bytes=plan.peak_memory_bytes,
    )


def _identity(plan: Plan, snapshot: Snapshot, tp: int, pp: int) -> dict[str, str]:
    """What a partial folder is bound to; the names are shown when they differ."""
    return {
        "source files": snapshot.fingerprint,
        "tp": str(tp),
        "pp": str(pp),
        "nemobuild version": _version(),
        "plan": f"{plan.key} in jobs of {JOB_BYTES} bytes",
    }


def _check_space(output: Path, plan: Plan) -> None:
    folder, partial = output.parent, partial_folder(output)
    try:
        folder = next(p for p in output.parents if p.exists())
        system = os.statvfs(folder)
        reserved_bytes = sum(f.stat().st_blocks * 512 for f in partial.iterdir()) if partial.is_dir() else 0
    except OSError as error:
        raise from_os_error(error, folder, "looking at") from error
    free_bytes = system.f_bavail * system.f_frsize
    needed_bytes = plan.target_bytes + SMALL_FILES_BYTES - reserved_bytes
    # Pseudo file systems have no size at all; what they refuse shows when the folder is made.
    if system.f_blocks and free_bytes < needed_bytes:
        raise DoesNotFit(
            "disk-full",
            f"{folder} has {format_bytes(free_bytes)} free; the checkpoint needs {format_bytes(needed_bytes)}.",
            why="Space is checked before the first weight is read.",
            next="Free some space or choose another folder.",
        )


def _execute(
    snapshot: Snapshot,
    plan: Plan,
    journal: Journal,
    progress: Callable[[Progress], None] | None,
    started_s: float,
    durable: bool,
) -> tuple[dict[str, int], int]:
    """Run all jobs that the journal lacks. Gives the rank files with their sizes, and the bytes done before."""
    writers: list[ShardWriter] = []
    try:
        paths = [journal.folder / f"rank{n}.safetensors" for n in range(len(plan.tensor_map.ranks))]
        for path, rank in zip(paths, plan.tensor_map.ranks, strict=True):
            writers.append(ShardWriter(path, [(t.name, t.dtype, t.shape) for t in rank], keep=bool(journal.done)))
        if journal.done and not all(writer.kept for writer in writers):
            journal.forget()
        jobs = list(make_jobs(plan.tensor_map, snapshot.tensors, writers))
        todo = [(i, job) for i, job in enumerate(jobs) if i not in journal.done]
        resumed_bytes = plan.source_bytes - sum(job.source_bytes for _, job in todo)
        total_bytes = plan.source_bytes
        run = Run(iter(todo), writers, progress, total_bytes, resumed_bytes, resumed_bytes, started_s)
        threads = start(run, plan.workers)
        try:
            _follow(run, journal, jobs, len(threads), durable)
        finally:
            run.stop = True
            for thread in threads:
                thread.join()
        for writer in writers:
            writer.close(sync=durable)
        return {writer.path.name: writer.file_bytes for writer in writers}, resumed_bytes
    finally:
        for writer in writers:
            writer.close(sync=False)


def _follow(run: Run, journal: Journal, jobs: list[Job], workers: int, durable: bool) -> None:
    """Flush and journal what the workers finish, until the last of them has left. Raises the first error."""
    batch: list[int] = []
    while workers:
        item = run.finished.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            workers -= 1
            continue
        batch.append(item)
        if sum(jobs[i].source_bytes for i in batch) >= SYNC_BYTES:
            if durable:
                for writer in run.writers:
                    writer.sync()
            journal.add(batch)
            batch = []


def _commit(snapshot: Snapshot, plan: Plan, journal: Journal, files: Mapping[str, int]) -> None:
    shards = {t.file.name for t in snapshot.tensors.values()}
    if fingerprint(snapshot.path, sorted(shards)) != snapshot.fingerprint:
        raise IntegrityError(
            "source-changed",
            f"{snapshot.path} changed while it was converted.",
            next="Run the same command again when nothing writes to that folder.",
        )
    config = json.dumps(plan.config, indent=2) + "\n"
    sizes = {"config.json": len(config.encode()), **files}
    manifest = json.dumps({"key": plan.key, "inputs": plan.inputs, "files": sizes}, indent=2, sort_keys=True) + "\n"
    for name, text in (("config.json", config), ("manifest.json", manifest)):
        path = journal.folder / name
        try:
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise from_os_error(error, path, "writing") from error
    journal.commit()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _version() -> str:
    try:
        return metadata.version("nemobuild")
    except metadata.PackageNotFoundError:
        return "unknown"
