"""Builds that end at one exact operation on files: half of a write done, then SIGKILL, or the disk full from there on.
Or they do not end, and each such operation takes its time.

Points are counted, not timed, so a test names the same ones on every machine. One process imports everything and
forks a child for each point, which keeps a point below a second.

    python -m tests.dying kill|full|slow TEMPLATE WORK PROFILE POINT...

``TEMPLATE`` is the folder that every point begins with a copy of. A point is a share of all operations (``0.25``), or
``step:2`` for the second time that ``build`` tells of a step. Prints one JSON line for each point.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import signal
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import nemobuild.convert.executor
import nemobuild.convert.quantize
import nemobuild.triton.repository  # noqa: F401  (all that a child would import)
from nemobuild.errors import NemobuildError
from nemobuild.pipeline import build

_EVENTS = {"os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.utime"}
_NEEDS_SPACE = {"os.link", "os.mkdir", "open", "write"}
_SLOW_S = 0.01
_WRITES = ("write", "pwrite", "sendfile", "fsync", "fdatasync", "ftruncate")


class Meter:
    """Counts what changes files, and ends this process, or its luck, at the one that was chosen."""

    def __init__(self, mode: str, at: int | None, at_step: int | None) -> None:
        self.mode, self.at, self.at_step = mode, at, at_step
        self.operations, self.steps, self.seen, self.full = count(1), count(1), 0, False
        for name in _WRITES:
            setattr(os, name, functools.partial(self._written, name, getattr(os, name)))
        sys.addaudithook(self._audited)

    def step(self, step: Any) -> None:
        if next(self.steps) == self.at_step:
            self._end()

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in _EVENTS:
            self._count(event)

    def _written(self, name: str, really: Any, *arguments: Any) -> Any:
        self._count("write" if name in ("write", "pwrite", "sendfile") else name, name, really, arguments)
        return really(*arguments)

    def _count(self, event: str, name: str = "", really: Any = None, arguments: tuple[Any, ...] = ()) -> None:
        self.seen = next(self.operations)
        if self.mode == "slow":
            time.sleep(_SLOW_S)
        if self.seen == self.at:
            if name in ("write", "pwrite"):
                half = bytes(arguments[1])[: len(arguments[1]) // 2]
                really(arguments[0], half, *arguments[2:])
            self._end()
        if self.full and event in _NEEDS_SPACE:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _end(self) -> None:
        if self.mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.full = True


def in_child(
    folder: Path, profile: str, mode: str, at: int | None = None, at_step: int | None = None
) -> tuple[int, int]:
    """Status of a build in ``folder`` (negative: its signal; an error: its own), and how many operations it saw."""
    told = folder / ".operations"
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chdir(folder)
            meter = Meter(mode, at, at_step)
            try:
                build(profile, on_step=meter.step)
                status = 0
            except NemobuildError as error:
                print(error.code, error, file=sys.stderr, flush=True)
                status = error.exit_status
            meter.mode, meter.full, meter.at = "none", False, None
            told.write_text(str(meter.seen))
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, int(told.read_text()) if told.exists() else 0


def main() -> None:
    mode, template, work, profile, *points = sys.argv[1:]
    whole = Path(shutil.copytree(template, Path(work) / "whole"))
    status, operations = in_child(whole, profile, "none")
    print(json.dumps({"point": "whole", "died": status, "ended": status, "operations": operations}), flush=True)
    for point in points:
        folder = Path(shutil.copytree(template, Path(work) / point.replace(":", "-")))
        at_step = int(point[5:]) if point.startswith("step:") else None
        at = max(1, round(float(point) * operations)) if at_step is None and mode != "slow" else None
        died, _ = in_child(folder, profile, mode, at, at_step)
        ended, _ = in_child(folder, profile, "none")
        print(json.dumps({"point": point, "died": died, "ended": ended}), flush=True)


if __name__ == "__main__":
    main()
