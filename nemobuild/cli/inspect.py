"""``nemobuild inspect``: the blocks of a model, as a picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def inspect(
    model: Annotated[str, typer.Argument(help="Known model (super-49b-v1.5), profile, folder or config.json.")],
    svg: Annotated[Path | None, typer.Option(help="Also write the picture to this SVG file.")] = None,
    json: Json = False,
) -> None:
    """Draw the blocks of a model and count its parameters and KV cache. Needs no network and no weights."""
    from nemobuild.errors import from_os_error
    from nemobuild.model import picture
    from nemobuild.model.hf_config import load_spec
    from nemobuild.places import config_file

    spec = load_spec(config_file(model))
    if svg is not None:
        try:
            svg.write_text(picture.svg_picture(spec, Path(model).name), encoding="utf-8")
        except OSError as error:
            raise from_os_error(error, svg, "writing") from error
    columns = max(20, min(100, shutil.get_terminal_size().columns - 12) // 10 * 10)  # rows begin at round numbers
    text = f"{picture.terminal_picture(spec, columns)}\n\n{output.table(picture.summary(spec))}"
    output.result(picture.as_json(spec), text, as_json=json)
