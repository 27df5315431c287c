"""``nemobuild convert``: Hugging Face folder -> TensorRT-LLM checkpoint, or FP8 Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json, Output

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nemobuild.convert.executor import Report
    from nemobuild.convert.workers import Progress
    from nemobuild.weights.snapshot import Snapshot


def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder, or a profile whose weights were fetched.")],
    target: Output = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp8 (default: the profile's, or bf16).")] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keys and values: bf16 or fp8 (default: the profile's, or bf16).")
    ] = None,
    kv_scales: Annotated[
        str | None,
        typer.Option(help="FP8 KV scales: clamped to at least 1, or measured (default: the profile's, or clamped)."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="trtllm, or hf for FP8 in ModelOpt's form (default: the profile's, or trtllm).")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="JSON lines of texts for the FP8 scales, or none (default: our own texts).")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Texts used to calibrate (default: all).")] = None,
    tokens_per_sample: Annotated[
        int | None, typer.Option(min=1, help="Tokens to which each text is cut (default: 512).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to calibrate: cpu or cuda (default: cpu).")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks (default: the profile's, or 1).")] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="Pipeline-parallel ranks (default: the profile's, or 1).")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core, at most 8.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after a run that was killed.")] = False,
    json: Json = False,
) -> None:
    """Convert weights. Everything is checked, and the peak of memory said, before the first weight is read."""
    from nemobuild.config import CheckpointConfig, load_profile
    from nemobuild.errors import UsageError
    from nemobuild.places import is_profile, place, source_folder
    from nemobuild.weights.snapshot import open_snapshot

    checkpoint, policy = CheckpointConfig(), None
    if is_profile(source):
        profile = load_profile(source)
        checkpoint, policy = profile.checkpoint, profile.reasoning.policy
        target = target or place(source, "checkpoint")
    if target is None:
        raise UsageError(
            "no-target", "A folder for the checkpoint is needed.", next=f"nemobuild convert {source} -o FOLDER"
        )
    form: dict[str, Any] = {
        "format": format or checkpoint.format,
        "kv_cache": kv_cache or checkpoint.kv_cache,
        "tp": tp or checkpoint.tensor_parallel,
        "pp": pp or checkpoint.pipeline_parallel,
        "workers": workers,
    }
    precision = precision or checkpoint.precision
    how = {"samples": samples, "tokens-per-sample": tokens_per_sample, "device": device}
    if precision != "fp8" and (given := _given(how | {"calibration": calibration, "kv-scales": kv_scales})):
        raise UsageError("no-fp8", f"--{given} is for --precision fp8.", next="Add it, or leave this out.")
    clamp_kv = _clamped(kv_scales or checkpoint.kv_scales, form)
    snapshot = open_snapshot(source_folder(source), fp8=precision == "fp8")
    brought, given_texts = snapshot.quantization is not None, calibration or checkpoint.calibration.texts
    if (brought or given_texts == "none") and (given := _given(how)):
        raise UsageError(
            "no-calibration",
            f"--{given} is for calibration, and there is none here.",
            why="The source is FP8 already and brings its scales." if brought else "--calibration none runs no texts.",
            next="Leave it out.",
        )
    texts = {
        "calibration": _path(given_texts),
        "samples": samples or checkpoint.calibration.samples,
        "tokens_per_sample": tokens_per_sample or checkpoint.calibration.tokens_per_sample,
        "reasoning": policy,
        "clamp_kv": clamp_kv,
        "device": device or "cpu",
    }
    label = None
    if precision == "fp8":
        report, label = _to_fp8(snapshot, target, form | texts, resume=resume, quiet=json)
    else:
        report = _to_bf16(snapshot, target, form | {"precision": precision}, resume=resume, quiet=json)
    _show(report, label, json=json)


def _to_bf16(snapshot: Snapshot, target: Path, form: dict[str, Any], *, resume: bool, quiet: bool) -> Report:
    from nemobuild.convert import executor
    from nemobuild.units import format_bytes

    plan = executor.prepare(snapshot, **form)
    if not quiet:
        output.hint(
            f"{format_bytes(plan.source_bytes)} to read, {format_bytes(plan.target_bytes)} to write, "
            f"peak memory below {format_bytes(plan.peak_memory_bytes)}"
        )
    with output.resumable(target), output.byte_progress("convert", quiet=quiet) as show:
        return executor.convert(
            snapshot, target, **form, resume=resume, progress=lambda p: show(p.done_bytes, p.total_bytes)
        )


def _to_fp8(
    snapshot: Snapshot, target: Path, options: dict[str, Any], *, resume: bool, quiet: bool
) -> tuple[Report, str | None]:
    """What was done, and the label of a result without calibration data."""
    from nemobuild.convert.quantize import prepare, quantize
    from nemobuild.units import format_bytes

    plan = prepare(snapshot, **options)
    if not quiet:
        conversion = plan.conversion
        output.hint(
            f"{format_bytes(conversion.source_bytes)} to read, {format_bytes(conversion.target_bytes)} to write"
        )
        if (run := plan.calibration) is not None and plan.samples is not None:
            output.hint(
                f"calibration on {run.device}: {run.samples} texts, {run.tokens:,} tokens of {plan.samples.path.name}"
            )
            where = f"GPU memory {format_bytes(run.device_bytes)}, " if run.device_bytes else ""
            output.hint(f"{where}{format_bytes(run.disk_bytes)} of disk while it runs")
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.parts)
        output.hint(f"peak memory below {format_bytes(plan.peak_memory_bytes)}: {parts}")
    blocks = len(snapshot.spec.blocks)

    def tell(progress: Progress) -> None:
        parts = progress.tensor.split(".")
        now = f"block {int(parts[2]) + 1}/{blocks}" if parts[1:2] == ["layers"] else ""
        show(progress.done_bytes, progress.total_bytes, now)

    with output.resumable(target), output.byte_progress("quantise", quiet=quiet) as show:
        report = quantize(plan, target, resume=resume, progress=tell)
    label = "weights only, no data: activations are scaled while the model runs"
    return report, label if plan.description is not None and plan.samples is None else None


def _show(report: Report, label: str | None, *, json: bool) -> None:
    value = {
        "checkpoint": str(report.output),
        "key": report.key,
        "files": dict(report.files),
        "elapsed_s": report.elapsed_s,
        "resumed_bytes": report.resumed_bytes,
        "requantized": [
            {"tensor": r.tensor, "source_scale": r.source_scale, "scale": r.scale, "relative_error": r.relative_error}
            for r in report.requantized
        ],
        "zero_tensors": list(report.zero_tensors),
        "label": label,
    }
    rows = [
        ("checkpoint", str(report.output)),
        ("written", output.speed(report.target_bytes, report.elapsed_s)),
        ("key", report.key[:16]),
    ]
    if label is not None:
        rows.append(("calibration", label))
    if report.requantized:
        worst = report.requantized[0]
        rows.append(
            (
                "rounded again",
                f"{len(report.requantized)} tensors; worst {worst.tensor}: error {worst.relative_error:.2%}",
            )
        )
    if report.zero_tensors:
        rows.append(("all zero", f"{len(report.zero_tensors)} tensors, such as {report.zero_tensors[0]}"))
    output.result(value, output.table(rows), as_json=json)


def _given(options: Mapping[str, object]) -> str | None:
    """Name of the first option that was given."""
    return next((name for name, value in options.items() if value is not None), None)


def _clamped(kv_scales: str, form: dict[str, Any]) -> bool:
    from nemobuild.errors import UsageError

    if kv_scales not in ("clamped", "measured"):
        raise UsageError("bad-kv-scales", f"--kv-scales {kv_scales!r} is unknown.", why="Known: clamped, measured.")
    if kv_scales == "measured" and (form["kv_cache"], form["format"]) != ("fp8", "trtllm"):
        raise UsageError(
            "bad-kv-scales",
            "--kv-scales measured is for --kv-cache fp8 and --format trtllm.",
            why="A BF16 cache has no scales, and the form hf always holds them as measured.",
        )
    return kv_scales == "clamped"


def _path(texts: str | None) -> Path | str | None:
    return texts if texts in (None, "none") else Path(texts)
