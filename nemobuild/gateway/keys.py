"""API keys: a file of names and hashes, so that who reads the file cannot use the keys.

One line per key: a name, a space, the SHA-256 of the key. A key is 256 random bits, so a fast hash is as good as a slow
one: nothing shorter than the key itself can be guessed. To revoke a key, delete its line; a running gateway sees it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from nemobuild.errors import UsageError, from_os_error

_LINE = re.compile(r"(?P<name>[\w.@-]{1,64}) (?P<digest>[0-9a-f]{64})")


def make_key(file: Path, name: str) -> str:
    """A new key, whose hash is added to ``file`` under ``name``. The key itself is kept nowhere."""
    key = f"nb-{secrets.token_urlsafe(32)}"
    line = f"{name} {_digest(key)}"
    if _LINE.fullmatch(line) is None:
        raise UsageError("bad-key-name", f"{name!r} is no name for a key.", why="Use up to 64 letters, digits, . @ _ -")
    if file.exists() and name in read_keys(file).values():
        raise UsageError(
            "key-exists", f"{file} has a key named {name} already.", next="Delete its line, or take another name."
        )
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as out:
            out.write(f"{line}\n" if _ends_a_line(file) else f"\n{line}\n")
    except OSError as error:
        raise from_os_error(error, file, "writing") from error
    return key


def _ends_a_line(file: Path) -> bool:
    """An editor may have left the last line open."""
    return file.read_bytes()[-1:] in (b"", b"\n")


def read_keys(file: Path) -> dict[str, str]:
    """Digest -> name. Empty lines and lines that begin with # are left out. Raises ``UsageError`` naming a bad line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise from_os_error(error, file, "reading") from error
    except UnicodeDecodeError as error:
        raise UsageError("bad-key-file", f"{file} is not a file of API keys.", why="It is not text.") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise UsageError(
                "bad-key-file",
                f"Line {number} of {file} is not a name and a SHA-256.",
                next=f"Make keys with `nemobuild key NAME --file {file}`.",
            )
        keys[found["digest"]] = found["name"]
    return keys


class KeyRing:
    """The keys of a file, read again when it changes."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp = _stamp(file)
        self._names = read_keys(file)

    def owner(self, key: str) -> str | None:
        """Name of ``key``, or ``None``. A file that cannot be read any more opens to nobody."""
        try:
            if (stamp := _stamp(self._file)) != self._stamp:
                self._names, self._stamp = read_keys(self._file), stamp
        except (OSError, UsageError):
            return None
        return self._names.get(_digest(key))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
