"""``nemobuild key``: make an API key for the gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def key(
    name: Annotated[str, typer.Argument(help="Who will use it; shown in the gateway's log.")],
    file: Annotated[Path, typer.Option(help="File for the hash, for `nemobuild serve --api-keys`.")],
    json: Json = False,
) -> None:
    """Make an API key and add its hash to a file. The key is shown once and kept nowhere.

    To revoke a key, delete its line from the file; a running gateway sees it.
    """
    from nemobuild.gateway.keys import make_key

    made = make_key(file, name)
    output.result({"name": name, "key": made, "file": str(file)}, made, as_json=json)
