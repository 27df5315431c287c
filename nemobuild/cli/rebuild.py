"""``nemobuild rebuild``: the newest revision, rebuilt as far as it changed, and published if it passes its gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemobuild.errors import VerificationFailed
    from nemobuild.gates.results import Gate
    from nemobuild.pipeline import Step
    from nemobuild.rebuild import Rebuilt


def rebuild(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    since: Annotated[
        str, typer.Option(help="Version to compare with: last, or the commit that one was made of.")
    ] = "last",
    report: Annotated[
        Path | None, typer.Option(help="Folder for the report, replaced whole; default: build/PROFILE/report.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Build and serve with what is installed here.")] = False,
    container: Annotated[bool, typer.Option("--container", help="Use the profile's container, by Docker.")] = False,
    device: Annotated[str, typer.Option(help="Where FP8 is calibrated: cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Fetch the newest revision, build what it changes, run the gates, publish. Exit status 7 when a gate fails."""
    from nemobuild.errors import UsageError
    from nemobuild.pipeline import Options
    from nemobuild.rebuild import rebuild as run

    if local and container:
        raise UsageError("local-or-container", "--local and --container exclude each other.", next="Give one of them.")
    options = Options("local" if local else "container" if container else "auto", device)
    with output.resumable(profile, lambda: False), output.byte_progress("rebuild", quiet=json) as bar:

        def tell(step: Step) -> None:
            if not json and step.action != "keep" and step.report is None:
                output.hint(f"{step.stage}: {'; '.join(step.why)}")

        found = run(
            profile,
            options,
            since=since,
            report=report,
            on_step=tell,
            on_progress=lambda stage, done, total, now: bar(done, total, f"{stage} {now[:60]}"),
            on_note=lambda text: None if json else output.hint(text),
        )
    output.result(_value(found), _text(found), as_json=json)
    if found.status == "failed":
        stays = f"Version {found.publication.number} stays." if found.publication else "Nothing is published."
        raise refusal(found.gates, stays, f"Read {found.report}/report.md; what was made lies in {found.failed}.")


def _value(found: Rebuilt) -> dict[str, object]:
    return {
        "status": found.status,
        "revision": found.revision,
        "publication": found.publication.number if found.publication else None,
        "keys": dict(found.publication.keys) if found.publication else {},
        "gates": outcomes(found.gates),
        "report": str(found.report) if found.report else None,
        "failed": str(found.failed) if found.failed else None,
        "rolled_back": found.rolled_back,
    }


def _text(found: Rebuilt) -> str:
    version = f"version {found.publication.number}" if found.publication else "nothing"
    said = {"nothing new": f"nothing new: {version} is published", "published": f"published {version}"}
    parts = [gate_table(found.gates), said.get(found.status, f"not published; {version} stays")]
    if found.rolled_back:
        parts.append(
            f"version {found.rolled_back}, which the sources ask for, was rolled back: `rollback --to` goes there"
        )
    if found.report:
        parts.append(f"report {found.report / 'report.md'}")
    return "\n".join(filter(None, parts))


def outcomes(gates: Sequence[Gate]) -> dict[str, str]:
    """``passed``, ``failed`` or ``not run`` by gate."""
    return {gate.name: "not run" if gate.skipped else "passed" if gate.passed else "failed" for gate in gates}


def gate_table(gates: Sequence[Gate]) -> str:
    """All checks of all gates; nothing where there is none."""
    words = {True: "holds", False: "FAILS", None: ""}
    rows = [(gate.name, c.what, c.value, c.bound, words[c.passed]) for gate in gates for c in gate.checks]
    rows += [(gate.name, f"not run: {gate.skipped}", "", "", "") for gate in gates if gate.skipped]
    return output.table(rows, ("gate", "what", "value", "allowed", "")) if rows else ""


def refusal(gates: Sequence[Gate], stays: str, next_step: str) -> VerificationFailed:
    """The error that names the first check that does not hold."""
    from nemobuild.errors import VerificationFailed

    gate = next(gate for gate in gates if not gate.passed)
    check = next(check for check in gate.checks if check.passed is False)
    bound = f" (allowed: {check.bound})" if check.bound else ""
    why = f"{check.what}: {check.value.rstrip('.')}{bound}. {stays}"
    return VerificationFailed("gate-failed", f"The gate {gate.name} failed.", why=why, next=next_step)
