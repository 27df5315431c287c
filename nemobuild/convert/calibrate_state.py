"""What survives a killed calibration: the scales of finished blocks, and the residual streams after one of them.

``.NAME.calibration`` stands beside the folder NAME to be. Its journal has one line that says what is being
calibrated and one for every finished block. The streams are in ``stream.0`` or ``stream.1``: the journal says in which,
and only the other one is ever written, so a kill never harms what the journal speaks of.

A line is flushed before its scales are given out, because bytes written with them must never meet other scales. The
streams are large and are not flushed: a kill cannot harm them, and after a power cut, which shows in the boot id of
the kernel that is noted with them, they are computed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemobuild.convert.scales import BlockScales, block_from_json, block_to_json
from nemobuild.errors import UsageError, from_os_error
from nemobuild.weights.safetensors import Buffer, read_into, write_from

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class State:
    """The working folder of one calibration, locked. ``saved`` is the block whose input was saved last, if any."""

    def __init__(self, folder: Path, identity: Mapping[str, str], *, resume: bool) -> None:
        self.folder = folder
        self.saved: int | None = None
        self._known: list[BlockScales] = []
        self._slot = 1  # number of the file of ``saved``
        self._streams: dict[int, int] = {}
        self._fd = -1
        try:
            if not resume and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(folder / "journal", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError("busy", f"Another calibration works in {folder}.", next="Wait for it.") from error
            self._continue(dict(identity))
        except OSError as error:
            self.close()
            raise from_os_error(error, folder, "creating") from error
        except BaseException:
            self.close()
            raise

    def scales(self) -> list[BlockScales]:
        """Scales of the blocks that are finished."""
        return list(self._known)

    def begin(self) -> None:
        """The embedded samples are written: the input of block 0."""
        self.note_saved(0)

    def add(self, block: int, scales: BlockScales, *, saved: bool) -> None:
        """Keep the result of ``block``; ``saved`` when the input of the next one is written."""
        self._note({"block": block, "scales": block_to_json(scales)}, block + 1 if saved else None)
        self._known.append(scales)

    def note_saved(self, block: int) -> None:
        """What was written is the input of ``block``; from now on it is read, and the other file is written."""
        self._note({}, block)

    def read_stream(self, offset_bytes: int, buffer: Buffer) -> None:
        """Fill ``buffer`` from the streams of ``saved``."""
        fd, path = self.stream_file(self._slot)
        read_into(fd, buffer, offset_bytes, path)

    def write_stream(self, offset_bytes: int, buffer: Buffer) -> None:
        """Write to the file that does not hold ``saved``."""
        fd, path = self.stream_file(1 - self._slot)
        write_from(fd, buffer, offset_bytes, path)

    def stream_file(self, slot: int) -> tuple[int, Path]:
        """Descriptor and path of one of the two files, which is made when it is not there."""
        path = self.folder / f"stream.{slot}"
        if slot not in self._streams:
            try:
                self._streams[slot] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise from_os_error(error, path, "creating") from error
        return self._streams[slot], path

    @staticmethod
    def remove(folder: Path) -> None:
        """Forget the calibration in ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        for fd in self._streams.values():
            os.close(fd)
        self._streams.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _note(self, line: dict[str, Any], saved: int | None) -> None:
        if saved is None:
            self._append(line)
            return
        slot = 1 - self._slot
        self._append(line | {"saved": saved, "slot": slot, "boot": _boot_id()})
        self.saved, self._slot = saved, slot

    def _append(self, line: dict[str, Any]) -> None:
        try:
            os.write(self._fd, json.dumps(line).encode() + b"\n")
            os.fdatasync(self._fd)
        except OSError as error:
            raise from_os_error(error, self.folder, "writing") from error

    def _continue(self, identity: dict[str, str]) -> None:
        with open(self._fd, "rb", closefd=False) as stream:
            stream.seek(0)
            content = stream.read()
        # A kill may have torn the last line.
        whole = content[: content.rfind(b"\n") + 1]
        os.ftruncate(self._fd, len(whole))
        partial = self.folder.with_suffix(".partial")
        advice = f"Delete {self.folder}, and {partial} if it is there, then run the same command again."
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            head = lines[0] if lines else {"identity": identity}
            known = [block_from_json(line["scales"]) for line in lines[1:] if "block" in line]
            saved = [(line["boot"], int(line["saved"]), int(line["slot"])) for line in lines[1:] if "saved" in line]
            differing = [key for key, value in identity.items() if head["identity"].get(key) != value]
        except (ValueError, KeyError, TypeError, AttributeError):
            differing, known, saved, lines = ["an unreadable journal"], [], [], []
            advice = f"Delete {self.folder} and run the same command again."
        if differing:
            raise UsageError(
                "resume-mismatch",
                f"The interrupted calibration in {self.folder} differs in {', '.join(differing)}.",
                why="Scales of two different calibrations would end in one checkpoint.",
                next=advice,
            )
        if not lines:
            self._append(head)
        self._known = known
        boot, block, slot = saved[-1] if saved else ("", 0, 1)
        if boot and boot == _boot_id():
            self.saved, self._slot = block, slot


def _boot_id() -> str:
    """Empty when it cannot be read, and then equal to none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
