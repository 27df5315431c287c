"""Publications on their way between stores: ``push`` and ``pull``, ``export`` and ``import``.

A remote has the names of a store. The record of an object goes up last and comes down first, so an object whose
record is there is whole, and what is whole is not carried again. Nothing of a remote is trusted: names are checked
before they are used, and every byte against the record before the object appears.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemobuild.errors import IntegrityError, RemoteError, UsageError, from_os_error
from nemobuild.store.objects import Publication, Store, digest_of, read_published
from nemobuild.store.remotes import Archive, Remote, open_remote, unpack

OnBytes = Callable[[int, int], None]
_FILE = re.compile(r"[\w.+-]+(/[\w.+-]+)*")


def push(store: Store, profile: str, address: str, progress: OnBytes | None = None) -> Publication:
    """Put the current publication of ``profile`` and its objects, verified, to ``address``, where it becomes current.

    Two that push the same profile at the same time must not: a remote has no lock.
    """
    return _push(store, profile, open_remote(address), progress or (lambda *_: None))


def pull(store: Store, profile: str, address: str, progress: OnBytes | None = None) -> Publication:
    """Get what is current at ``address``, and make it current here."""
    return _pull(store, profile, open_remote(address), address, progress or (lambda *_: None))


def export(store: Store, profile: str, file: Path, progress: OnBytes | None = None) -> Publication:
    """The current publication of ``profile`` as one tar archive, which appears whole or not at all."""
    if file.exists():
        raise UsageError("output-exists", f"{file} exists already.", next="Choose another name.")
    partial = file.with_name(f".{file.name}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as archive:
            publication = _push(store, profile, Archive(archive), progress or (lambda *_: None))
        partial.rename(file)
    except OSError as error:
        raise from_os_error(error, file, "writing") from error
    finally:
        partial.unlink(missing_ok=True)
    return publication


def import_(store: Store, file: Path, progress: OnBytes | None = None) -> list[Publication]:
    """Take what ``export`` wrote, and make it current here."""
    store.check_writable()
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".import-", dir=store.root))
    except OSError as error:
        raise from_os_error(error, store.root, "writing to") from error
    try:
        unpack(file, work)
        profiles = sorted(found.stem for found in (work / "published").glob("*.json"))
        return [pull(store, profile, str(work), progress) for profile in profiles]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _push(store: Store, profile: str, remote: Remote, progress: OnBytes) -> Publication:
    current = store.current(profile)
    if current is None:
        raise UsageError(
            "not-published", f"{profile} has no publication.", next=f"Type `nemobuild up {profile}` or `rebuild`."
        )
    total_bytes, done_bytes = 0, 0
    records = {}
    for stage, key in current.keys.items():
        records[stage] = store.record(stage, key)
        total_bytes += _size(records[stage])
    for stage, key in current.keys.items():
        name = f"objects/{stage}/{key}"
        with store.reading(stage, key):
            if remote.read(f"{name}.json") is None:
                store.verify(stage, key)
                folder = store.path(stage, key)
                remote.write({f"{name}/{file}": folder / file for file in records[stage]["files"]})
                if store.signature_file(stage, key).is_file():
                    remote.write({f"{name}.sig": store.signature_file(stage, key)})
                remote.write({f"{name}.json": store.record_file(stage, key)})
        done_bytes += _size(records[stage])
        progress(done_bytes, total_bytes)
    file = f"published/{profile}.json"
    raw = remote.read(file)
    known = [] if raw is None else read_published(raw, f"{file} of the remote")[0]
    if not known or dict(known[-1].keys) != dict(current.keys):
        known.append(Publication(**asdict(current) | {"number": max((one.number for one in known), default=0) + 1}))
    value = {"current": known[-1].number, "published": [asdict(one) for one in known]}
    remote.write({file: json.dumps(value, indent=1).encode()})
    return current


def _pull(store: Store, profile: str, remote: Remote, address: str, progress: OnBytes) -> Publication:
    store.check_writable()
    raw = remote.read(f"published/{profile}.json")
    if raw is None:
        raise RemoteError("not-published", f"{address} has no publication of {profile}.")
    known, number = read_published(raw, f"the list of {address}")
    wanted = next((one for one in known if one.number == number), None)
    if wanted is None:
        raise IntegrityError("bad-publications", f"The list of {address} has no publication {number}.")
    records = {
        stage: _record(remote, stage, key, address) for stage, key in wanted.keys.items() if not store.has(stage, key)
    }
    total_bytes, done_bytes = sum(map(_size, records.values())), 0
    for record in records.values():
        done_bytes = _pull_object(store, remote, record, lambda done: progress(done, total_bytes), done_bytes)
    current = store.current(profile)
    if current is not None and dict(current.keys) == dict(wanted.keys):
        return current
    return store.publish(profile, wanted.keys, revision=wanted.revision, gates=wanted.gates, note=wanted.note)


def _pull_object(
    store: Store, remote: Remote, record: Mapping[str, Any], progress: Callable[[int], None], done_bytes: int
) -> int:
    stage, key = str(record["stage"]), str(record["key"])
    name, incoming = f"objects/{stage}/{key}", store.root / "incoming" / stage / key
    with store.making(stage, key):
        for file, known in record["files"].items():
            target = incoming / file
            if not (target.is_file() and target.stat().st_size == known["bytes"]):  # else from a pull that was cut
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise from_os_error(error, target, "writing") from error
                remote.fetch(f"{name}/{file}", target)
            done_bytes += known["bytes"]
            progress(done_bytes)
        try:
            store.adopt(record, incoming)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)  # when it is not what the record says, nothing of it is kept
        if (signature := remote.read(f"{name}.sig")) is not None:
            store.signature_file(stage, key).write_bytes(signature)
    return done_bytes


def _record(remote: Remote, stage: str, key: str, address: str) -> Mapping[str, Any]:
    """The record of an object, checked before any of its names is used."""
    raw = remote.read(f"objects/{stage}/{key}.json")
    try:
        record = json.loads(raw or b"")
        sound = record.pop("digest") == digest_of(record) and (record["stage"], record["key"]) == (stage, key)
        for name, known in record["files"].items():
            sound = sound and bool(_FILE.fullmatch(name)) and ".." not in name.split("/")
            sound = sound and isinstance(known["bytes"], int) and isinstance(known["blake3"], str)
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise IntegrityError("bad-record", f"{address} has no sound record of the {stage} {key[:12]}.")
    return dict(record)


def _size(record: Mapping[str, Any]) -> int:
    return sum(int(file["bytes"]) for file in record["files"].values())
