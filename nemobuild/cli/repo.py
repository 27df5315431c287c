"""``nemobuild repo``: emit the Triton model repository of a profile, or look one over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nemobuild.cli import output
from nemobuild.cli.options import Json, Output


class _EmitByDefault(TyperGroup):
    """``repo PROFILE`` is ``repo emit PROFILE``: to emit is what one mostly wants."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["emit", *args]
        return super().parse_args(ctx, args)


repo = typer.Typer(
    cls=_EmitByDefault,
    no_args_is_help=True,
    help="Emit a profile's model repository (`nemobuild repo PROFILE`), or check any (`nemobuild repo check DIR`).",
)


@repo.command()
def emit(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    target: Output = None,
    source: Annotated[str | None, typer.Option(help="Hugging Face folder (tokenizer and template).")] = None,
    engine: Annotated[
        Path | None, typer.Option(help="Checkpoint (cpu), engine (tensorrt) or Hugging Face folder (llmapi).")
    ] = None,
    json: Json = False,
) -> None:
    """Emit a model repository that stands alone: tokenizing, engine, text, streaming chat."""
    from nemobuild.artefacts import artefact, wanted
    from nemobuild.places import load_plan, place, source_folder
    from nemobuild.triton.repository import plan_repository, write_repository
    from nemobuild.units import format_bytes

    plan = load_plan(profile)
    target = target or place(profile, "repository")
    folder = source_folder(source or profile)
    # Made from what `build` would take, it is also what `build` would make, and is kept.
    inputs = wanted(plan, profile, "repository", None) if source is None and engine is None else None
    content = plan_repository(plan, folder, engine or artefact(plan, profile), inputs=inputs)
    write_repository(content, target)
    value = {"repository": str(target), "files": len(content.files), "size_bytes": content.size_bytes}
    text = f"repository  {target}\nholds       {len(content.files)} files, {format_bytes(content.size_bytes)}"
    output.result(value, text, as_json=json)


@repo.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Model repository.")],
    json: Json = False,
) -> None:
    """Find what Triton, its backends or a client would stumble over, without starting anything."""
    from dataclasses import asdict

    from nemobuild.errors import IntegrityError
    from nemobuild.triton.check import RULES, check_repository

    findings = check_repository(folder)
    value = {"repository": str(folder), "rules": list(RULES), "findings": [asdict(f) for f in findings]}
    rows = [(f.rule, f.file, f.what) for f in findings]
    text = output.table(rows, ("rule", "file", "finding")) if rows else f"{folder}: {len(RULES)} rules, no finding"
    output.result(value, text, as_json=json)
    if findings:
        first = findings[0]
        raise IntegrityError(
            "bad-repository",
            f"{folder} has {len(findings)} finding(s).",
            why=f"{first.file}: {first.what}.",
            next="Emit it again, or mend what is listed.",
        )
