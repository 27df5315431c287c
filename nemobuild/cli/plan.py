"""``nemobuild plan``: does it fit, with which limits, and if not, what then."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

if TYPE_CHECKING:
    from nemobuild.plan.planner import Plan


def plan(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    gpu: Annotated[str | None, typer.Option(help="Plan for this card (engine_configs/gpus.yaml) instead.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every limit and why it has its value.")] = False,
    commands: Annotated[bool, typer.Option("--commands", help="Show the commands that build and serve it.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also draw memory and throughput to this SVG file.")] = None,
    json: Json = False,
) -> None:
    """Plan memory, limits and speed of a profile before anything is downloaded. Needs no network and no GPU.

    The exit status is 3 when it does not fit.
    """
    from nemobuild.errors import from_os_error
    from nemobuild.places import load_plan
    from nemobuild.plan import picture, report

    made = load_plan(profile, gpu)
    if svg is not None:
        try:
            svg.write_text(picture.svg_picture(made), encoding="utf-8")
        except OSError as error:
            raise from_os_error(error, svg, "writing") from error
    value = report.as_json(made)
    parts = [as_text(made, explain=explain)]
    if commands:
        from nemobuild import pipeline

        lines = pipeline.commands(made, profile)
        value["commands"] = [{"title": title, "argv": argv} for title, argv in lines]
        parts.append("\n".join(f"# {title}\n{shlex.join(argv)}" for title, argv in lines))
    output.result(value, "\n\n".join(parts), as_json=json)
    if not made.fits:
        raise report.does_not_fit(made)


def as_text(made: Plan, *, explain: bool = False) -> str:
    """The plan as it is shown in a terminal."""
    from nemobuild.plan import picture, report

    parts = [report.verdict(made), picture.terminal_picture(made)]
    for section in report.sections(made, explain=explain):
        title = [section.title] if section.title else []
        parts.append("\n".join([*title, output.table(section.rows, section.head)]))
    return "\n\n".join(parts)
