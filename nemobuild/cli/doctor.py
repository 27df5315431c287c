"""``nemobuild doctor``: look at the machine, for a profile or in general."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def doctor(
    profile: Annotated[
        str | None, typer.Argument(help="Profile to judge the machine by; without one: for serving at all.")
    ] = None,
    exposed: Annotated[
        bool, typer.Option("--exposed", help="Only this: ask every listening port what a stranger could do there.")
    ] = False,
    json: Json = False,
) -> None:
    """Check driver, GPUs, memory, disk, shared memory, versions, containers and ports; all of them, always.

    Exit status: 4 when something is missing or of the wrong kind, else 3 when something is too small, else 0.
    """
    from nemobuild.doctor.report import examine, examine_exposure
    from nemobuild.places import load_plan, place

    if exposed:
        report = examine_exposure()
    else:
        plan = None if profile is None else load_plan(profile)
        report = examine(plan, Path("build") if profile is None else place(profile, "engine").parent)
    rows: list[tuple[str, str, str]] = []
    for finding in report.findings:
        rows.append((finding.level, finding.check, finding.what))
        rows += [("", "", text) for text in (finding.why, finding.next) if text]
    output.result({"profile": profile} | report.as_json(), output.table(rows), as_json=json)
    raise typer.Exit(report.exit_status)
