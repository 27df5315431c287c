"""``migrate``: the same model on the runtime ``llmapi``, for whoever is left where the line of engines ends.

A profile for the other runtime is derived, both are built, and both are served and asked: the contract must be the
same to the letter (``gates.conformance``), the weights as good (``gates.quality``), the answers as right
(``gates.prompts``). Speed is told and not judged: it is the reason for some to stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nemobuild.config import EngineConfig, load_profile
from nemobuild.errors import UsageError, from_os_error
from nemobuild.gates import conformance, prompts, quality, served
from nemobuild.gates.report import Report, Stage, stored_bytes, write_report
from nemobuild.gates.results import Gate
from nemobuild.pipeline import AS_IT_IS, OnProgress, OnStep, Options, build, stage_keys
from nemobuild.places import place, profile_name, source_folder
from nemobuild.plan.gpus import load_gpu
from nemobuild.sources import recorded_source
from nemobuild.store import Publication, Store

RUNTIME = "llmapi"
_EVERYWHERE = ("max_num_tokens", "kv_cache_fraction")  # of `build`, for either GPU runtime


@dataclass(frozen=True, slots=True)
class Migrated:
    """``left_out`` are fields of the old profile that mean nothing to the new runtime."""

    profile: Path
    left_out: tuple[str, ...]
    gates: tuple[Gate, ...]
    report: Path
    publication: Publication | None


def derive(profile: EngineConfig, name: str, gpu: str | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The profile for ``llmapi`` as its YAML will hold it, and the fields that were left out.

    ``gpu`` is the card of a profile that names none. Raises ``UsageError`` when there is nothing to migrate.
    """
    if profile.runtime == RUNTIME:
        raise UsageError("already-there", f"{name} is of the runtime {RUNTIME} already.", next="Nothing is to be done.")
    data = profile.model_dump(exclude_unset=True)
    if profile.machine is None:
        if gpu is None:
            raise UsageError("no-gpu", f"{name} names no GPU.", next="Name one of `nemobuild plan --gpu` with --gpu.")
        data["machine"] = {"gpu": load_gpu(gpu).name, "count": profile.checkpoint.ranks}
    elif gpu is not None:
        raise UsageError("useless-option", f"--gpu would do nothing: {name} names {profile.machine.gpu}.")
    build = data.pop("build", {})
    left_out = [f"build.{field}" for field in build if field not in _EVERYWHERE]
    kept = {field: value for field, value in build.items() if field in _EVERYWHERE}
    form = {"format": "hf"} | {k: v for k, v in data.get("checkpoint", {}).items() if k not in ("format", "kv_scales")}
    if "kv_scales" in data.get("checkpoint", {}):
        left_out.append("checkpoint.kv_scales")
    data |= {"description": f"{profile.description} Migrated to {RUNTIME}.", "runtime": RUNTIME, "checkpoint": form}
    data |= {"build": kept} if kept else {}
    try:
        EngineConfig.model_validate(data)
    except ValidationError as error:
        raise UsageError(
            "cannot-migrate", f"{name} cannot become a profile of {RUNTIME}.", why=f"{error.errors()[0]['msg']}."
        ) from error
    return data, tuple(left_out)


def migrate(
    name: str,
    options: Options = AS_IT_IS,
    *,
    target: Path | None = None,
    gpu: str | None = None,
    report: Path | None = None,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Migrated:
    """Write the profile ``target`` (default: ``NAME-llmapi.yaml`` here), build both, and compare them.

    What passes is published under the new profile. Raises what building and serving raise; a gate that fails is told
    in the result.
    """
    profile = load_profile(name)
    data, left_out = derive(profile, name, gpu)
    target = target or Path(f"{profile_name(name)}-{RUNTIME}.yaml")
    _write_profile(target, data)
    other, store = str(target), Store()
    build(name, options, on_step=on_step, on_progress=on_progress)
    _share_snapshot(name, other, store)
    steps = build(other, options, on_step=on_step, on_progress=on_progress)
    gates, pictures = _judge(name, other, store, options, on_note)
    passed = all(gate.passed for gate in gates)
    publication = _publish(other, store, f"migrated from {name}") if passed else None
    failed = " and ".join(gate.name for gate in gates if not gate.passed)
    found = Report(
        title=f"{profile_name(name)} on {RUNTIME}",
        verdict=f"{RUNTIME} keeps the contract." if passed else f"Not the same: {failed} failed.",
        profile=profile_name(other),
        revisions=(None, None),
        changed=[f"runtime: {profile.runtime} -> {RUNTIME}", *(f"{field}: left out" for field in left_out)],
        stages=[
            Stage(s.stage, s.action, s.why, s.elapsed_s, stored_bytes(store, s.stage, str(s.key)), None) for s in steps
        ],
        gates=gates,
        made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        pictures=pictures,
    )
    return Migrated(target, left_out, gates, write_report(found, report or place(other, "report")), publication)


def _judge(
    name: str, other: str, store: Store, options: Options, on_note: Callable[[str], None]
) -> tuple[tuple[Gate, ...], dict[str, str]]:
    old, new = ({stage: store.path(stage, key) for stage, key in stage_keys(which).items()} for which in (name, other))
    profile, source = load_profile(other), source_folder(other)
    gates, pictures = [], {}
    if "checkpoint" in new:
        on_note("verifying the checkpoint against its source")
        gate, picture = quality.verified(new["checkpoint"], source, profile)
        gates.append(gate)
        pictures = {} if picture is None else {"verify": picture}
    on_note("comparing the weights of both")
    model, before = (found.get("checkpoint", source) for found in (new, old))
    gates.append(quality.against_last(model, source, before, source, profile))
    found = served.put_to_work(
        {RUNTIME: new["repository"], "before": old["repository"]},
        profile,
        place(other, "gates").absolute(),
        conforming=True,
        where=options.where,
        on_note=on_note,
    )
    this, that = found[RUNTIME], found["before"]
    speed = served.speed_gate(this.cells, that.cells, profile.gates)
    told = tuple(replace(check, passed=None) if "before" in check.what else check for check in speed.checks)
    gates += [
        conformance.gate(this.facts, that.facts),
        prompts.gate(this.answers, that.answers, profile.gates),
        replace(speed, checks=told),
    ]
    return tuple(gates), pictures


def _publish(other: str, store: Store, note: str) -> Publication:
    keys, current = stage_keys(other), store.current(profile_name(other))
    if current is not None and (dict(current.keys), current.gates) == (keys, "passed"):
        return current
    commit = recorded_source(place(other, "snapshot"))[1] or None
    return store.publish(profile_name(other), keys, revision=commit, gates="passed", note=note)


def _share_snapshot(name: str, other: str, store: Store) -> None:
    """The weights are those of the old profile, also when the branch has moved on since."""
    held = store.holds(place(name, "snapshot"))
    if held is not None and store.holds(place(other, "snapshot")) != held:
        store.restore(*held, place(other, "snapshot"))


def _write_profile(target: Path, data: dict[str, Any]) -> None:
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    try:
        if target.exists():
            if target.read_text(encoding="utf-8") == text:
                return
            raise UsageError(
                "file-exists",
                f"{target} exists and says something else.",
                next="Name another file with --output, or move it away.",
            )
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, target, "writing") from error
