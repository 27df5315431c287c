"""The working folder of a conversion: hidden, locked, and able to go on after a kill.

``.NAME.partial`` stands beside the folder NAME to be. Its journal has one line that says what is being made, and
then the numbers of the jobs whose bytes are on the disk (with a ``z`` where all of them were zeros), and before the
first job of an FP8 block the block's scales, so that the rest of it is cast by the same ones. The journal is also the
lock: ``flock`` ends with the process, so a dead converter never blocks a living one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from nemobuild.convert.scales import BlockScales, block_from_json, block_to_json
from nemobuild.errors import NemobuildError, UsageError, from_os_error
from nemobuild.folders import sync_folder

NAME = "journal"


class Journal:
    """Open (or continue) the partial folder of ``output`` and lock it.

    ``done`` holds the jobs finished before, ``zeros`` those of them that met nothing but zeros, ``scales`` the scales
    of the blocks that were begun.

    Raises ``UsageError`` when the output exists, when another conversion is at work, when a partial folder is left
    and ``resume`` was not asked for, or when it belongs to other inputs than ``identity``.
    """

    def __init__(self, output: Path, identity: Mapping[str, str], *, resume: bool) -> None:
        self.output = output
        self.folder = partial_folder(output)
        self._fd = -1
        self.done: set[int] = set()
        self.zeros: set[int] = set()
        self.scales: dict[int, BlockScales] = {}
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
            self._continue(identity)
        except OSError as error:
            self._abandon(made=not left_over)
            raise from_os_error(error, self.folder, "creating") from error
        except NemobuildError:
            self._abandon(made=not left_over)
            raise

    def add_scales(self, block: int, scales: BlockScales) -> None:
        """Note the scales of a block, before any of its jobs. Any thread may call this; ``add`` makes it durable."""
        line = json.dumps({"block": block} | block_to_json(scales))
        try:
            os.write(self._fd, line.encode() + b"\n")
        except OSError as error:
            raise from_os_error(error, self.folder, "writing") from error

    def add(self, jobs: Iterable[int], zeros: Iterable[int] = ()) -> None:
        """Note ``jobs`` as done, ``zeros`` of them as all zeros. Their bytes must be on the disk."""
        zeros = set(zeros)
        try:
            os.write(self._fd, "".join(f"{job}{'z' * (job in zeros)}\n" for job in jobs).encode())
            os.fdatasync(self._fd)
        except OSError as error:
            raise from_os_error(error, self.folder, "writing") from error

    def forget(self) -> None:
        """Take back all jobs: their bytes are not there any more."""
        for kept in (self.done, self.zeros, self.scales):
            kept.clear()  # in place: others hold them
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

    def _continue(self, identity: Mapping[str, str]) -> None:
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
            return
        try:
            before = json.loads(head)
            differing = [key for key, value in identity.items() if before.get(key) != value]
            for line in lines:
                self._take(line)
        except (ValueError, AttributeError, KeyError, TypeError):
            differing = ["an unreadable journal"]
        if differing:
            raise UsageError(
                "resume-mismatch",
                f"The interrupted conversion in {self.folder} differs in {', '.join(differing)}.",
                why="Parts of two different conversions would end in one folder.",
                next=f"Delete {self.folder} and run the same command without --resume.",
            )

    def _take(self, line: bytes) -> None:
        """One line after the first."""
        if line.startswith(b"{"):
            value = json.loads(line)
            self.scales[int(value["block"])] = block_from_json(value)
            return
        job = int(line.removesuffix(b"z"))
        self.done.add(job)
        if line.endswith(b"z"):
            self.zeros.add(job)


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


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
