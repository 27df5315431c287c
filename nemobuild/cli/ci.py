"""``nemobuild ci init``: a workflow that rebuilds when the checkpoint changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

ci = typer.Typer(help="Continuous integration for your own checkpoints.", no_args_is_help=True)


@ci.callback()
def _root() -> None:
    """Continuous integration for your own checkpoints."""


@ci.command("init")
def init(
    profile: Annotated[str, typer.Argument(help="Profile that the GPU job rebuilds: a name or a YAML file.")],
    source: Annotated[
        str,
        typer.Option("--nemobuild", help="Where the jobs get nemobuild from: a URL for pip, such as git+https://..."),
    ],
    gitlab: Annotated[bool, typer.Option("--gitlab", help="For GitLab instead of GitHub Actions.")] = False,
    cpu_profile: Annotated[str, typer.Option(help="Profile of the cheap job.")] = "smollm2-nas-cpu-fp8",
    runner: Annotated[str, typer.Option(help="Label (GitLab: tag) of your GPU runner.")] = "gpu",
    folder: Annotated[Path, typer.Option("--output", "-o", help="Root of the repository to write to.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Replace a workflow that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a workflow: a cheap CPU job for every push, and one for your GPU runner by schedule or dispatch."""
    from nemobuild.ci import workflow, write_workflow

    path, text = workflow(profile, source, gitlab=gitlab, cpu_profile=cpu_profile, runner=runner)
    write_workflow(folder / path, text, force=force)
    output.result({"file": str(folder / path)}, str(folder / path), as_json=json)
