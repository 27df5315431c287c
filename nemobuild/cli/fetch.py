"""``nemobuild fetch``: the weights of a profile or of a Hub repository, pinned and verified; all, or a slice."""

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
    blocks: Annotated[
        str | None,
        typer.Option(help="These blocks only, such as 0,8,47, as a small model for CI; auto: one of each kind."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --blocks: say what would be fetched, and how much.")
    ] = False,
    json: Json = False,
) -> None:
    """Get a complete, verified snapshot of a model's weights; or a slice of it that converts like the whole."""
    from nemobuild.errors import UsageError
    from nemobuild.sources import fetch_source

    if blocks is not None:
        _slice(source, target, revision, blocks, dry_run=dry_run, json=json)
        return
    if dry_run:
        raise UsageError("useless-option", "--dry-run is for --blocks.", next="Add it, or leave this out.")
    with output.byte_progress("fetch", quiet=json) as show:
        folder = fetch_source(source, target, revision, show)
    output.result({"snapshot": str(folder)}, f"snapshot  {folder}", as_json=json)


def _slice(source: str, target: Path | None, revision: str | None, blocks: str, *, dry_run: bool, json: bool) -> None:
    from nemobuild.errors import UsageError
    from nemobuild.sources import plan_slice
    from nemobuild.units import format_bytes
    from nemobuild.weights.slice import write_slice

    if not dry_run and target is None:
        raise UsageError(
            "no-target",
            "A folder for the slice is needed.",
            next=f"nemobuild fetch {source} --blocks {blocks} -o FOLDER",
        )
    cut = plan_slice(source, revision, _numbers(blocks))
    value = cut.record() | {"bytes": cut.total_bytes}
    chosen = ", ".join(map(str, cut.blocks))
    text = f"{format_bytes(cut.total_bytes)} to fetch: blocks {chosen} of {cut.of_blocks}, embedding and head"
    if dry_run or target is None:
        output.result(value, text, as_json=json)
        return
    if not json:
        output.hint(text)
    with output.byte_progress("fetch", quiet=json) as show:
        folder = write_slice(cut, target, progress=show)
    output.result({"snapshot": str(folder)} | value, f"slice  {folder}", as_json=json)


def _numbers(blocks: str) -> list[int] | None:
    from nemobuild.errors import UsageError

    if blocks == "auto":
        return None
    parts = blocks.split(",")
    if not all(part.strip().isdecimal() and len(part) < 8 for part in parts):
        raise UsageError("bad-blocks", f"--blocks {blocks!r} is no list of numbers.", next="Write 0,8,47, or auto.")
    return [int(part) for part in parts]
