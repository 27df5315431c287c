"""``nemobuild repo``: emit the Triton model repository of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json, Output


def repo(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    target: Output = None,
    source: Annotated[str | None, typer.Option(help="Hugging Face folder (tokenizer and template).")] = None,
    engine: Annotated[Path | None, typer.Option(help="Checkpoint (cpu) or engine folder (tensorrt).")] = None,
    json: Json = False,
) -> None:
    """Emit a model repository that stands alone: tokenizing, engine, text, streaming chat."""
    from nemobuild.config import load_profile
    from nemobuild.places import place, source_folder
    from nemobuild.triton.repository import plan_repository, write_repository
    from nemobuild.units import format_bytes

    config = load_profile(profile)
    target = target or place(profile, "repository")
    stage = "checkpoint" if config.runtime == "cpu" else "engine"
    plan = plan_repository(
        config, source_folder(source or profile), engine or place(profile, stage), Path(profile).stem
    )
    write_repository(plan, target)
    value = {"repository": str(target), "files": len(plan.files), "size_bytes": plan.size_bytes}
    text = f"repository  {target}\nholds       {len(plan.files)} files, {format_bytes(plan.size_bytes)}"
    output.result(value, text, as_json=json)
