"""``build``: from a profile to a model repository, doing only what is not done yet, and saying why.

Three artefacts stand on each other: checkpoint, engine, repository. Each records what it was made from (see
``artefacts``); a step compares that with what the plan wants now, and keeps the folder, or names the fields that
differ. So a changed limit of the engine never converts weights again, and a changed default of the chat rewrites the
repository only. What differs is looked for in the store before it is made, and what is made is committed to it.

Everything that can be refused is refused before the first step: what does not fit, flags that contradict each other,
a missing builder, another GPU, a folder that is not ours. What an artefact is made from is read once more before that,
and compared with the digests in the store, so that a damaged file goes no further.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemobuild.artefacts import MANIFEST, SOURCE, input_key, reasons, snapshot_key, stages_of, store_key, wanted
from nemobuild.config import load_profile
from nemobuild.engine import tensorrt
from nemobuild.engine.builder import Builder, find_builder
from nemobuild.engine.container import Mount, docker_run
from nemobuild.errors import IntegrityError, NemobuildError, UsageError
from nemobuild.folders import recover
from nemobuild.model.hf_config import load_json, load_spec
from nemobuild.places import check_owner, load_plan, note_owner, place, profile_name, source_folder
from nemobuild.plan.planner import Plan
from nemobuild.plan.report import does_not_fit
from nemobuild.sources import fetch_source, known_source
from nemobuild.stages import OnProgress, Options, make
from nemobuild.store import Publication, Store
from nemobuild.triton.engine_files import check_same_model
from nemobuild.triton.launch import serve_commands
from nemobuild.wheels import file_lock

__all__ = ["OnProgress", "OnStep", "Options", "Step", "build", "commands", "publish", "restore", "stage_keys", "steps"]

Action = Literal["keep", "make", "remake", "reuse"]
AS_IT_IS = Options()


@dataclass(frozen=True, slots=True)
class Step:
    """What happens to one artefact, and why. ``elapsed_s`` and ``report`` are set once it is done.

    ``key`` is its key in the store, as soon as that is known.
    """

    stage: str
    folder: Path
    action: Action
    why: tuple[str, ...] = ()
    key: str | None = None
    elapsed_s: float = 0.0
    report: Mapping[str, object] | None = None


OnStep = Callable[[Step], None]


def steps(name: str, options: Options = AS_IT_IS) -> list[Step]:
    """What ``build`` would do. Reads manifests and headers, changes nothing."""
    check_owner(name)
    if _is_fetched(name) or load_profile(name).model.known is None:
        return _decide(_plan(name), name, options, Store())
    absent = [Step(stage, place(name, stage), "make", ("it is not there yet",)) for stage in stages_of(_plan(name))]
    return [_snapshot_step(name, Store()), *absent]


def build(
    name: str,
    options: Options = AS_IT_IS,
    *,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
) -> list[Step]:
    """Bring checkpoint, engine and repository of profile ``name`` to what its plan wants, and into the store.

    ``on_step`` is told of every step before and after it. Raises ``DoesNotFit`` when the plan does not, and what
    fetching, converting, building and emitting raise; then all artefacts are as they were, or done.
    """
    tell, progress, store = on_step or (lambda step: None), on_progress or (lambda *_: None), Store()
    check_owner(name)
    if not _is_fetched(name):
        if load_profile(name).model.known is not None:  # all that can be refused is, before a long download
            _find_builder(_plan(name), name, options)
        _fetch(name, store, tell, progress)
    plan = _plan(name)
    decided = _decide(plan, name, options, store)
    if all(step.action == "keep" for step in decided) and not _unstored(plan, name, decided, store):
        return decided
    _refuse_others(decided)
    if any(step.action in ("make", "remake") for step in decided) or _unstored(plan, name, decided, store):
        store.check_writable()
    builder = None
    if any(step.stage == "engine" and step.action in ("make", "remake") for step in decided):
        builder = _find_builder(plan, name, options)
    # What is fetched is read by the conversion and by the store at the same time.
    with _only_one(name), ThreadPoolExecutor(1, thread_name_prefix="store") as beside:
        storing = beside.submit(_store_snapshot, name, store)
        done: list[Step] = []
        for stage, then in zip(stages_of(plan), [*decided[1:], None], strict=True):
            recover(place(name, stage))
            # Once more: what the step before has made may be what was there already.
            step = _step(plan, name, stage, options, store)
            if step.action == "keep" and then is not None and then.action in ("make", "remake"):
                step = _checked(step, plan, name, options, store)
            tell(step)
            step = _carry_out(step, plan, name, options, builder, store, progress)
            if step.report is not None:
                tell(step)
            done.append(step)
        storing.result()
    return done


def stage_keys(name: str) -> dict[str, str]:
    """Keys in the store of what the places of profile ``name`` hold, by stage; the snapshot too if it was fetched.

    Raises ``UsageError`` when a place is empty, or holds what is not in the store.
    """
    plan, store = load_plan(name), Store()
    stages = [*(folder.name for folder in _own_snapshot(name)), *stages_of(plan)]
    held = {stage: _held(plan, name, stage, store) for stage in stages}
    if absent := [stage for stage in stages if held[stage] is None]:
        raise UsageError(
            "not-built", f"The {absent[0]} of {name} is not in the store.", next=f"Type `nemobuild build {name}`."
        )
    return {stage: found[1] for stage, found in held.items() if found is not None}


def publish(name: str, note: str = "") -> Publication:
    """Publish what the places of ``name`` hold, without gates; nothing new when that is current already."""
    store, keys = Store(), stage_keys(name)
    current = store.current(profile_name(name))
    if current is not None and dict(current.keys) == keys:
        return current
    revision = _source(name).get("commit")
    return store.publish(profile_name(name), keys, revision=revision, gates="not run", note=note)


def restore(name: str, publication: Publication) -> None:
    """Put the artefacts of ``publication`` into the places of ``name``, verified; those that are there stay."""
    store = Store()
    with _only_one(name):
        for stage, key in publication.keys.items():
            recover(place(name, stage))
            if store.holds(place(name, stage)) != (stage, key):
                store.restore(stage, key, place(name, stage))


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


def _decide(plan: Plan, name: str, options: Options, store: Store) -> list[Step]:
    source = source_folder(name)
    check_same_model(plan, source, load_spec(source))
    decided: list[Step] = []
    for stage in stages_of(plan):
        before = decided[-1] if decided else None
        if before is not None and before.action in ("make", "remake"):
            folder, changed = place(name, stage), (f"{before.stage} is made anew",)
            wanted(plan, name, stage, options.timing_cache)  # what cannot be wanted is refused now
            why = reasons(plan, name, stage, options.timing_cache) if folder.exists() else ("it is not there yet",)
            decided.append(Step(stage, folder, "remake" if folder.exists() else "make", why or changed))
        else:
            below = store.path(before.stage, str(before.key)) if before and before.action == "reuse" else None
            decided.append(_step(plan, name, stage, options, store, below))
    return decided


def _step(plan: Plan, name: str, stage: str, options: Options, store: Store, below: Path | None = None) -> Step:
    """What to do for ``stage``, where what it stands on is there: in its place, or in ``below``."""
    folder = place(name, stage)
    why: tuple[str, ...] = ("it is not there yet",)
    if folder.exists():
        why = reasons(plan, name, stage, options.timing_cache, below)
        if not why:
            return Step(stage, folder, "keep", (), (store.holds(folder) or (stage, None))[1])
        why = _named_weights(why, name, folder, store)
    key = input_key(plan, name, stage, options.timing_cache, below)
    return Step(stage, folder, _action(folder, stored=store.has(stage, key)), why, key)


def _action(folder: Path, *, stored: bool) -> Action:
    return "reuse" if stored else "remake" if folder.exists() else "make"


def _checked(step: Step, plan: Plan, name: str, options: Options, store: Store) -> Step:
    """A step that was to keep what another artefact will be made from, after all of its bytes were read."""
    held = store.holds(step.folder)
    try:
        if held is not None:
            store.verify(*held, step.folder)
    except IntegrityError as error:
        key = input_key(plan, name, step.stage, options.timing_cache)
        return replace(step, action=_action(step.folder, stored=store.has(step.stage, key)), why=(error.what,), key=key)
    return step


def _carry_out(
    step: Step, plan: Plan, name: str, options: Options, builder: Builder | None, store: Store, progress: OnProgress
) -> Step:
    stage, folder, key = step.stage, step.folder, step.key
    if step.action == "keep":
        if stage in _unstored(plan, name, [step], store):
            key = input_key(plan, name, stage, options.timing_cache)
            store.commit(stage, key, folder, _about(plan, name, stage, options, 0.0))
        return replace(step, key=key)
    assert key is not None
    started_s = time.monotonic()
    with store.making(stage, key):  # another process may have made it meanwhile
        if store.has(stage, key):
            try:
                store.restore(stage, key, folder)
                return replace(step, action="reuse", elapsed_s=time.monotonic() - started_s, report={})
            except IntegrityError as error:
                store.discard(stage, key)
                step = replace(step, action=_action(folder, stored=False), why=(*step.why, error.what))
        if stage == stages_of(plan)[0]:
            _check_snapshot_bytes(name, store)
        if stage == "engine" and builder is None:
            builder = _find_builder(plan, name, options)
        report = make(plan, name, stage, options, builder, progress)
        elapsed_s = time.monotonic() - started_s
        store.commit(stage, key, folder, _about(plan, name, stage, options, elapsed_s))
    return replace(step, elapsed_s=elapsed_s, report=report)


def _held(plan: Plan, name: str, stage: str, store: Store) -> tuple[str, str] | None:
    """The object that a place holds. A store that can only be read has no note of places: there its key is asked."""
    folder = place(name, stage)
    held = store.holds(folder)
    if held is None and folder.is_dir() and not store.is_writable():
        key = snapshot_key(folder) if stage == "snapshot" else input_key(plan, name, stage)
        held = (stage, key) if key is not None and store.matches(stage, key, folder) else None
    return held


def _unstored(plan: Plan, name: str, decided: list[Step], store: Store) -> list[str]:
    """Stages of which the place is as it should be, but not in the store."""
    present = [folder.name for folder in _own_snapshot(name)]
    present += [step.stage for step in decided if step.action == "keep"]
    return [stage for stage in present if _held(plan, name, stage, store) is None]


def _about(plan: Plan, name: str, stage: str, options: Options, elapsed_s: float) -> dict[str, object]:
    """What is known of an artefact beside its bytes: where it comes from, and from what it was made."""
    stages, store = ["snapshot", *stages_of(plan)], Store()
    below = stages[stages.index(stage) - 1]
    held = store.holds(place(name, below))
    return {
        "profile": plan.name,
        "source": _source(name),
        "stands_on": {} if held is None else {held[0]: held[1]},
        "inputs": dict(wanted(plan, name, stage, options.timing_cache)),
        "elapsed_s": round(elapsed_s, 3),
    }


def _named_weights(why: tuple[str, ...], name: str, folder: Path, store: Store) -> tuple[str, ...]:
    """``weights changed: revision a1b2 -> c3d4`` in the place of two digests, where both revisions are known."""
    held = store.holds(folder)
    if held is None or not any(reason.startswith("source ") for reason in why):
        return why
    before = store.record(*held)["about"].get("source", {}).get("commit")
    now = _source(name).get("commit")
    if not before or not now or before == now:
        return why
    named = f"weights changed: revision {before[:12]} -> {now[:12]}"
    return tuple(named if reason.startswith("source ") else reason for reason in why)


def _refuse_others(decided: list[Step]) -> None:
    for step in decided:
        if step.action != "keep" and step.folder.exists() and not (step.folder / MANIFEST).is_file():
            raise UsageError(
                "not-ours",
                f"{step.folder} was not made by nemobuild.",
                why=f"It has no {MANIFEST}, so it is not replaced.",
                next="Move it away, then run the same command again.",
            )


def _find_builder(plan: Plan, name: str, options: Options) -> Builder | None:
    """What builds the engine of ``plan``, if it has one; its flags are checked as well."""
    if "engine" not in stages_of(plan):
        return None
    wanted(plan, name, "engine", options.timing_cache)
    return find_builder(plan, options.where)


def _is_fetched(name: str) -> bool:
    return place(name, "snapshot").is_dir() or Path(load_profile(name).model.source).is_dir()


def _own_snapshot(name: str) -> list[Path]:
    """The snapshot that was fetched for ``name``; none where its source is a folder of the user's."""
    return [] if Path(load_profile(name).model.source).is_dir() else [place(name, "snapshot")]


