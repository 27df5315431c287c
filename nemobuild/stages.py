"""How each artefact of a profile is made. Whether it has to be is decided in ``pipeline``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemobuild.artefacts import artefact, key_of, wanted
from nemobuild.engine import tensorrt
from nemobuild.engine.builder import Builder, Where
from nemobuild.errors import UsageError
from nemobuild.folders import replace_folder
from nemobuild.places import place, source_folder
from nemobuild.plan.planner import Plan

# (stage, bytes done, bytes in all, what is at work)
OnProgress = Callable[[str, int, int, str], None]
Report = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Options:
    """How to build. ``timing_cache`` is a file of TensorRT's timings to use instead of the last build's own."""

    where: Where = "auto"
    device: str = "cpu"
    timing_cache: Path | None = None


def make(plan: Plan, name: str, stage: str, options: Options, builder: Builder | None, progress: OnProgress) -> Report:
    """Make ``stage`` of profile ``name`` anew, in its place. What a run that was killed left of it is gone on with."""
    folder = place(name, stage)
    if stage == "checkpoint":
        return _convert(plan, name, folder, options, progress)
    if stage == "engine":
        assert builder is not None
        report = tensorrt.build(
            plan,
            place(name, "checkpoint"),
            folder,
            builder=builder,
            checkpoint_key=key_of(place(name, "checkpoint")),
            log=folder.with_name("engine.log"),
            timing_cache=options.timing_cache or tensorrt.known_timing_cache(folder),
            on_line=lambda line: progress(stage, 0, 0, line),
        )
        return asdict(report) | {"engine": str(report.engine), "log": str(report.log)}
    return _emit(plan, name, folder, options)


def _convert(plan: Plan, name: str, folder: Path, options: Options, progress: OnProgress) -> Report:
    from nemobuild.convert import journal, quantize

    target = _beside(folder)
    try:
        report = _convert_to(target, plan, name, options, progress)
    except UsageError as error:
        if error.code != "resume-mismatch":
            raise
        for left in (journal.partial_folder(target), quantize.calibration_folder(target)):
            shutil.rmtree(left, ignore_errors=True)  # of other inputs: of no use to this build
        report = _convert_to(target, plan, name, options, progress)
    replace_folder(target, folder)
    return report


def _convert_to(target: Path, plan: Plan, name: str, options: Options, progress: OnProgress) -> Report:
    from nemobuild.convert import executor, quantize
    from nemobuild.convert.workers import Progress
    from nemobuild.weights.snapshot import open_snapshot

    form = plan.profile.checkpoint
    snapshot = open_snapshot(source_folder(name), fp8=form.precision == "fp8")
    shape: dict[str, Any] = {
        "format": form.format,
        "kv_cache": form.kv_cache,
        "tp": form.files_for[0],
        "pp": form.files_for[1],
    }

    def show(now: Progress) -> None:
        progress("checkpoint", now.done_bytes, now.total_bytes, now.tensor)

    if form.precision == "fp8":
        given = form.calibration
        texts = given.texts if given.texts in (None, quantize.NO_DATA) else Path(given.texts)
        prepared = quantize.prepare(
            snapshot,
            **shape,
            clamp_kv=form.kv_scales == "clamped",
            calibration=texts,
            samples=given.samples,
            tokens_per_sample=given.tokens_per_sample,
            reasoning=plan.profile.reasoning.policy,
            device=options.device,
        )
        report = quantize.quantize(prepared, target, resume=True, progress=show)
    else:
        report = executor.convert(snapshot, target, precision=form.precision, **shape, resume=True, progress=show)
    return {"key": report.key, "files": dict(report.files), "resumed_bytes": report.resumed_bytes}


def _emit(plan: Plan, name: str, folder: Path, options: Options) -> Report:
    from nemobuild.triton.repository import plan_repository, write_repository

    inputs = wanted(plan, name, "repository", options.timing_cache)
    repository = plan_repository(plan, source_folder(name), artefact(plan, name), inputs=inputs)
    target = _beside(folder)
    write_repository(repository, target)
    replace_folder(target, folder)
    return {"files": len(repository.files), "size_bytes": repository.size_bytes}


def _beside(folder: Path) -> Path:
    """Where the new artefact is made. A whole one that is there was not put in its place before a kill."""
    target = folder.with_name(f"{folder.name}.new")
    for left in (target, *folder.parent.glob(f".{target.name}.partial-*")):
        shutil.rmtree(left, ignore_errors=True)
    return target
