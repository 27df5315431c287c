"""``nemobuild convert``: Hugging Face folder -> TensorRT-LLM checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json, Output


def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, or a profile whose weights were fetched.")],
    target: Output = None,
    precision: Annotated[str, typer.Option(help="bf16.")] = "bf16",
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks (default: the profile's, or 1).")] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="Pipeline-parallel ranks (default: the profile's, or 1).")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core, at most 8.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a run that was killed.")] = False,
    json: Json = False,
) -> None:
    """Convert weights to a TensorRT-LLM checkpoint. Everything is checked before the first weight is read."""
    from nemobuild.config import load_profile
    from nemobuild.convert import executor
    from nemobuild.errors import UsageError
    from nemobuild.places import is_profile, place, source_folder
    from nemobuild.units import format_bytes
    from nemobuild.weights.snapshot import open_snapshot

    if precision != "bf16":
        raise UsageError("bad-precision", f"--precision {precision!r} is not supported.", why="Known: bf16.")
    if is_profile(source):
        checkpoint = load_profile(source).checkpoint
        tp, pp = tp or checkpoint.tensor_parallel, pp or checkpoint.pipeline_parallel
        target = target or place(source, "checkpoint")
    if target is None:
        raise UsageError(
            "no-target", "A folder for the checkpoint is needed.", next=f"nemobuild convert {source} -o FOLDER"
        )
    snapshot = open_snapshot(source_folder(source))
    plan = executor.prepare(snapshot, tp=tp or 1, pp=pp or 1, workers=workers)
    if not json:
        output.hint(
            f"{format_bytes(plan.source_bytes)} to read, {format_bytes(plan.target_bytes)} to write, "
            f"peak memory below {format_bytes(plan.peak_memory_bytes)}"
        )
    with output.resumable(target), output.byte_progress("convert", quiet=json) as show:
        report = executor.convert(
            snapshot,
            target,
            tp=tp or 1,
            pp=pp or 1,
            workers=workers,
            resume=resume,
            progress=lambda p: show(p.done_bytes, p.total_bytes),
        )
    value = {
        "checkpoint": str(report.output),
        "key": report.key,
        "files": dict(report.files),
        "elapsed_s": report.elapsed_s,
        "resumed_bytes": report.resumed_bytes,
    }
    rows = [
        ("checkpoint", str(target)),
        ("written", output.speed(report.target_bytes, report.elapsed_s)),
        ("key", report.key[:16]),
    ]
    output.result(value, output.table(rows), as_json=json)
