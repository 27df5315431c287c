"""The working folder of a conversion: hidden, locked, and able to go on after a kill.

``.NAME.partial`` stands beside the folder NAME to be. Its journal has one line that says what is being made, and
then the numbers of the jobs whose bytes are on the disk. The journal is also the lock: ``flock`` ends with the
process, so a dead converter never blocks a living one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from nemobuild.errors import NemobuildError, UsageError, from_os_error

NAME = "journal"


class Journal:
    """Open (or continue) the partial folder of ``output`` and lock it. ``done`` holds the jobs finished before.

    Raises ``UsageError`` when the output exists, when another conversion is at work, when a partial folder is left
    and ``resume`` was not asked for, or when it belongs to other inputs than ``identity``.
    """

    def __init__(self, output: Path, identity: Mapping[str, str], *, resume: bool) -> None:
        self.output = output
        self.folder = partial_folder(output)
        self._fd = -1
        refuse_existing(output)
        left_over = True
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            left_over = not _made(self.folder)
            self._fd = self._lock()
            # Another process may have finished between the first look and the lock.
            refuse_existing(output)
            if left_over and not resume:
                raise UsageError(
                    "partial-exists",
                    f"An interrupted conversion is left in {self.folder}.",
                    why="It may hold hours of work, so it is not replaced unasked.",
                    next=f"Add --resume to finish it, or delete {self.folder} to start again.",
                )
            self.done = self._continue(identity)
        except OSError as error:
            self._abandon(made=not left_over)
            raise from_os_error(error, self.folder, "creating") from error
        except NemobuildError:
            self._abandon(made=not left_over)
            raise

    def add(self, jobs: Iterable[int]) -> None:
        """Note ``jobs`` as done. Their bytes must be on the disk."""
        try:
            os.write(self._fd, "".join(f"{job}\n" for job in jobs).encode())
            os.fdatasync(self._fd)
        except OSError as error:
            raise from_os_error(error, self.folder, "writing") from error

    def forget(self) -> None:
        """Take back all jobs: their bytes are not there any more."""
        self.done = set()
        with open(self._fd, "rb", closefd=False) as stream:
            stream.seek(0)
            os.ftruncate(self._fd, len(stream.readline()))

    def commit(self) -> None:
        """Turn the partial folder into the output, whole and durable."""
        try:
            os.unlink(self.folder / NAME)
            sync_folder(self.folder)
            refuse_existing(self.output)
            os.rename(self.folder, self.output)
            sync_folder(self.output.parent)
        except OSError as error:
            raise from_os_error(error, self.output, "completing") from error

    def discard(self) -> None:
        """Remove the partial folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Give the lock back. The folder stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _abandon(self, *, made: bool) -> None:
        """Leave as little as was found, unless the folder is another's."""
        if made and self._fd >= 0:
            self.discard()
        self.close()

    def _lock(self) -> int:
        path = self.folder / NAME
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder may have finished and renamed the folder after our open: then this is not the lock any more.
            mine = path.exists() and os.path.samestat(path.stat(), os.fstat(fd))
        except BlockingIOError:
            mine = False
        if not mine:
            os.close(fd)
            raise UsageError(
                "busy",
                f"Another conversion to {self.output} is at work.",
                next="Wait for it, or choose another output folder.",
            )
        return fd

    def _continue(self, identity: Mapping[str, str]) -> set[int]:
        with open(self._fd, "rb", closefd=False) as stream:
            stream.seek(0)
            content = stream.read()
        # A kill may have torn the last line.
        whole = content[: content.rfind(b"\n") + 1]
        head, *lines = whole.splitlines() or [b""]
        os.ftruncate(self._fd, len(whole))
        if not head:
            os.write(self._fd, json.dumps(dict(identity), sort_keys=True).encode() + b"\n")
            os.fdatasync(self._fd)
            return set()
        try:
            before = json.loads(head)
            differing = [key for key, value in identity.items() if before.get(key) != value]
            done = {int(line) for line in lines}
        except (ValueError, AttributeError):
            differing, done = ["an unreadable journal"], set()
        if differing:
            raise UsageError(
                "resume-mismatch",
                f"The interrupted conversion in {self.folder} differs in {', '.join(differing)}.",
                why="Parts of two different conversions would end in one folder.",
                next=f"Delete {self.folder} and run the same command without --resume.",
            )
        return done


def partial_folder(output: Path) -> Path:
    """``.NAME.partial`` beside ``output``."""
    return output.parent / f".{output.name}.partial"


def refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise UsageError(
            "output-exists",
            f"{output} exists already.",
            why="A finished folder is never written over.",
            next="Choose another output folder, or delete this one first.",
        )


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
