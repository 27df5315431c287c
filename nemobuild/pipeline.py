"""``build``: from a profile to a model repository, doing only what is not done yet, and saying why.

Three artefacts stand on each other: checkpoint, engine, repository. Each records what it was made from (see
``artefacts``); a step compares that with what the plan wants now, and either keeps the folder or names the fields that
differ. So a changed limit of the engine never converts weights again, and a changed default of the chat rewrites the
repository only.

Everything that can be refused is refused before the first step: what does not fit, flags that contradict each other,
a missing builder, another GPU, a folder that is not ours.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemobuild.artefacts import MANIFEST, artefact, key_of, reasons, stages_of, wanted
from nemobuild.config import load_profile
from nemobuild.engine import tensorrt
from nemobuild.engine.builder import Builder, Where, find_builder
from nemobuild.engine.container import Mount, docker_run
from nemobuild.errors import UsageError
from nemobuild.folders import recover, replace_folder
from nemobuild.model.hf_config import load_spec
from nemobuild.places import check_owner, load_plan, note_owner, place, source_folder
from nemobuild.plan.planner import Plan
from nemobuild.plan.report import does_not_fit
from nemobuild.triton.engine_files import check_same_model
from nemobuild.triton.launch import serve_commands
from nemobuild.wheels import file_lock

Action = Literal["keep", "make", "remake"]


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one artefact, and why. ``elapsed_s`` and ``report`` are set once it is done."""

    stage: str
    folder: Path
    action: Action
    why: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    report: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How to build. ``timing_cache`` is a file of TensorRT's timings to use instead of the last build's own."""

    where: Where = "auto"
    resume: bool = False
    device: str = "cpu"
    timing_cache: Path | None = None


OnStep = Callable[[Step], None]
# (stage, bytes done, bytes in all, what is at work)
OnProgress = Callable[[str, int, int, str], None]


def steps(name: str, options: Options = Options()) -> list[Step]:
    """What ``build`` would do. Reads manifests and headers, changes nothing."""
    check_owner(name)
    if _is_fetched(name) or load_profile(name).model.known is None:
        return _decide(_plan(name), name, options)
    absent = [Step(stage, place(name, stage), "make", ("it is not there yet",)) for stage in stages_of(_plan(name))]
    return [_snapshot_step(name), *absent]


def build(
    name: str,
    options: Options = Options(),
    *,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> list[Step]:
    """Bring checkpoint, engine and repository of profile ``name`` to what its plan wants.

    ``on_step`` is told of every step before and after it. Raises ``DoesNotFit`` when the plan does not, and what
    fetching, converting, building and emitting raise; then all artefacts are as they were, or done.
    """
    tell, progress = on_step or (lambda step: None), on_progress or (lambda *_: None)
    check_owner(name)
    if not _is_fetched(name):
        if load_profile(name).model.known is not None:  # all that can be refused is, before a long download
            _find_builder(_plan(name), name, options)
        _fetch(name, tell, progress)
    plan = _plan(name)
    decided = _decide(plan, name, options)
    if all(step.action == "keep" for step in decided):
        return decided
    for step in decided:
        if step.action == "remake" and not (step.folder / MANIFEST).is_file():
            raise UsageError(
                "not-ours",
                f"{step.folder} was not made by nemobuild.",
                why=f"It has no {MANIFEST}, so it is not replaced.",
                next="Move it away, then run the same command again.",
            )
    builder = None
    if any(step.stage == "engine" and step.action != "keep" for step in decided):
        builder = _find_builder(plan, name, options)
    done: list[Step] = []
    with _only_one(name):
        for stage in stages_of(plan):
            recover(place(name, stage))
            # Once more: what the step before has made may be what was there already.
            step = _step(plan, name, stage, options, ())
            tell(step)
            if step.action != "keep":
                started_s = time.monotonic()
                report = _make(plan, name, stage, options, builder, progress)
                step = replace(step, elapsed_s=time.monotonic() - started_s, report=report)
                tell(step)
            done.append(step)
    return done


def commands(plan: Plan, profile: str | None = None) -> list[tuple[str, list[str]]]:
    """Title and line of everything that ``build`` and ``serve`` run for ``plan``, in order.

    ``profile`` is the YAML file of a profile that does not ship with nemobuild.
    """
    name = profile or plan.name
    lines = [("fetch the weights", ["nemobuild", "fetch", name])]
    if "checkpoint" in stages_of(plan):
        lines.append(("convert them", ["nemobuild", "convert", name]))
    if "engine" in stages_of(plan):
        assert plan.toolchain is not None
        checkpoint, engine = place(name, "checkpoint"), place(name, "engine")
        argv = tensorrt.build_command(plan, checkpoint, engine)
        mounts = (Mount(checkpoint), Mount(engine, writable=True))
        container = docker_run(
            plan.toolchain, argv, mounts, gpus=range(plan.profile.build.workers), name="nemobuild-build"
        )
        lines += [
            ("make room for the engine", ["mkdir", "-p", str(engine.absolute())]),
            ("build it in the container", container),
            ("or where trtllm-build is installed", argv),
        ]
    lines.append(("write the repository", ["nemobuild", "repo", name]))
    return [*lines, *serve_commands(plan, place(name, "repository"))]


def _plan(name: str) -> Plan:
    plan = load_plan(name)
    if not plan.fits:
        raise does_not_fit(plan)
    return plan


def _decide(plan: Plan, name: str, options: Options) -> list[Step]:
    source = source_folder(name)
    check_same_model(plan, source, load_spec(source))
    decided: list[Step] = []
    for stage in stages_of(plan):
        changed = tuple(f"{s.stage} is made anew" for s in decided[-1:] if s.action != "keep")
        decided.append(_step(plan, name, stage, options, changed))
    return decided


def _step(plan: Plan, name: str, stage: str, options: Options, changed: tuple[str, ...]) -> Step:
    """Whether ``stage`` is to be made; ``changed`` says that what it stands on will be another."""
    folder = place(name, stage)
    if not folder.exists():
        wanted(plan, name, stage, options.timing_cache)  # what cannot be wanted is refused now
        return Step(stage, folder, "make", ("it is not there yet",))
    why = reasons(plan, name, stage, options.timing_cache) or changed
    return Step(stage, folder, "remake" if why else "keep", why)


def _make(
    plan: Plan, name: str, stage: str, options: Options, builder: Builder | None, progress: OnProgress
) -> Mapping[str, object]:
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


def _convert(plan: Plan, name: str, folder: Path, options: Options, progress: OnProgress) -> Mapping[str, object]:
    from nemobuild.convert import executor, quantize
    from nemobuild.convert.workers import Progress
    from nemobuild.weights.snapshot import open_snapshot

    form = plan.profile.checkpoint
    snapshot = open_snapshot(source_folder(name), fp8=form.precision == "fp8")
    shape: dict[str, Any] = {
        "format": form.format,
        "kv_cache": form.kv_cache,
        "tp": form.tensor_parallel,
        "pp": form.pipeline_parallel,
    }
    target = folder if not folder.exists() else folder.with_name(f"{folder.name}.new")

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
        report = quantize.quantize(prepared, target, resume=options.resume, progress=show)
    else:
        report = executor.convert(
            snapshot, target, precision=form.precision, **shape, resume=options.resume, progress=show
        )
    if target != folder:
        replace_folder(target, folder)
    return {"key": report.key, "files": dict(report.files), "resumed_bytes": report.resumed_bytes}


def _emit(plan: Plan, name: str, folder: Path, options: Options) -> Mapping[str, object]:
    from nemobuild.triton.repository import plan_repository, write_repository

    inputs = wanted(plan, name, "repository", options.timing_cache)
    repository = plan_repository(plan, source_folder(name), artefact(plan, name), inputs=inputs)
    target = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(target, ignore_errors=True)
    write_repository(repository, target)
    replace_folder(target, folder)
    return {"files": len(repository.files), "size_bytes": repository.size_bytes}


def _find_builder(plan: Plan, name: str, options: Options) -> Builder | None:
    """What builds the engine of ``plan``, if it has one; its flags are checked as well."""
    if "engine" not in stages_of(plan):
        return None
    wanted(plan, name, "engine", options.timing_cache)
    return find_builder(plan, options.where)


def _is_fetched(name: str) -> bool:
    return place(name, "snapshot").is_dir() or Path(load_profile(name).model.source).is_dir()


def _snapshot_step(name: str) -> Step:
    return Step("snapshot", place(name, "snapshot"), "make", ("it is not there yet",))


def _fetch(name: str, tell: OnStep, progress: OnProgress) -> None:
    from nemobuild.sources import fetch_source

    step = _snapshot_step(name)
    tell(step)
    started_s = time.monotonic()
    fetch_source(name, None, None, lambda done, total: progress("snapshot", done, total, ""))
    tell(replace(step, elapsed_s=time.monotonic() - started_s, report={}))


@contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Two builds of one profile would write the same folders."""
    with file_lock(place(name, "build").with_name(".build.lock"), busy=f"Another build of {name} is at work."):
        note_owner(name)
        yield
