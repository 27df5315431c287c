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
    from nemobuild.convert.quality import QualityReport, QualityThresholds
    from nemobuild.convert.verify import VerifyReport
    from nemobuild.errors import NemobuildError
    from nemobuild.weights.snapshot import Snapshot

_WORST = 5  # rows of each table
_TOKENS = 128  # of each text


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a profile.")],
    against: Annotated[str | None, typer.Option(help="Hugging Face folder; default: the profile's.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to compare logits on (BF16); may be repeated.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="JSON lines to measure FP8 on; default: the texts that ship with nemobuild.")
    ] = None,
    tokens_per_text: Annotated[
        int | None, typer.Option(help=f"Tokens taken of each text; default: {_TOKENS}.", min=2)
    ] = None,
    bounds: Annotated[str | None, typer.Option(help="Profile whose quality bounds hold; default: built in.")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the measurement on texts out.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the error by block as a picture (FP8).")] = None,
    json: Json = False,
) -> None:
    """Compare names, shapes, types, values and logits; measure the quality of FP8. Exit status 7 beyond the bounds."""
    from nemobuild.config import load_profile
    from nemobuild.convert.quality import QualityThresholds
    from nemobuild.convert.verify import verify as compare
    from nemobuild.errors import UsageError, VerificationFailed
    from nemobuild.gates.quality import held_out_texts
    from nemobuild.places import is_profile, place, source_folder
    from nemobuild.weights.snapshot import open_snapshot

    folder = place(checkpoint, "checkpoint") if is_profile(checkpoint) else Path(checkpoint)
    profile = bounds or (checkpoint if is_profile(checkpoint) else None)
    thresholds = QualityThresholds(**load_profile(profile).quality.model_dump()) if profile else QualityThresholds()
    if against is None and not is_profile(checkpoint):
        raise UsageError("no-source", "--against is needed.", next=f"nemobuild verify {checkpoint} --against FOLDER")
    precision = _precision(folder)
    on_texts: dict[str, object] = {"--texts": texts, "--tokens-per-text": tokens_per_text, "--svg": svg}
    if weights_only:
        _refuse(on_texts, "--weights-only leaves the measurement on texts out")
    if precision == "bf16":
        others = {"--bounds": bounds, "--weights-only": weights_only or None}
        _refuse(on_texts | others, f"{folder} is BF16, and only FP8 is measured")
    if precision == "fp8":
        _refuse({"--prompt": prompt or None}, f"{folder} is FP8, and logits are compared of BF16 only")
    if svg is not None:
        _check_writable(svg)
    snapshot = open_snapshot(source_folder(against or checkpoint), fp8=True)
    measured = precision == "fp8" and not weights_only
    held_out = held_out_texts(snapshot, tokens_per_text or _TOKENS, texts) if measured else []
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
    not_drawn = None if svg is None else _draw(svg, folder, report, thresholds)
    if not report.passed:
        worst = report.findings[0]
        poor = worst.kind in ("quality", "activations")
        raise VerificationFailed(
            "below-thresholds" if poor else "checkpoint-differs",
            f"{folder} is not good enough." if poor else f"{folder} differs from {snapshot.path}.",
            why=" ".join([f"{worst.where}: {worst.what}", *([str(not_drawn)] if not_drawn else [])]),
            next="Calibrate with other texts, or keep BF16." if poor else "Convert again into a new folder.",
        )
    if not_drawn is not None:
        raise not_drawn


def _refuse(options: dict[str, object], reason: str) -> None:
    """Refuse the first of ``options`` that is given."""
    from nemobuild.errors import UsageError

    for option, value in options.items():
        if value is not None:
            raise UsageError("useless-option", f"{option} would do nothing.", why=f"{reason}.", next="Leave it out.")


def _check_writable(svg: Path) -> None:
    """Before hours of measurement. A file that is there stays as it is."""
    from nemobuild.errors import from_os_error

    try:
        there = svg.exists() or svg.is_symlink()
        svg.open("ab").close()
        if not there:
            svg.unlink()
    except OSError as error:
        raise from_os_error(error, svg, "writing") from error


def _draw(svg: Path, folder: Path, report: VerifyReport, thresholds: QualityThresholds) -> NemobuildError | None:
    """Write the picture; why it is not there, otherwise."""
    from nemobuild.convert.quality_plot import svg_errors
    from nemobuild.errors import UsageError, from_os_error

    if report.quality is None:
        return UsageError("nothing-to-draw", f"{svg} is not written, since nothing could be measured.")
    try:
        svg.write_text(svg_errors(str(folder), report.quality, report.weights, thresholds), encoding="utf-8")
    except OSError as error:
        return from_os_error(error, svg, "writing")
    return None


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


def _precision(folder: Path) -> str | None:
    """Cheap look at the configs; None for a folder that cannot be read, which the comparison reports."""
    from nemobuild.errors import NemobuildError
    from nemobuild.model.hf_config import load_json
    from nemobuild.weights.quantized import QUANT_CONFIG

    try:
        config = load_json(folder / "config.json")
    except NemobuildError:
        return None
    quantization = config.get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    inline = config.get("quantization_config") is not None
    return "fp8" if algorithm == "FP8" or inline or (folder / QUANT_CONFIG).exists() else "bf16"


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
