"""``rebuild``: newest revision in, proven version out. What got worse is not published, and what was good stays.

The newest commit of the source is brought to the profile's places, and ``build`` makes what it changes. Everything
that is made is in the store, so the gates read and serve the candidate from there: no other build can change it under
them. When all gates pass, the candidate becomes the next publication. Otherwise it is moved to ``failed/`` beside the
places, for study, and the places get back what is published, so ``serve`` never meets a version that failed.

A version that failed is judged again by the next run (its stages come from the store): a gate may have failed for a
reason that has gone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from nemobuild.artefacts import store_key
from nemobuild.config import EngineConfig, load_profile
from nemobuild.errors import ChildFailed, IntegrityError, NemobuildError, UsageError, from_os_error
from nemobuild.folders import recover, replace_folder
from nemobuild.gates import prompts, quality, served
from nemobuild.gates.report import Report, Stage, stored_bytes, write_report
from nemobuild.gates.results import Check, Gate
from nemobuild.pipeline import AS_IT_IS, OnProgress, OnStep, Options, Step, build, restore, stage_keys
from nemobuild.places import check_owner, place, profile_name, source_folder
from nemobuild.sources import is_hub_source, recorded_source
from nemobuild.store import Publication, Store
from nemobuild.wheels import file_lock

Status = Literal["nothing new", "published", "failed"]
OnNote = Callable[[str], None]
LAST = "last"


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """``publication`` is the current one afterwards; ``failed`` is where a candidate that was refused lies.

    ``rolled_back`` is the later version that the sources still ask for, and from which somebody went back.
    """

    status: Status
    revision: str | None
    publication: Publication | None
    gates: tuple[Gate, ...] = ()
    report: Path | None = None
    failed: Path | None = None
    rolled_back: int | None = None


def rebuild(
    name: str,
    options: Options = AS_IT_IS,
    *,
    since: str = LAST,
    report: Path | None = None,
    on_step: OnStep | None = None,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
) -> Rebuilt:
    """Bring profile ``name`` to the newest revision of its source, and publish that if it passes the gates.

    ``since`` is the publication to compare with: ``last``, or the beginning of the commit it was made of; the current
    one is then judged against that again. ``report`` is the folder for the report; default: ``build/PROFILE/report``.
    Raises what fetching, building and serving raise; the places then hold what is published.
    """
    profile, store, title = load_profile(name), Store(), profile_name(name)
    check_owner(name)
    tell, note = on_step or (lambda step: None), on_note or (lambda text: None)
    with file_lock(place(name, ".rebuild.lock"), busy=f"Another rebuild of {title} is at work."):
        current, last = store.current(title), _version(store, title, since)
        commit = _newest(profile)
        try:
            brought = _bring(name, profile, commit, store, tell, on_progress)
            steps = [*brought, *build(name, options, on_step=on_step, on_progress=on_progress)]
            keys = stage_keys(name)
            is_proven = current is not None and current.gates == "passed" and keys == dict(current.keys)
            if current is not None and current == last and is_proven:
                return Rebuilt("nothing new", commit, current)
            if current is not None and (undone := _undone(store, current, keys)) is not None:
                restore(name, current)
                return Rebuilt("nothing new", commit, current, rolled_back=undone)
            gates, pictures = judge(name, profile, store, keys, last, options, note)
        except NemobuildError:  # it is not judged, so it does not stay
            if current is not None:
                restore(name, current)
            raise
        passed = all(gate.passed for gate in gates)
        changed = [f"{step.stage}: {why}" for step in steps for why in step.why] or ["nothing is made anew"]
        aside = None
        if not passed:
            aside = _set_aside(name, keys, current)
        elif not is_proven:  # new, or what `up` had published without asking
            current = store.publish(title, keys, revision=commit, gates="passed", note="; ".join(changed)[:500])
        found = Report(
            title=f"Rebuild of {title}",
            verdict=_verdict(gates, current, last),
            profile=title,
            revisions=(last.revision if last else None, commit),
            changed=changed,
            stages=_stages(store, keys, last, steps),
            gates=gates,
            made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            pictures=pictures,
        )
        folder = write_report(found, report or place(name, "report"))
        if aside is not None:
            write_report(found, aside / "report")
    return Rebuilt("published" if passed else "failed", commit, current, gates, folder, aside)


def judge(
    name: str,
    profile: EngineConfig,
    store: Store,
    keys: Mapping[str, str],
    last: Publication | None,
    options: Options,
    on_note: OnNote,
) -> tuple[tuple[Gate, ...], dict[str, str]]:
    """All gates over the stored stages ``keys`` against publication ``last``, and pictures of what they found."""
    stored = {stage: store.path(stage, key) for stage, key in keys.items()}
    before = {} if last is None else {stage: store.path(stage, key) for stage, key in last.keys.items()}
    source = stored.get("snapshot") or source_folder(name)
    model, model_before = (found.get("checkpoint") or found.get("snapshot") for found in (stored, before))
    proven = before if last is not None and last.gates == "passed" else {}
    pictures: dict[str, str] = {}
    gates: list[Gate] = []
    if "checkpoint" not in stored:
        gates.append(Gate("verify", skipped="the source is served as it is"))
    elif stored["checkpoint"] == proven.get("checkpoint"):
        gates.append(Gate("verify", skipped="the checkpoint is that of the version before"))
    else:
        on_note("verifying the checkpoint against its source")
        verified, picture = quality.verified(stored["checkpoint"], source, profile)
        gates.append(verified)
        pictures |= {} if picture is None else {"verify": picture}
    if not gates[0].passed:
        why = "what does not verify is not served"
        return (*gates, *(Gate(other, skipped=why) for other in ("quality", "prompts", "speed"))), pictures
    if model is None or model_before is None:
        gates.append(Gate("quality", skipped="there is no version before to compare with"))
    elif model == model_before:
        gates.append(Gate("quality", skipped="the weights are those of the version before"))
    else:
        on_note("comparing the weights with those of the version before")
        gates.append(quality.against_last(model, source, model_before, before.get("snapshot", source), profile))
    if stored["repository"] == proven.get("repository"):
        why = "the repository is that of the version before"
        return (*gates, *(Gate(other, skipped=why) for other in ("prompts", "speed"))), pictures
    return (*gates, *_serve(name, profile, stored, before, options, on_note)), pictures


def _serve(
    name: str,
    profile: EngineConfig,
    stored: Mapping[str, Path],
    before: Mapping[str, Path],
    options: Options,
    on_note: OnNote,
) -> tuple[Gate, ...]:
    repositories = {"candidate": stored["repository"]}
    if "repository" in before:
        repositories["before"] = before["repository"]
    started_s = time.monotonic()
    try:
        found = served.put_to_work(
            repositories,
            profile,
            place(name, "gates").absolute(),
            may_fail=("before",),
            where=options.where,
            on_note=on_note,
        )
    except (ChildFailed, IntegrityError) as error:  # a machine that cannot serve at all is another error
        refused = Check("the candidate starts and answers", str(error), "", False)
        gate = Gate("prompts", (refused,), time.monotonic() - started_s)
        return gate, Gate("speed", skipped="the candidate does not serve")
    this, that = found["candidate"], found.get("before")
    return (
        prompts.gate(this.answers, that.answers if that else None, profile.gates),
        served.speed_gate(this.cells, that.cells if that else None, profile.gates),
    )


def _newest(profile: EngineConfig) -> str | None:
    """The newest commit of the profile's source; ``None`` for one without commits."""
    from nemobuild.weights import hub

    model = profile.model
    return hub.newest_commit(model.source, model.revision or "main") if is_hub_source(model.source) else None


