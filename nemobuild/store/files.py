"""Files of an object: their digests, and how they get from one folder to another without being written twice.

The digest is BLAKE3: as hard to forge as SHA-256, and a tree by its nature, so that one large file keeps all cores
busy. At the speed of a disk a digest of one core would cost as much as the writing. While it is taken, the disk is
told to keep the bytes: both take their time at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemobuild.errors import UsageError
from nemobuild.folders import sync_folder

# Smaller files are copied, because people edit them in place, and a hard link would carry that into the store.
LINK_FROM_BYTES = 32 << 20
_FICLONE = 0x40049409  # linux/fs.h
_SYNCING_THREADS = 4

FileRecord = dict[str, int | str]


def digest(file: Path) -> str:
    """BLAKE3 of a file in hexadecimal, on all cores."""
    from blake3 import blake3

    return str(blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest())


def digest_bytes(content: bytes) -> str:
    from blake3 import blake3

    return str(blake3(content).hexdigest())


def plain_files(folder: Path) -> list[str]:
    """Paths of all files in ``folder``, relative to it. Raises ``UsageError`` for a link or a device."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UsageError(
                "not-plain", f"{path} is not a plain file.", why="An artefact is made of plain files only."
            )
        if path.is_file():
            found.append(path.relative_to(folder).as_posix())
    return found


def keep(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and digest of every file, all of them durable when this returns."""
    names = list(names)
    with ThreadPoolExecutor(_SYNCING_THREADS, thread_name_prefix="sync") as pool:
        syncing = [pool.submit(_sync, folder / name) for name in names]
        found: dict[str, FileRecord] = {
            name: {"bytes": (folder / name).stat().st_size, "blake3": digest(folder / name)} for name in names
        }
        for one in syncing:
            one.result()
    for parent in {(folder / name).parent for name in names} | {folder}:
        sync_folder(parent)
    return found


def changed(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first file of ``folder`` that is missing, additional or of other bytes than ``files`` says, in words."""
    found = plain_files(folder)
    for name in sorted(files.keys() ^ set(found)):
        return f"{name} is missing" if name in files else f"{name} does not belong to it"
    for name, known in files.items():  # sizes of all before the bytes of one
        if (folder / name).stat().st_size != known["bytes"]:
            return f"{name} has another size"
    return next((f"{name} has other bytes" for name in files if digest(folder / name) != files[name]["blake3"]), None)


def carry(source: Path, target: Path, names: Iterable[str]) -> None:
    """The files ``names`` from folder ``source`` into the new folder ``target``: shared where that is safe."""
    target.mkdir(parents=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _carry_file(source / name, target / name)


def write_json(file: Path, value: object, *, lasting: bool = True) -> None:
    """Write ``value`` so that ``file`` is the old or the new one at any moment; and, if ``lasting``, is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    stage = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with stage.open("w") as stream:
            json.dump(value, stream, indent=1)
            stream.write("\n")
            if lasting:
                stream.flush()
                os.fsync(stream.fileno())
        stage.rename(file)
    finally:
        stage.unlink(missing_ok=True)
    if lasting:
        sync_folder(file.parent)


def _carry_file(source: Path, target: Path) -> None:
    size_bytes = source.stat().st_size
    if _reflink(source, target):
        return
    if size_bytes >= LINK_FROM_BYTES:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
    shutil.copystat(source, target)


def _reflink(source: Path, target: Path) -> bool:
    """Share the bytes, where the file system copies them when one side is written to."""
    with source.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            shared = False
        else:
            shared = True
    if shared:
        shutil.copystat(source, target)
    else:
        target.unlink()
    return shared


def _sync(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
