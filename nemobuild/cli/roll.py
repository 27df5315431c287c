"""``nemobuild roll`` and ``rollback``: bring a running service to another version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

Profile = Annotated[str, typer.Argument(help="Profile name or YAML file.")]
RoomOption = Annotated[
    Literal["auto", "one", "two"],
    typer.Option(
        "--room",
        help="two: start the new version beside the old one, and lose no request. one: stop the old one first. "
        "auto: two where memory allows.",
    ),
]
Drain = Annotated[
    float, typer.Option("--drain", min=0, help="Seconds that requests of the old version have to end; then it stops.")
]


def roll(profile: Profile, room: RoomOption = "auto", drain_s: Drain = 300.0, json: Json = False) -> None:
    """Bring the running service of a profile to the published version; back by itself when that one is broken."""
    from nemobuild.roll import roll as run

    rolled = run(profile, room=room, drain_limit_s=drain_s, on_event=_teller(json))
    output.result(rolled, _told(rolled), as_json=json)


def rollback(
    profile: Profile,
    to: Annotated[int | None, typer.Option("--to", min=1, help="Version to go to; default: the one before.")] = None,
    room: RoomOption = "auto",
    drain_s: Drain = 300.0,
    json: Json = False,
) -> None:
    """Go back to an earlier version of a profile: the running service, its folders, and what is published."""
    from dataclasses import asdict

    from nemobuild.roll import rollback as run

    done = run(profile, to, room=room, drain_limit_s=drain_s, on_event=_teller(json))
    lines = [f"version {done.before} -> {done.now}, also in its folders"]
    lines.append(_told(done.rolled) if done.rolled else "no service runs")
    output.result(asdict(done), "\n".join(lines), as_json=json)


def _teller(json: bool) -> Any:
    return (lambda event: None) if json else output.hint


def _told(rolled: Mapping[str, Any]) -> str:
    from nemobuild.units import format_seconds

    if rolled["room"] == "none":
        return f"version {rolled['now']} serves already"
    cut = f", {rolled['cut']} requests cut off" if rolled["cut"] else ""
    return (
        f"version {rolled['now']} serves; started in {format_seconds(rolled['start_s'])}, "
        f"drained in {format_seconds(rolled['drain_s'])}{cut}, downtime {format_seconds(rolled['downtime_s'])}"
    )