def _bring(
    name: str, profile: EngineConfig, commit: str | None, store: Store, tell: OnStep, on_progress: OnProgress | None
) -> list[Step]:
    """Make the profile's snapshot that of ``commit``; the step that this took, if any."""
    from nemobuild.weights import hub

    folder, repo = place(name, "snapshot"), profile.model.source
    recover(folder)
    held = recorded_source(folder)
    if commit is None or held == (repo, commit):
        return []
    why = f"revision {held[1][:12]} -> {commit[:12]}" if held[0] == repo else f"{repo} at {commit[:12]}"
    key, started_s = store_key("snapshot", {"repo": repo, "commit": commit}), time.monotonic()
    is_stored = store.has("snapshot", key)
    action: Literal["reuse", "make", "remake"] = "reuse" if is_stored else "remake" if held[0] else "make"
    tell(Step("snapshot", folder, action, (why,)))
    if is_stored:
        store.restore("snapshot", key, folder)
    else:
        new = folder.with_name("snapshot.new")
        if new.exists() and recorded_source(new) != (repo, commit):
            shutil.rmtree(new)
        progress = on_progress or (lambda *_: None)
        before = folder if folder.is_dir() else None
        hub.fetch(repo, commit, new, progress=lambda done, all: progress("snapshot", done, all, ""), before=before)
        replace_folder(new, folder)
    return [Step("snapshot", folder, action, (why,), key, time.monotonic() - started_s, {})]


