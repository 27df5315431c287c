"""Objects and publications of one store. What is read is verified first; what is written appears by one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from nemobuild.errors import IntegrityError, NemobuildError, UsageError, from_os_error
from nemobuild.folders import replace_folder, sync_folder
from nemobuild.model.hf_config import load_json
from nemobuild.store import files
from nemobuild.wheels import file_lock

STAGES = ("snapshot", "checkpoint", "engine", "repository")
Gates = Literal["passed", "failed", "not run"]
_KEY = re.compile(r"[0-9a-f]{64}")
_PROFILE = re.compile(r"[A-Za-z0-9_][\w.+-]{0,200}")


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of a profile: the object of each stage, and what was found out about it."""

    number: int
    profile: str
    keys: Mapping[str, str]
    revision: str | None
    made_at: str  # UTC, ISO 8601
    gates: Gates
    note: str


class Store:
    """The store in folder ``root``: by default ``$NEMOBUILD_STORE``, else ``build/store``. It may not exist yet.

    All methods raise ``UsageError`` where the store cannot be written to, ``DoesNotFit`` when its disk is full.
    """

    def __init__(self, root: Path | None = None) -> None:
        default = os.environ.get("NEMOBUILD_STORE") or "build/store"
        self.root = (root or Path(default)).expanduser().absolute()

    def has(self, stage: str, key: str) -> bool:
        folder = self.folder(stage, key)
        return folder.is_dir() and self.record_file(stage, key).is_file()

    def path(self, stage: str, key: str) -> Path:
        """Folder of the object; it is never written to. Raises ``IntegrityError`` when it is not stored."""
        if not self.has(stage, key):
            raise IntegrityError(
                "not-stored", f"The store {self.root} has no {stage} {key[:12]}.", next="Build or pull it again."
            )
        return self.folder(stage, key)

    def commit(self, stage: str, key: str, folder: Path, about: Mapping[str, object]) -> Path:
        """Keep the artefact in ``folder`` under ``key``, and return the object's own folder.

        Large files are shared between both folders, where the file system can. An object that is there already stays
        as it is. ``about`` is what else is known of it.
        """
        target = self.folder(stage, key)
        partial = target.with_name(f".{key}.partial")
        with self._writing(target), self.lock(f"{stage}-{key}"):
            if not self.has(stage, key):
                shutil.rmtree(partial, ignore_errors=True)
                try:
                    names = files.plain_files(folder)
                    files.carry(folder, partial, names)
                    record = {"stage": stage, "key": key, "made_at": _now(), "about": dict(about)}
                    record["files"] = files.keep(partial, names)
                    self._install(record, partial)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
            self._note_place(stage, key, folder)
        return target

    def adopt(self, record: Mapping[str, Any], folder: Path) -> None:
        """Take an object of another store: its ``record``, and its files in ``folder``, which is moved.

        Raises ``IntegrityError`` when the files are not those of the record.
        """
        stage, key = str(record["stage"]), str(record["key"])
        with self._writing(folder), self.lock(f"{stage}-{key}"):
            if not self.has(stage, key):
                if files.keep(folder, files.plain_files(folder)) != record["files"]:
                    wrong = files.changed(folder, record["files"])
                    raise IntegrityError("tampered", f"The {stage} {key[:12]} arrived changed: {wrong}.")
                self._install(record, folder)

    def _install(self, record: Mapping[str, Any], folder: Path) -> None:
        """The record first, then the folder by one rename: the object is there as soon as both are."""
        target = self.folder(record["stage"], record["key"])
        shutil.rmtree(target, ignore_errors=True)  # of a removal that was killed
        files.write_json(self.record_file(record["stage"], record["key"]), {"digest": digest_of(record)} | dict(record))
        folder.rename(target)
        sync_folder(target.parent)

    def restore(self, stage: str, key: str, target: Path) -> None:
        """Put the object, verified, where ``target`` is. Raises ``IntegrityError`` when it was tampered with."""
        fresh = target.with_name(f".{target.name}.restored")
        with self._writing(target), self.reading(stage, key):
            self.verify(stage, key)
            shutil.rmtree(fresh, ignore_errors=True)
            files.carry(self.folder(stage, key), fresh, self.record(stage, key)["files"])
            replace_folder(fresh, target)
            self._note_place(stage, key, target)

    def verify(self, stage: str, key: str, folder: Path | None = None) -> None:
        """Read all bytes of the object, or of ``folder`` that should hold the same.

        Raises ``IntegrityError`` that names the file which is not as it was when the object was stored.
        """
        record, folder = self.record(stage, key), folder or self.path(stage, key)
        try:
            found = files.changed(folder, record["files"])
        except OSError as error:
            raise from_os_error(error, folder, "verifying") from error
        if found is not None:
            raise IntegrityError(
                "tampered",
                f"The {stage} in {folder} is not as it was stored: {found}.",
                why="Every file is compared with the digest that was taken when it was made.",
                next=f"Remove it with `nemobuild store discard {key[:12]}`, then build or pull it again.",
            )

    def record(self, stage: str, key: str) -> Mapping[str, Any]:
        """What is known of an object: ``made_at``, ``about``, and ``files`` with sizes and digests."""
        self.path(stage, key)
        file = self.record_file(stage, key)
        try:
            record = load_json(file)
            whole = record.pop("digest") == digest_of(record) and (record["stage"], record["key"]) == (stage, key)
        except (NemobuildError, KeyError):
            whole = False
        if not whole:
            raise IntegrityError(
                "tampered",
                f"The record {file} is not as it was written.",
                next=f"Remove it with `nemobuild store discard {key[:12]}`, then build or pull it again.",
            )
        return record

    def discard(self, stage: str, key: str) -> None:
        """Remove an object, whatever uses it: for what was tampered with."""
        with self.lock(f"{stage}-{key}"):
            self.remove(stage, key)

    def remove(self, stage: str, key: str) -> None:
        """For the holder of the object's lock. The folder leaves by one rename, so a half one never counts as whole."""
        folder, gone = self.folder(stage, key), self.folder(stage, key).with_name(f".{key}.gone")
        with self._writing(folder):
            shutil.rmtree(gone, ignore_errors=True)
            if folder.exists():
                folder.rename(gone)
            for file in (self.record_file(stage, key), self.signature_file(stage, key)):
                file.unlink(missing_ok=True)
            shutil.rmtree(gone, ignore_errors=True)

    def publish(
        self, profile: str, keys: Mapping[str, str], *, revision: str | None, gates: Gates, note: str
    ) -> Publication:
        """Make these objects the next version of ``profile``, and the current one."""
        file = self._published_file(profile)
        with self._writing(file), self.lock("published"):
            for stage, key in keys.items():
                self.path(stage, key)
            known, _ = self._published(profile)
            number = max((one.number for one in known), default=0) + 1
            made = Publication(number, profile, dict(keys), revision, _now(), gates, note)
            self._write_published(profile, [*known, made], number)
        return made

    def publications(self, profile: str) -> list[Publication]:
        """All versions of ``profile``, oldest first."""
        return self._published(profile)[0]

    def current(self, profile: str) -> Publication | None:
        """The version that is to be served."""
        known, current = self._published(profile)
        return next((one for one in known if one.number == current), None)

    def make_current(self, profile: str, number: int) -> Publication:
        """Go to another version, back or forth. Raises ``UsageError`` when there is none of that number."""
        file = self._published_file(profile)
        with self._writing(file), self.lock("published"):
            known, _ = self._published(profile)
            chosen = next((one for one in known if one.number == number), None)
            if chosen is None:
                numbers = ", ".join(str(one.number) for one in known) or "none"
                raise UsageError("no-publication", f"{profile} has no publication {number}.", why=f"Known: {numbers}.")
            for stage, key in chosen.keys.items():
                self.path(stage, key)
            self._write_published(profile, known, number)
        return chosen

    def remembered(self, profile: str, keep: int | None) -> list[Publication]:
        """The newest ``keep`` publications (all without it), and the current one."""
        known, current = self._published(profile)
        return known if keep is None else [one for one in known if one in known[-keep:] or one.number == current]

    def forget(self, profile: str, keep: int) -> None:
        """Take all others than ``remembered`` from the list."""
        file = self._published_file(profile)
        with self._writing(file), self.lock("published"):
            self._write_published(profile, self.remembered(profile, keep), self._published(profile)[1])

    def profiles(self) -> list[str]:
        """Names of the profiles that have publications."""
        return sorted(file.stem for file in (self.root / "published").glob("[!.]*.json"))

    def objects(self) -> list[tuple[str, str]]:
        """Stage and key of everything that is stored."""
        found = [(file.parent.name, file.stem) for file in sorted((self.root / "objects").glob("*/[!.]*.json"))]
        return [
            (stage, key) for stage, key in found if stage in STAGES and _KEY.fullmatch(key) and self.has(stage, key)
        ]

    def holds(self, folder: Path) -> tuple[str, str] | None:
        """Stage and key of the object that was put into ``folder``, or came from it; ``None`` when it is another now.

        What tells one artefact from another is its manifest, so no more than that is read: see ``verify``.
        """
        note = self._read_note(self._place_note(folder))
        mine = note is not None and note[0] == folder.absolute() and self.matches(note[1], note[2], folder)
        return note[1:] if note is not None and mine else None

    def matches(self, stage: str, key: str, folder: Path) -> bool:
        """Whether ``folder`` has the manifest of the object."""
        if not self.has(stage, key):
            return False
        known = self.record(stage, key)["files"]
        name = next((name for name in ("manifest.json", "source.json") if name in known), "")
        return (folder / name).is_file() and files.digest(folder / name) == known[name]["blake3"]

    def places(self) -> dict[Path, tuple[str, str]]:
        """Folders outside that hold an object, as far as they are still there."""
        notes = (self._read_note(file) for file in sorted((self.root / "places").glob("[!.]*.json")))
        return {note[0]: note[1:] for note in notes if note is not None and note[0].is_dir()}

    def folder(self, stage: str, key: str) -> Path:
        if stage not in STAGES or not _KEY.fullmatch(key):
            raise UsageError("bad-key", f"{stage[:40]!r} {key[:80]!r} is not the name of an object.")
        return self.root / "objects" / stage / key

    def record_file(self, stage: str, key: str) -> Path:
        return self.folder(stage, key).with_name(f"{key}.json")

    def signature_file(self, stage: str, key: str) -> Path:
        return self.folder(stage, key).with_name(f"{key}.sig")

    def lock(self, name: str, busy: str | None = None) -> AbstractContextManager[None]:
        return file_lock(self.root / "locks" / name, busy)

    def making(self, stage: str, key: str) -> AbstractContextManager[None]:
        """Held by whoever makes the object: a second process waits, and then finds it."""
        return self.lock(f"making-{stage}-{key}") if self.is_writable() else nullcontext()

    def reading(self, stage: str, key: str) -> AbstractContextManager[None]:
        """Held against ``gc``, which a store that cannot be written to does not have."""
        return self.lock(f"{stage}-{key}") if self.is_writable() else nullcontext()

    def check_writable(self) -> None:
        """Raise ``UsageError`` where nothing can be stored."""
        if not self.is_writable():
            raise UsageError(
                "not-permitted",
                f"Not permitted to write to the store {self.root}.",
                why="What is made is kept there.",
                next="Set NEMOBUILD_STORE to a folder that you may write to.",
            )

    def is_writable(self) -> bool:
        present = next(path for path in (self.root, *self.root.parents) if path.exists())
        return os.access(present, os.W_OK)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_os_error(error, path, "writing") from error

    def _place_note(self, folder: Path) -> Path:
        return self.root / "places" / f"{files.digest_bytes(str(folder.absolute()).encode())[:16]}.json"

    def _note_place(self, stage: str, key: str, folder: Path) -> None:
        """What is in use, and since when: ``gc`` asks for both."""
        if self.is_writable():
            os.utime(self.record_file(stage, key))
            value = {"folder": str(folder.absolute()), "stage": stage, "key": key}
            files.write_json(self._place_note(folder), value, lasting=False)

    @staticmethod
    def _read_note(file: Path) -> tuple[Path, str, str] | None:
        try:
            note = load_json(file)
            return Path(note["folder"]), str(note["stage"]), str(note["key"])
        except (NemobuildError, KeyError, TypeError):
            return None

    def _published_file(self, profile: str) -> Path:
        if not _PROFILE.fullmatch(profile):
            raise UsageError("bad-name", f"{profile[:80]!r} is not the name of a profile.")
        return self.root / "published" / f"{profile}.json"

    def _published(self, profile: str) -> tuple[list[Publication], int]:
        file = self._published_file(profile)
        if not file.is_file():
            return [], 0
        return read_published(file.read_bytes(), str(file))

    def _write_published(self, profile: str, known: list[Publication], current: int) -> None:
        value = {"current": current, "published": [asdict(replace(one, keys=dict(one.keys))) for one in known]}
        files.write_json(self._published_file(profile), value)


def read_published(raw: bytes, where: str) -> tuple[list[Publication], int]:
    """All publications of a list, and the number of the current one. Raises ``IntegrityError`` for another form."""
    try:
        value = json.loads(raw)
        found = [Publication(**entry) for entry in value["published"]]
        if all(isinstance(one.number, int) and isinstance(one.keys, dict) for one in found):
            return found, int(value["current"])
        why = "A number or the keys are of another kind."
    except (KeyError, TypeError, ValueError) as error:
        why = f"{error}."
    raise IntegrityError("bad-publications", f"{where} is not a list of publications.", why=why)


def digest_of(record: Mapping[str, Any]) -> str:
    """The digest that a record has of itself."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return files.digest_bytes(canonical.encode())


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
