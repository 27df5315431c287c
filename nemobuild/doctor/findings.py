"""What a check of ``nemobuild doctor`` may find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemobuild.errors import NemobuildError

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. Errors have a code and an exit status. ``facts`` are its numbers, for JSON."""

    check: str
    level: Level
    what: str
    why: str = ""
    next: str = ""
    code: str = ""
    exit_status: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def failed(check: str, error: NemobuildError) -> Finding:
    """``error`` as a finding, with its exit status."""
    return Finding(check, "error", error.what, error.why, error.next, error.code, error.exit_status)