def _version(store: Store, title: str, since: str) -> Publication | None:
    if since == LAST:
        return store.current(title)
    known = store.publications(title)
    found = next((one for one in reversed(known) if (one.revision or "").startswith(since)), None)
    if found is None or not since:
        commits = ", ".join(dict.fromkeys(one.revision[:12] for one in known if one.revision)) or "none"
        raise UsageError(
            "no-publication", f"Nothing of {title} was published of {since!r}.", why=f"Known commits: {commits}."
        )
    return found


def _undone(store: Store, current: Publication, keys: Mapping[str, str]) -> int | None:
    """The version after ``current`` that is the same as the candidate: a timer must not undo a rollback."""
    later = [one for one in store.publications(current.profile) if one.number > current.number]
    return next((one.number for one in reversed(later) if dict(one.keys) == keys), None)


def _set_aside(name: str, keys: Mapping[str, str], current: Publication | None) -> Path:
    """Move what is not published out of the places, and put back what is."""
    aside = place(name, "failed") / keys["repository"][:12]
    published = {} if current is None else current.keys
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for stage, key in keys.items():
            if published.get(stage) != key and place(name, stage).is_dir():
                place(name, stage).rename(aside / stage)
    except OSError as error:
        raise from_os_error(error, aside, "setting the candidate aside in") from error
    if current is not None:
        restore(name, current)
    return aside


def _stages(store: Store, keys: Mapping[str, str], last: Publication | None, steps: list[Step]) -> list[Stage]:
    by_stage = {step.stage: step for step in steps}
    found = []
    for stage, key in keys.items():
        before = None if last is None else last.keys.get(stage)
        step = by_stage.get(stage)
        found.append(
            Stage(
                name=stage,
                action=step.action if step else "keep",
                why=step.why if step else (),
                elapsed_s=step.elapsed_s if step else 0.0,
                size_bytes=stored_bytes(store, stage, key),
                size_before_bytes=None if before is None else stored_bytes(store, stage, before),
            )
        )
    return found


def _verdict(gates: tuple[Gate, ...], current: Publication | None, last: Publication | None) -> str:
    failed = [gate.name for gate in gates if not gate.passed]
    compared = f"compared with version {last.number}" if last else "there is none to compare with"
    if not failed:
        assert current is not None
        return f"Published as version {current.number}; {compared}."
    stays = f"version {current.number} stays" if current else "nothing is published"
    return f"Not published: {' and '.join(failed)} failed; {compared}; {stays}."
