"""Look at this machine and say what is in the way: of a profile, or without one of serving at all.

Every check runs, whatever the others found. A finding is ``ok``, a ``note`` (worth knowing), a ``warning`` (works, but
not as well as it could) or an ``error`` with the exit status that it stands for: 3, something is too small; 4,
something is missing or of the wrong kind. The report's status is the highest. What counts as an error depends on what
is wanted. With a profile that is what its runtime needs; without one it is the cpu runtime, and whatever is broken
rather than absent: a laptop without a GPU is healthy, one whose driver does not start is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemobuild.doctor.exposure import check_exposure
from nemobuild.doctor.findings import Finding, failed
from nemobuild.doctor.gpus import check_driver, check_gpus
from nemobuild.doctor.host import check_disk, check_memory, check_ports, check_shm
from nemobuild.doctor.machine import listeners
from nemobuild.doctor.software import check_advisories, check_container, check_engine, check_triton, check_versions
from nemobuild.errors import NemobuildError, ToolchainError
from nemobuild.nvml import NvidiaReading, read_nvidia
from nemobuild.plan.planner import Plan
from nemobuild.plan.report import does_not_fit


@dataclass(frozen=True, slots=True)
class Report:
    findings: tuple[Finding, ...]

    @property
    def exit_status(self) -> int:
        return max((finding.exit_status for finding in self.findings), default=0)

    def as_json(self) -> dict[str, Any]:
        return {"exit_status": self.exit_status, "findings": [asdict(finding) for finding in self.findings]}


def examine(plan: Plan | None = None, folder: Path = Path("build")) -> Report:
    """All checks, judged by ``plan`` if there is one. ``folder`` holds its artefacts, one folder per stage."""
    try:
        nvidia: NvidiaReading | ToolchainError = read_nvidia()
    except ToolchainError as error:
        nvidia = error
    checks: dict[str, Callable[[], Iterable[Finding]]] = {
        "plan": lambda: () if plan is None or plan.fits else [failed("plan", does_not_fit(plan))],
        "driver": lambda: check_driver(nvidia, plan),
        "gpu": lambda: () if isinstance(nvidia, ToolchainError) else check_gpus(nvidia.gpus, plan),
        "memory": lambda: check_memory(plan),
        "disk": lambda: check_disk(folder, plan),
        "shm": lambda: check_shm(plan),
        "versions": lambda: check_versions(plan),
        "advisories": lambda: check_advisories(plan),
        "container": lambda: check_container(plan),
        "triton": lambda: check_triton(plan),
        "engine": lambda: check_engine(plan, folder / "engine", nvidia if isinstance(nvidia, NvidiaReading) else None),
        "ports": lambda: check_ports(listeners()),
    }
    return Report(tuple(finding for name, check in checks.items() for finding in _guarded(name, check)))


def examine_exposure() -> Report:
    """What a stranger could reach: every listening port, asked what it is."""
    return Report(tuple(_guarded("exposure", lambda: check_exposure(listeners()))))


def _guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of ``check``; what stops it is a finding too."""
    try:
        yield from check()
    except NemobuildError as error:
        yield failed(name, error)
    except (OSError, ValueError, KeyError) as error:  # the kernel or a tool said something unheard of
        yield Finding(name, "warning", "This check could not be made.", why=f"{type(error).__name__}: {error}.")
