"""What a gate found: named numbers, each with its bound, so that a report can show how near it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One number against its bound, as text. ``passed`` is ``None`` for what is told and not judged."""

    what: str
    value: str
    bound: str
    passed: bool | None


@dataclass(frozen=True, slots=True)
class Gate:
    """``details`` is what the report holds beyond the checks, as JSON. ``skipped`` says why nothing was checked."""

    name: str
    checks: tuple[Check, ...] = ()
    elapsed_s: float = 0.0
    skipped: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def at_most(what: str, value: float, bound: float, form: str = ".3g") -> Check:
    return Check(what, format(value, form), f"at most {format(bound, form)}", value <= bound)  # NaN is within no bound


def at_least(what: str, value: float, bound: float, form: str = ".3g") -> Check:
    return Check(what, format(value, form), f"at least {format(bound, form)}", value >= bound)
