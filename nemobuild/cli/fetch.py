"""``nemobuild fetch``: the weights of a profile or of a Hub repository, pinned and verified."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def fetch(
    source: Annotated[str, typer.Argument(help="Profile, or Hub repository such as nvidia/NAME.")],
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the snapshot; a complete one is kept.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the commit is recorded.")] = None,
    json: Json = False,
) -> None:
    """Get a complete, verified snapshot of a model's weights."""
    from nemobuild.sources import fetch_source

    with output.byte_progress("fetch", quiet=json) as show:
        folder = fetch_source(source, target, revision, show)
    output.result({"snapshot": str(folder)}, f"snapshot  {folder}", as_json=json)
