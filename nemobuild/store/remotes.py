"""Where publications go to and come from: a folder, any file system that ``fsspec`` knows (S3), a Hub repository.

All hold the same names as a store does. A remote only keeps bytes: what is read from it is verified like the rest.
"""

from __future__ import annotations

import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Protocol

from nemobuild.errors import NemobuildError, RemoteError, ToolchainError, UsageError, from_os_error
from nemobuild.weights.hub_client import HubClient, Meter, RemoteFile

Content = bytes | Path
STORED_NAME = re.compile(r"(?:(?!\.)[\w.+-]+/)*(?:objects|published)/(?!\.)[\w.+-]+(?:/(?!\.)[\w.+-]+)*")
_PAUSES_S = (1.0, 4.0, 15.0)


class Remote(Protocol):
    """Files by name. ``read`` gives ``None`` for one that is not there; ``write`` may write all of them at once."""

    def read(self, name: str) -> bytes | None: ...

    def fetch(self, name: str, target: Path) -> None: ...

    def write(self, contents: Mapping[str, Content]) -> None: ...


def open_remote(address: str) -> Remote:
    """The remote of ``hf://OWNER/NAME``, ``s3://BUCKET/...`` (or another of ``fsspec``), or a path.

    Raises ``ToolchainError`` when the package for it is missing.
    """
    if address.startswith("hf://"):
        return _Hub(address)
    return _FileSystem(address) if "://" in address else _Folder(Path(address))


class Archive:
    """A tar archive that is being written, for a site without a network."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    def read(self, name: str) -> bytes | None:
        return None

    def fetch(self, name: str, target: Path) -> None:
        raise NotImplementedError("an archive is unpacked before it is read")

    def write(self, contents: Mapping[str, Content]) -> None:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                self._archive.addfile(member, BytesIO(content))
            else:
                member.size = content.stat().st_size
                with content.open("rb") as stream:
                    self._archive.addfile(member, stream)


def unpack(file: Path, folder: Path) -> None:
    """All members of an archive that ``Archive`` wrote, below ``folder``. Raises ``UsageError`` for any other."""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                if not member.isreg() or not STORED_NAME.fullmatch(member.name) or ".." in member.name.split("/"):
                    raise UsageError("bad-archive", f"{file} holds {member.name[:200]!r}, which is not of a store.")
                target = folder / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = archive.extractfile(member)
                assert stream is not None  # of a regular file
                with stream, target.open("xb") as sink:
                    shutil.copyfileobj(stream, sink, 1 << 20)
                if target.stat().st_size != member.size:
                    raise UsageError("bad-archive", f"{file} ends within {member.name}.")
    except (tarfile.TarError, EOFError) as error:
        raise UsageError("bad-archive", f"{file} is not a whole archive.", why=f"{error}.") from error
    except FileExistsError as error:
        raise UsageError("bad-archive", f"{file} holds a name twice.") from error
    except OSError as error:
        raise from_os_error(error, file, "unpacking") from error


class _Folder:
    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, name: str) -> bytes | None:
        with _told(self._root):
            return (self._root / name).read_bytes() if (self._root / name).is_file() else None

    def fetch(self, name: str, target: Path) -> None:
        with _told(self._root):
            shutil.copyfile(self._root / name, target)

    def write(self, contents: Mapping[str, Content]) -> None:
        for name, content in contents.items():
            with _told(self._root):
                target = self._root / name
                stage = target.with_name(f".{target.name}.partial")
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    stage.write_bytes(content)
                else:
                    shutil.copyfile(content, stage)
                stage.rename(target)


class _FileSystem:
    """Anything that ``fsspec`` can open."""

    def __init__(self, address: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise _missing(address, "fsspec") from error
        self._address = address
        try:
            with _told(address):
                self._system, self._root = url_to_fs(address)
        except ImportError as error:
            raise _missing(address, str(error)) from error

    def read(self, name: str) -> bytes | None:
        with _told(self._address):
            path = f"{self._root}/{name}"
            self._system.invalidate_cache()
            return bytes(self._system.cat_file(path)) if self._system.isfile(path) else None

    def fetch(self, name: str, target: Path) -> None:
        with _told(self._address):
            self._system.get_file(f"{self._root}/{name}", str(target))

    def write(self, contents: Mapping[str, Content]) -> None:
        for name, content in contents.items():
            with _told(self._address):
                path = f"{self._root}/{name}"
                self._system.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
                if isinstance(content, bytes):
                    self._system.pipe_file(path, content)
                else:
                    self._system.put_file(str(content), path)


class _Hub:
    """A model repository of the Hub, by the client that also fetches weights. What is written at once is one commit."""

    def __init__(self, address: str) -> None:
        owner, name, *folders = [*address.removeprefix("hf://").strip("/").split("/"), ""]
        self._prefix = "".join(f"{folder}/" for folder in folders if folder)
        self._client = HubClient(f"{owner}/{name}", None, None, _PAUSES_S, names=STORED_NAME)
        self._listing: tuple[str, dict[str, RemoteFile]] | None = None

    def read(self, name: str) -> bytes | None:
        if f"{self._prefix}{name}" not in self._list()[1]:
            return None
        with TemporaryDirectory() as folder:
            self.fetch(name, Path(folder) / "file")
            return (Path(folder) / "file").read_bytes()

    def fetch(self, name: str, target: Path) -> None:
        commit, files = self._list()
        file = files.get(f"{self._prefix}{name}")
        if file is None:
            raise RemoteError("remote-failed", f"{self._client.repo_id} lists {name} no more.")
        self._client.download(commit, file, target, Meter(0, None), Event())

    def write(self, contents: Mapping[str, Content]) -> None:
        add = self._client.library.CommitOperationAdd
        operations = [add(f"{self._prefix}{name}", content) for name, content in contents.items()]
        message = f"Store {next(iter(contents))}"
        with _told(self._client.repo_id):
            self._client.api.create_commit(self._client.repo_id, operations, commit_message=message)
        self._listing = None

    def _list(self) -> tuple[str, dict[str, RemoteFile]]:
        """One commit for all reads, so that a push meanwhile cannot mix two."""
        self._listing = self._listing or self._client.listing("main")
        return self._listing


@contextmanager
def _told(address: object) -> Iterator[None]:
    """Whatever a file system raises, in the user's words: their kinds of error are many."""
    try:
        yield
    except (NemobuildError, ImportError):
        raise
    except OSError as error:
        if isinstance(address, Path) and error.errno is not None:
            raise from_os_error(error, address, "using") from error
        raise _failed(address, error) from error
    except Exception as error:
        raise _failed(address, error) from error


def _failed(address: object, error: Exception) -> RemoteError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RemoteError(
        "remote-failed",
        f"{address} did not do what was asked of it.",
        why=f"{type(error).__name__}: {lines[0][:300]}",
        next="Check the address and the credentials, then run the same command again: what arrived is kept.",
    )


def _missing(address: str, package: str) -> ToolchainError:
    return ToolchainError(
        "no-remote",
        f"Reaching {address} needs a package that is not installed.",
        why=f"{package}.",
        next="Install it with: pip install 'nemobuild[remote]'",
    )
