"""What a store holds, what uses it, and ``gc``, which removes what nothing uses."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nemobuild.errors import UsageError
from nemobuild.store.objects import STAGES, Store


@dataclass(frozen=True, slots=True)
class Entry:
    """One object. ``age_s`` is counted from when it was last stored or taken; ``users`` keep it from ``gc``."""

    stage: str
    key: str
    size_bytes: int
    made_at: str
    age_s: float
    users: tuple[str, ...]


def entries(store: Store, keep: int | None = None) -> list[Entry]:
    """All objects, the longest unused first. ``keep`` counts only the newest so many publications as users."""
    users, now_s = _users(store, keep), time.time()
    found = []
    for stage, key in store.objects():
        record = store.record(stage, key)
        age_s = now_s - store.record_file(stage, key).stat().st_mtime
        size_bytes = sum(file["bytes"] for file in record["files"].values())
        # A clock that was set back makes nothing old.
        found.append(
            Entry(stage, key, size_bytes, record["made_at"], max(0.0, age_s), tuple(users.get((stage, key), ())))
        )
    return sorted(found, key=lambda entry: -entry.age_s)


def collect(
    store: Store,
    *,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    keep: int | None = None,
    dry_run: bool = False,
) -> list[Entry]:
    """Remove objects that nothing uses: those unused for ``older_than_s``, then the oldest beyond ``max_bytes``.

    With neither, all that nothing uses. What a publication names, and what a place holds, stays; ``keep`` forgets the
    publications before the newest so many of each profile first. Returns what was removed.
    """
    if keep is not None and not dry_run:
        for profile in store.profiles():
            store.forget(profile, keep)
    known = entries(store, keep)
    total_bytes = sum(entry.size_bytes for entry in known)
    removed = []
    for entry in known:
        too_old = older_than_s is not None and entry.age_s >= older_than_s
        too_much = max_bytes is not None and total_bytes > max_bytes
        if entry.users or not (too_old or too_much or (older_than_s is None and max_bytes is None)):
            continue
        if dry_run or _remove(store, entry):
            total_bytes -= entry.size_bytes
            removed.append(entry)
    if not dry_run:
        _sweep(store)
    return removed


def find(store: Store, name: str) -> list[tuple[str, str]]:
    """The objects of the current publication of profile ``name``, or those whose keys begin with ``name``."""
    if name in store.profiles() and (current := store.current(name)) is not None:
        return list(current.keys.items())
    found = [(stage, key) for stage, key in store.objects() if len(name) >= 6 and key.startswith(name)]
    if not found:
        raise UsageError(
            "not-stored",
            f"The store {store.root} has neither a publication nor a key {name!r}.",
            next="See `nemobuild store ls`.",
        )
    return found


def _users(store: Store, keep: int | None = None) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for profile in store.profiles():
        for one in store.remembered(profile, keep):
            for stage, key in one.keys.items():
                found.setdefault((stage, key), []).append(f"{profile} version {one.number}")
    for folder, held in store.places().items():
        found.setdefault(held, []).append(str(folder))
    return found


def _remove(store: Store, entry: Entry) -> bool:
    """Whether the object was removed: not while another process reads it, or since it has come to be used."""
    try:
        with store.lock("published"), store.lock(f"{entry.stage}-{entry.key}", busy="It is in use."):
            if (entry.stage, entry.key) in _users(store):
                return False
            store.remove(entry.stage, entry.key)
    except UsageError as error:
        if error.code != "busy":
            raise
        return False
    return True


def _sweep(store: Store) -> None:
    """Remove what processes that were killed have left: they cannot hold the lock any more."""
    for stage in STAGES:
        for left in (store.root / "objects" / stage).glob("*"):
            if left.name.startswith(".") or (left.is_dir() and not store.record_file(stage, left.name).is_file()):
                _sweep_one(store, stage, left)


def _sweep_one(store: Store, stage: str, left: Path) -> None:
    key = left.name.strip(".").split(".")[0]
    try:
        with store.lock(f"{stage}-{key}", busy="It is being made."):
            if left.name.startswith(".") or not store.record_file(stage, key).is_file():
                shutil.rmtree(left, ignore_errors=True)
                left.unlink(missing_ok=True) if left.is_file() else None
    except UsageError as error:
        if error.code != "busy":
            raise
