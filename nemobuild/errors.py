"""Every way in which nemobuild can refuse or fail, and the exit status each one has.

    NemobuildError
    ├── UsageError          2   a flag, a path or a profile is wrong
    ├── DoesNotFit          3   memory, disk or a limit of the plan is too small
    ├── ToolchainError      4   a tool is missing, too old or of another kind
    ├── IntegrityError      5   source files or artefacts are incomplete or damaged
    ├── RemoteError         6   the Hub or another remote did not deliver
    ├── VerificationFailed  7   the result is whole, but not what it should be
    └── ChildFailed         8   a process that we started failed

An error says four things: a stable ``code`` to search for, one sentence *what*, one sentence *why*,
and the *next* thing to type. Commands never catch these; ``cli.output`` shows them in one place.
This module is also carried into the emitted model repository, so it imports the standard library only.
"""

from __future__ import annotations

import errno
from os import PathLike


class NemobuildError(Exception):
    """Base of all errors that a user may see. ``exit_status`` is fixed by the subclass."""

    exit_status = 1

    def __init__(self, code: str, what: str, *, why: str = "", next: str = "") -> None:
        super().__init__(what)
        self.code, self.what, self.why, self.next = code, what, why, next

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.next) if part)

    def as_dict(self) -> dict[str, object]:
        """The error as the JSON object that ``--json`` prints to standard error."""
        fields = {"code": self.code, "what": self.what, "why": self.why, "next": self.next}
        return {"error": fields | {"exit_status": self.exit_status}}


class UsageError(NemobuildError):
    exit_status = 2


class DoesNotFit(NemobuildError):
    exit_status = 3


class ToolchainError(NemobuildError):
    exit_status = 4


class IntegrityError(NemobuildError):
    exit_status = 5


class RemoteError(NemobuildError):
    exit_status = 6


class VerificationFailed(NemobuildError):
    exit_status = 7


class ChildFailed(NemobuildError):
    exit_status = 8


def from_os_error(error: OSError, path: str | PathLike[str], doing: str) -> NemobuildError:
    """The user's view of an ``OSError`` met while ``doing`` something to ``path``."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFit(
            "disk-full",
            f"The disk is full while {doing} {path}.",
            why=f"The system says: {reason}.",
            next="Free some space or choose another folder, then run the same command again.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UsageError(
            "not-permitted",
            f"Not permitted while {doing} {path}.",
            why=f"The system says: {reason}.",
            next="Choose a folder that you may write to.",
        )
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return UsageError("bad-path", f"Cannot go on {doing} {path}.", why=f"The system says: {reason}.")
    return IntegrityError("io-error", f"Input/output error while {doing} {path}.", why=f"The system says: {reason}.")


def nearest(name: str, known: object) -> str:
    """A sentence that proposes the nearest of ``known`` names, or lists them when none is near."""
    import difflib

    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    close = difflib.get_close_matches(name, names, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(names)}."
