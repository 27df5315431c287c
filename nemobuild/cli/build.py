"""``nemobuild build``: engine and model repository of a profile, reusing what is done already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

if TYPE_CHECKING:
    from nemobuild.pipeline import Step

_WORDS = {"keep": "kept", "make": "made", "remake": "made anew"}


def build(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Use the trtllm-build on PATH.")] = False,
    container: Annotated[bool, typer.Option("--container", help="Use the profile's container, by Docker.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that was killed.")] = False,
    device: Annotated[str, typer.Option(help="Where FP8 is calibrated: cpu or cuda.")] = "cpu",
    timing_cache: Annotated[
        Path | None, typer.Option(help="TensorRT's timings to use; default: those of the last build.")
    ] = None,
    json: Json = False,
) -> None:
    """Bring a profile's checkpoint, engine and repository up to date. What is done already is kept."""
    from nemobuild.errors import UsageError
    from nemobuild.pipeline import Options, steps
    from nemobuild.pipeline import build as run

    if local and container:
        raise UsageError("local-or-container", "--local and --container exclude each other.", next="Give one of them.")
    options = Options("local" if local else "container" if container else "auto", resume, device, timing_cache)
    if dry_run:
        _show(steps(profile, options), done=False, json=json)
        return
    stage = ""
    with output.resumable(profile, lambda: stage == "checkpoint"), output.byte_progress("build", quiet=json) as bar:

        def tell(step: Step) -> None:
            nonlocal stage
            stage = step.stage
            if not json and step.action != "keep" and step.report is None:
                output.hint(f"{step.stage}: {'; '.join(step.why)}")

        def progress(stage: str, done: int, total: int, now: str) -> None:
            bar(done, total, f"{stage} {now[:60]}")

        done = run(profile, options, on_step=tell, on_progress=progress)
    _show(done, done=True, json=json)


def _show(steps: list[Step], *, done: bool, json: bool) -> None:
    from nemobuild.units import format_bytes, format_seconds

    rows = []
    for step in steps:
        words = _WORDS[step.action] if done else {"keep": "keep", "make": "make", "remake": "make anew"}[step.action]
        took = format_seconds(step.elapsed_s) if step.report is not None else ""
        report = step.report or {}
        used = [
            f"{title} {format_bytes(size)}"
            for field, title in (("peak_memory_bytes", "host"), ("peak_gpu_bytes", "GPU"))
            if isinstance(size := report.get(field), int)
        ]
        rows.append((step.stage, words, took, "; ".join((*step.why, *used)), str(step.folder)))
    value = [
        {
            "stage": step.stage,
            "folder": str(step.folder),
            "action": step.action,
            "why": list(step.why),
            "elapsed_s": step.elapsed_s,
            "report": step.report,
        }
        for step in steps
    ]
    output.result(value, output.table(rows), as_json=json)
