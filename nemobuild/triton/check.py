"""``nemobuild repo check``: what Triton, its backends or a client would stumble over, found without starting them.

Each rule is a function over the repository that yields what it finds. All rules run and every finding is reported, so
that one look is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemobuild.triton import check_files, check_models
from nemobuild.triton.opened import Opened, open_repository

RULES: dict[str, Callable[[Opened], Iterator[tuple[str, str]]]] = {
    "schema": check_models.schema,
    "placeholder": check_models.placeholder,
    "parameters": check_models.parameters,
    "wiring": check_models.wiring,
    "decoupled": check_models.decoupled,
    "engine": check_files.engine,
    "self-contained": check_files.self_contained,
    "manifest": check_files.manifest,
}


@dataclass(frozen=True, slots=True)
class Finding:
    """``file`` is a path in the repository."""

    rule: str
    file: str
    what: str


def check_repository(folder: Path) -> tuple[Finding, ...]:
    """All findings of all rules; none means that it is fit to be served. Raises ``UsageError`` for no repository."""
    repository = open_repository(folder)
    return tuple(Finding(name, file, what) for name, rule in RULES.items() for file, what in rule(repository))
