"""``nemobuild verify``: a checkpoint against the weights it was made from, and FP8 against its thresholds."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

if TYPE_CHECKING:
    from nemobuild.convert.quality import HeldOutText, QualityReport
    from nemobuild.convert.verify import VerifyReport
    from nemobuild.weights.snapshot import Snapshot

_WORST = 5  # rows of each table


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a profile.")],
    against: Annotated[str | None, typer.Option(help="Hugging Face folder; default: the profile's.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to compare logits on (BF16); may be repeated.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="JSON lines to measure FP8 on; default: the texts that ship with nemobuild.")
    ] = None,
    tokens_per_text: Annotated[int, typer.Option(help="Tokens taken of each text.", min=2)] = 128,
    bounds: Annotated[str | None, typer.Option(help="Profile whose quality bounds hold; default: built in.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the measurement on texts out.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the error by block as a picture (FP8).")] = None,
    json: Json = False,
) -> None:
    """Compare names, shapes, types, values and logits; measure the quality of FP8. Exit status 7 beyond the bounds."""
    from nemobuild.config import load_profile
    from nemobuild.convert.quality import QualityThresholds
    from nemobuild.convert.quality_plot import svg_errors
    from nemobuild.convert.verify import verify as compare
    from nemobuild.errors import UsageError, VerificationFailed, from_os_error
    from nemobuild.places import is_profile, place, source_folder
    from nemobuild.weights.snapshot import open_snapshot

    folder = place(checkpoint, "checkpoint") if is_profile(checkpoint) else Path(checkpoint)
    profile = bounds or (checkpoint if is_profile(checkpoint) else None)
    thresholds = QualityThresholds(**load_profile(profile).quality.model_dump()) if profile else QualityThresholds()
    if against is None and not is_profile(checkpoint):
        raise UsageError("no-source", "--against is needed.", next=f"nemobuild verify {checkpoint} --against FOLDER")
    snapshot = open_snapshot(source_folder(against or checkpoint), fp8=True)
    held_out = [] if weights_only or not _is_fp8(folder) else _held_out(texts, snapshot, tokens_per_text)
    if svg is not None and not held_out:
        raise UsageError(
            "nothing-to-draw",
            "--svg draws what FP8 costs, and nothing is measured.",
            why="Only FP8 checkpoints are measured, and only without --weights-only.",
        )
    with output.byte_progress("verify", quiet=json) as show:
        report = compare(
            folder,
            snapshot,
            _token_ids(snapshot, prompt) if prompt else None,
            texts=held_out,
            thresholds=thresholds,
            progress=lambda p: show(p.done_bytes, p.total_bytes),
            block_progress=lambda done, blocks: show(snapshot.weight_bytes * done // blocks, snapshot.weight_bytes),
        )
    value = asdict(report) | {"checkpoint": str(report.checkpoint), "passed": report.passed}
    output.result(_finite(value | {"thresholds": asdict(thresholds)}), _text(report), as_json=json)
    if svg is not None and report.quality is not None:
        try:
            svg.write_text(svg_errors(str(folder), report.quality, report.weights, thresholds), encoding="utf-8")
        except OSError as error:
            raise from_os_error(error, svg, "writing") from error
    if not report.passed:
        worst = report.findings[0]
        measured = worst.kind in ("quality", "activations")
        raise VerificationFailed(
            "below-thresholds" if measured else "checkpoint-differs",
            f"{folder} is not good enough." if measured else f"{folder} differs from {snapshot.path}.",
            why=f"{worst.where}: {worst.what}",
            next="Calibrate with other texts, or keep BF16." if measured else "Convert again into a new folder.",
        )


def _text(report: VerifyReport) -> str:
    from nemobuild.units import format_bytes, format_seconds

    error = "not compared" if report.max_logit_error is None else f"{report.max_logit_error:.2e}"
    rows = [
        ("tensors", str(report.tensors)),
        ("compared", f"{format_bytes(report.compared_bytes)}, all in {format_seconds(report.elapsed_s)}"),
    ]
    if report.precision == "bf16":
        rows.append(("logits", f"largest difference {error} over {report.prompt_tokens} tokens"))
        good = "equal to its source"
    else:
        good = "FP8 of its source, within the thresholds" if report.quality else "FP8 of its source"
    rows.append(("verdict", good if report.passed else f"{len(report.findings)} finding(s)"))
    parts = [output.table(rows)]
    if report.findings:
        found = [(f.kind, f.where, f.what) for f in report.findings[: 2 * _WORST]]
        parts.append(output.table(found, ("finding", "where", "what")))
    if report.weights:
        worst = [(e.where, f"{e.error:.3%}", f"{e.half_steps:.3f}") for e in report.weights[:_WORST]]
        parts.append(output.table(worst, ("worst weights", "error", "half steps")))
    if report.quality is not None:
        parts.append(_quality_text(report.quality))
    return "\n\n".join(parts)


def _quality_text(quality: QualityReport) -> str:
    languages = [
        (
            q.language or "-",
            str(q.tokens),
            f"{q.divergence:.4f}",
            f"{q.source_perplexity:.2f}",
            f"{q.perplexity:.2f}",
            f"{q.perplexity_increase:+.2%}",
            f"{q.greedy_agreement:.1%}",
        )
        for q in (quality.total, *quality.languages)
    ]
    head = ("texts", "tokens", "KL divergence", "perplexity before", "after", "change", "same greedy token")
    ranges = [(a.where, f"{a.saturated_share:.2e}", f"{a.peak:.2f}") for a in quality.activations[:_WORST]]
    tables = [output.table(languages, head)]
    if ranges:
        tables.append(output.table(ranges, ("worst activations", "saturated", "peak over range")))
    return "\n\n".join(tables)


def _is_fp8(folder: Path) -> bool:
    """Cheap look at the configs; a folder that cannot be read is reported by the comparison."""
    from nemobuild.errors import NemobuildError
    from nemobuild.model.hf_config import load_json

    try:
        config = load_json(folder / "config.json")
    except NemobuildError:
        return False
    quantization = config.get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    return algorithm == "FP8" or "quantization_config" in config


def _held_out(texts: Path | None, snapshot: Snapshot, tokens: int) -> list[HeldOutText]:
    from nemobuild.convert.quality import HeldOutText
    from nemobuild.convert.samples import held_out, load_samples

    tokens = min(tokens, snapshot.spec.max_context_tokens)
    loaded = load_samples(texts or held_out(), snapshot.path, snapshot.spec, tokens_per_sample=tokens)
    return [HeldOutText(s.token_ids, s.language or "") for s in loaded.samples if len(s.token_ids) > 1]


def _finite(value: Any) -> Any:
    """``value`` with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _token_ids(snapshot: Snapshot, prompts: list[str]) -> list[list[int]]:
    from nemobuild.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(snapshot.path, snapshot.spec)
    return [tokenizer.encode(text).ids for text in prompts]
