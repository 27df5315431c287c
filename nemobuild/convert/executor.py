"""Carries a conversion out: in parallel, with memory that does not grow with the model, all or nothing.

The main thread flushes the rank files while the workers go on, and only then notes the flushed jobs in the
journal. That starts write-back early, keeps the last flush short, and makes the journal true after a power cut.

An FP8 conversion is the same with one difference: the scales of a block are asked for when its first job is due, so
that calibration can run one block ahead and the converter reads the block from the page cache.

A finished folder appears by one rename. Wrong data leave nothing behind; a kill leaves the partial folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemobuild.convert.bf16 import Buffers
from nemobuild.convert.fp8 import requantization_error
from nemobuild.convert.fp8_map import scale_value
from nemobuild.convert.journal import Journal, refuse_existing
from nemobuild.convert.planning import Plan, check_space, identity
from nemobuild.convert.planning import prepare as prepare
from nemobuild.convert.scales import BlockScales, check_scales, dump_scales
from nemobuild.convert.sources import Requantized
from nemobuild.convert.workers import Job, Progress, Run, count_job, make_jobs, start
from nemobuild.errors import IntegrityError, NemobuildError, from_os_error
from nemobuild.weights.safetensors import ShardWriter
from nemobuild.weights.snapshot import Snapshot, fingerprint

ScalesOfBlock = Callable[[int], BlockScales]
SYNC_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Report:
    """What was done. ``source_bytes`` counts the whole model, ``resumed_bytes`` what an earlier run had done.

    ``requantized`` are FP8 weights that were rounded again, ``zero_tensors`` weights of nothing but zeros in FP8.
    """

    output: Path
    key: str
    files: dict[str, int]
    source_bytes: int
    target_bytes: int
    resumed_bytes: int
    elapsed_s: float
    workers: int
    peak_memory_bytes: int
    requantized: tuple[Requantized, ...] = ()
    zero_tensors: tuple[str, ...] = ()


def convert(
    snapshot: Snapshot,
    output: Path,
    *,
    precision: str = "bf16",
    format: str = "trtllm",
    kv_cache: str = "bf16",
    clamp_kv: bool = True,
    static: bool = True,
    tp: int = 1,
    pp: int = 1,
    scales: Sequence[BlockScales] | ScalesOfBlock | None = None,
    calibration: Mapping[str, Any] | None = None,
    on_stop: Callable[[], None] | None = None,
    workers: int | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    durable: bool = True,
) -> Report:
    """Write a checkpoint of ``snapshot`` to the new folder ``output``: BF16 or FP8, in either format.

    FP8 needs ``scales``, for an FP8 source its own: those of all blocks, or a function that gives the scales of a block
    and may wait for them. The function is called from the worker threads, for each block in order, perhaps twice, and
    needs ``calibration`` to say what it depends on. ``on_stop`` is called when the conversion ends early, before the
    workers are waited for, so that such a wait can end with an error.

    ``progress`` is called from the worker threads, one call at a time. ``durable=False`` leaves write-back to the
    kernel, as ``cp`` does: a power cut may then damage the result, a kill may not.

    Raises ``UsageError`` (path, split, leftover), ``DoesNotFit`` (disk), ``IntegrityError`` (weights that are damaged,
    not finite or too large for BF16). After any of these nothing is left; after a kill or an interrupt, and after a
    device error, the partial folder stays for ``resume``.
    """
    started_s = time.monotonic()
    output = Path(output).absolute()
    if calibration is None and scales is not None:
        if callable(scales):
            raise ValueError("scales that are found while converting need a description of where they come from")
        calibration = {"scales": hashlib.sha256(dump_scales(scales).encode()).hexdigest()}
    plan = prepare(
        snapshot,
        precision=precision,
        format=format,
        kv_cache=kv_cache,
        clamp_kv=clamp_kv,
        static=static,
        tp=tp,
        pp=pp,
        calibration=calibration,
        workers=workers,
    )
    if plan.form.fp8 and (scales is None) == (plan.source is None):
        raise ValueError("FP8 needs scales, and an FP8 source brings its own")
    refuse_existing(output)
    check_space(output, plan)
    journal = Journal(output, identity(plan), resume=resume)
    try:
        given = plan.source.blocks if plan.source else scales
        ask = _asker(plan, snapshot, journal, given if callable(given) or given is None else given.__getitem__)
        work = _execute(snapshot, plan, journal, ask, progress, on_stop, started_s, durable)
        _commit(snapshot, plan, journal, work)
    except NemobuildError as error:
        if error.code != "io-error":
            journal.discard()
        raise
    finally:
        journal.close()
    return Report(
        output=output,
        key=plan.key,
        files=work.files,
        source_bytes=plan.source_bytes,
        target_bytes=plan.target_bytes,
        resumed_bytes=work.resumed_bytes,
        elapsed_s=time.monotonic() - started_s,
        workers=plan.workers,
        peak_memory_bytes=plan.peak_memory_bytes,
        requantized=work.requantized,
        zero_tensors=work.zero_tensors,
    )


def _asker(plan: Plan, snapshot: Snapshot, journal: Journal, scales: ScalesOfBlock | None) -> ScalesOfBlock | None:
    """``scales``, checked and noted in the journal, whose own come first: what was begun ends with the same scales."""
    if scales is None:
        return None
    known, lock, spec = journal.scales, threading.Lock(), snapshot.spec

    def ask(block: int) -> BlockScales:
        if block not in known:
            # Outside of the lock: jobs of earlier blocks go on while this waits for the calibration.
            found = scales(block)
            check_scales(found, spec, block, static=plan.form.static, kv=plan.form.fp8_kv)
            with lock:
                if block not in known:
                    journal.add_scales(block, found)
                    known[block] = found
        return known[block]

    return ask


@dataclass(frozen=True, slots=True)
class _Work:
    files: dict[str, int]
    resumed_bytes: int
    requantized: tuple[Requantized, ...]
    zero_tensors: tuple[str, ...]


def _execute(
    snapshot: Snapshot,
    plan: Plan,
    journal: Journal,
    scales: ScalesOfBlock | None,
    progress: Callable[[Progress], None] | None,
    on_stop: Callable[[], None] | None,
    started_s: float,
    durable: bool,
) -> _Work:
    """Run all jobs that the journal lacks, then write the scales."""
    writers: list[ShardWriter] = []
    try:
        for file, rank in zip(plan.product.files, plan.tensor_map.ranks, strict=True):
            tensors = [(t.name, t.dtype, t.shape) for t in rank]
            path, keep = journal.folder / file, bool(journal.done)
            writers.append(ShardWriter(path, tensors, metadata=plan.product.metadata, keep=keep))
        if journal.done and not all(writer.kept for writer in writers):
            journal.forget()
        jobs = list(make_jobs(plan.tensor_map, snapshot.tensors, writers))
        done = [job for i, job in enumerate(jobs) if i in journal.done]
        todo = [(i, job) for i, job in enumerate(jobs) if i not in journal.done]
        resumed_bytes = plan.source_bytes - sum(job.source_bytes for _, job in todo)
        run = Run(iter(todo), writers, progress, plan.source_bytes, resumed_bytes, resumed_bytes, started_s)
        run.scales = scales
        if plan.source is not None:
            run.source_scales = plan.source.weights
            run.counts = {name: np.zeros(256, np.int64) for name in plan.source.requantized}
        threads = start(run, plan.workers)
        try:
            zeros = _follow(run, journal, jobs, len(threads), durable)
        except BaseException:
            run.stop = True
            if on_stop is not None:
                on_stop()
            raise
        finally:
            run.stop = True
            for thread in threads:
                thread.join()
        if scales is not None:
            _write_scales(plan, writers, scales)
        for writer in writers:
            writer.close(sync=durable)
        return _Work(
            files={writer.path.name: writer.file_bytes for writer in writers},
            resumed_bytes=resumed_bytes,
            requantized=_requantized(plan, run, done),
            zero_tensors=_zero_tensors(jobs, zeros),
        )
    finally:
        for writer in writers:
            writer.close(sync=False)


def _follow(run: Run, journal: Journal, jobs: list[Job], workers: int, durable: bool) -> set[int]:
    """Flush and journal what the workers finish, until the last of them has left. Raises the first error.

    Gives the numbers of all jobs that met nothing but zeros.
    """
    batch: list[int] = []
    zeros = set(journal.zeros)
    while workers:
        item = run.finished.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            workers -= 1
            continue
        batch.append(item.number)
        if item.zeros:
            zeros.add(item.number)
        if sum(jobs[i].source_bytes for i in batch) >= SYNC_BYTES:
            if durable:
                for writer in run.writers:
                    writer.sync()
            journal.add(batch, zeros)
            batch = []
    return zeros


def _write_scales(plan: Plan, writers: list[ShardWriter], scales: ScalesOfBlock) -> None:
    """All scale tensors: a few bytes for each, and all blocks are known by now."""
    for writer, targets in zip(writers, plan.tensor_map.ranks, strict=True):
        for target in targets:
            if target.scale is not None:
                value = scale_value(target.scale, scales(target.scale.block), clamp_kv=plan.form.clamped)
                writer.write(target.name, np.array([value], "<f4").data)


def _requantized(plan: Plan, run: Run, done: list[Job]) -> tuple[Requantized, ...]:
    """What the second rounding cost. Jobs ``done`` by an earlier run are counted now, so that a resumed run reports
    the same."""
    if plan.source is None:
        return ()
    buffers = Buffers()
    for job in done:
        if job.name in run.counts:
            count_job(run, job, buffers)
    found = []
    for name, scale in plan.source.requantized.items():
        before = plan.source.weights[name]
        found.append(Requantized(name, before, scale, requantization_error(run.counts[name], before, scale)))
    return tuple(sorted(found, key=lambda r: -r.relative_error))


def _zero_tensors(jobs: list[Job], zeros: set[int]) -> tuple[str, ...]:
    """Sources of which every job met nothing but zeros."""
    others = {job.name for i, job in enumerate(jobs) if i not in zeros}
    return tuple(dict.fromkeys(jobs[i].name for i in sorted(zeros) if jobs[i].name not in others))


def _commit(snapshot: Snapshot, plan: Plan, journal: Journal, work: _Work) -> None:
    shards = {t.file.name for t in snapshot.tensors.values()}
    if fingerprint(snapshot.path, sorted(shards)) != snapshot.fingerprint:
        raise IntegrityError(
            "source-changed",
            f"{snapshot.path} changed while it was converted.",
            next="Run the same command again when nothing writes to that folder.",
        )
    for name, source in plan.product.carried.items():
        _copy(source, journal.folder / name)
    for name, text in plan.product.documents.items():
        _write(journal.folder / name, text)
    names = (*plan.product.documents, *plan.product.carried)
    sizes = {name: (journal.folder / name).stat().st_size for name in names} | work.files
    manifest: dict[str, Any] = {"key": plan.key, "inputs": plan.inputs, "files": sizes}
    if plan.form.fp8:
        requantized = [asdict(r) for r in work.requantized]
        manifest["fp8"] = {"requantized": requantized, "zero_tensors": work.zero_tensors}
    _write(journal.folder / "manifest.json", json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    journal.commit()


def _write(path: Path, text: str) -> None:
    try:
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise from_os_error(error, path, "writing") from error


def _copy(source: Path, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as old, path.open("wb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())
    except OSError as error:
        raise from_os_error(error, path, "copying to") from error