def _source(name: str) -> dict[str, Any]:
    """Where the weights come from, as far as it is known."""
    folder = source_folder(name)
    try:
        known = load_json(folder / SOURCE)
    except NemobuildError:
        return {"folder": str(folder.absolute())}
    return {field: value for field, value in known.items() if field != "files"}


def _snapshot_step(name: str, store: Store) -> Step:
    model, folder = load_profile(name).model, place(name, "snapshot")
    known = known_source(model.source, model.revision)
    key = store_key("snapshot", known) if known else None
    stored = key is not None and store.has("snapshot", key)
    return Step("snapshot", folder, _action(folder, stored=stored), ("it is not there yet",), key)


def _fetch(name: str, store: Store, tell: OnStep, progress: OnProgress) -> None:
    step = _snapshot_step(name, store)
    tell(step)
    started_s = time.monotonic()
    if step.action == "reuse":
        store.restore("snapshot", str(step.key), step.folder)
    else:
        store.check_writable()
        fetch_source(name, None, None, lambda done, total: progress("snapshot", done, total, ""))
    tell(replace(step, elapsed_s=time.monotonic() - started_s, report={}))


def _store_snapshot(name: str, store: Store) -> None:
    for folder in _own_snapshot(name):
        key = snapshot_key(folder)
        if key is not None and store.holds(folder) is None:
            about = {"profile": profile_name(name), "source": _source(name), "stands_on": {}, "inputs": {}}
            store.commit("snapshot", key, folder, about)


def _check_snapshot_bytes(name: str, store: Store) -> None:
    """Read all of what was fetched, before anything is made of it; put it back from the store when it was damaged."""
    for folder in _own_snapshot(name):
        if (held := store.holds(folder)) is not None:
            try:
                store.verify(*held, folder)
            except IntegrityError:
                store.restore(*held, folder)


@contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Two builds of one profile would write the same folders."""
    with file_lock(place(name, "build").with_name(".build.lock"), busy=f"Another build of {name} is at work."):
        note_owner(name)
        yield
