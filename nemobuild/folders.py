"""Folders that appear whole or not at all, and take the place of older ones."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from nemobuild.errors import DoesNotFit, from_os_error
from nemobuild.units import format_bytes


def partial_of(target: Path) -> Path:
    """Where a folder grows before it takes its place: hidden, and beside it, so that one rename suffices."""
    return target.with_name(f".{target.name}.partial")


def replace_folder(new: Path, target: Path) -> None:
    """``new`` becomes ``target``, and what was there before is removed afterwards."""
    old = _old(target)
    try:
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        raise from_os_error(error, target, "replacing") from error
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo or end a ``replace_folder`` that was killed: what it had moved aside is put back, or removed."""
    if not target.exists() and _old(target).exists():
        try:
            _old(target).rename(target)
        except OSError as error:
            raise from_os_error(error, target, "restoring") from error
    shutil.rmtree(_old(target), ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_free(
    folder: Path, needed_bytes: int, what: str, next_step: str = "Free some space or choose another folder."
) -> None:
    """Raise ``DoesNotFit`` when the disk of ``folder`` (which may not exist yet) has not room for ``what``."""
    folder = folder.absolute()
    try:
        system = os.statvfs(next(path for path in (folder, *folder.parents) if path.exists()))
    except OSError as error:
        raise from_os_error(error, folder, "looking at") from error
    free_bytes = system.f_bavail * system.f_frsize
    # Pseudo file systems have no size at all; what they refuse shows when the folder is made.
    if system.f_blocks and free_bytes < needed_bytes:
        raise DoesNotFit(
            "disk-full",
            f"{folder} has {format_bytes(free_bytes)} free; {what} needs {format_bytes(needed_bytes)}.",
            why="Space is checked before the work begins.",
            next=next_step,
        )


def changed_file(folder: Path, sizes_bytes: Mapping[str, int]) -> str | None:
    """The first of the files that ``folder`` does not hold in its size; ``None`` when it holds them all."""
    for name, size_bytes in sizes_bytes.items():
        try:
            if os.stat(folder / name).st_size != size_bytes:
                return name
        except (OSError, ValueError):  # a name that no file can have
            return name
    return None


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")
