"""``nemobuild migrate``: the same model on another runtime, behind the same contract, with a report that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def migrate(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file, of the runtime tensorrt or cpu.")],
    to: Annotated[str, typer.Option(help="The runtime to go to: llmapi.")] = "llmapi",
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="Profile to write; default: PROFILE-llmapi.yaml here.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Card of the new profile, where the old one names none.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for the report, replaced whole; default: with what is built.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Build and serve with what is installed here.")] = False,
    container: Annotated[bool, typer.Option("--container", help="Use the profile's container, by Docker.")] = False,
    device: Annotated[str, typer.Option(help="Where FP8 is calibrated: cpu or cuda.")] = "cpu",
    json: Json = False,
) -> None:
    """Write the profile for llmapi, build both, compare contract, weights and answers. Exit status 7 if they differ."""
    from nemobuild.cli.rebuild import gate_table, outcomes, refusal
    from nemobuild.errors import UsageError, nearest
    from nemobuild.migrate import RUNTIME
    from nemobuild.migrate import migrate as run
    from nemobuild.pipeline import Options

    if to != RUNTIME:
        raise UsageError("unknown-runtime", f"--to is {to!r}.", why=nearest(to, [RUNTIME]))
    if local and container:
        raise UsageError("local-or-container", "--local and --container exclude each other.", next="Give one of them.")
    with output.resumable(profile, lambda: False), output.byte_progress("migrate", quiet=json) as bar:
        found = run(
            profile,
            Options("local" if local else "container" if container else "auto", device),
            target=target,
            gpu=gpu,
            report=report,
            on_progress=lambda stage, done, total, now: bar(done, total, f"{stage} {now[:60]}"),
            on_note=lambda text: None if json else output.hint(text),
        )
    value = {
        "profile": str(found.profile),
        "left_out": list(found.left_out),
        "gates": outcomes(found.gates),
        "report": str(found.report),
        "publication": found.publication.number if found.publication else None,
    }
    lines = [gate_table(found.gates), f"profile {found.profile}", f"report {found.report / 'report.md'}"]
    lines += [f"left out: {field}" for field in found.left_out]
    output.result(value, "\n".join(lines), as_json=json)
    if found.publication is None:
        raise refusal(found.gates, "Nothing is published.", f"Read {found.report}/report.md.")
