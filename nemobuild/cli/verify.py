"""``nemobuild verify``: a checkpoint against the weights it was made from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder, or a profile.")],
    against: Annotated[str | None, typer.Option(help="Hugging Face folder; default: the profile's.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to compare logits on; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Compare names, shapes, types, bytes and logits. Exit status 7 when anything differs."""
    from nemobuild.convert.verify import verify as compare
    from nemobuild.errors import UsageError, VerificationFailed
    from nemobuild.places import is_profile, place, source_folder
    from nemobuild.units import format_bytes, format_seconds
    from nemobuild.weights.snapshot import open_snapshot

    folder = place(checkpoint, "checkpoint") if is_profile(checkpoint) else Path(checkpoint)
    if against is None and not is_profile(checkpoint):
        raise UsageError("no-source", "--against is needed.", next=f"nemobuild verify {checkpoint} --against FOLDER")
    snapshot = open_snapshot(source_folder(against or checkpoint))
    with output.byte_progress("verify", quiet=json) as show:
        report = compare(
            folder,
            snapshot,
            _token_ids(snapshot.path, prompt) if prompt else None,
            progress=lambda p: show(p.done_bytes, p.total_bytes),
        )
    error = "not compared" if report.max_logit_error is None else f"{report.max_logit_error:.2e}"
    rows = [
        ("tensors", str(report.tensors)),
        ("compared", f"{format_bytes(report.compared_bytes)}, all in {format_seconds(report.elapsed_s)}"),
        ("logits", f"largest difference {error} over {report.prompt_tokens} tokens"),
        ("verdict", "equal to its source" if report.passed else f"{len(report.findings)} finding(s)"),
    ]
    value = asdict(report) | {"checkpoint": str(report.checkpoint), "passed": report.passed}
    output.result(value, output.table(rows), as_json=json)
    if not report.passed:
        worst = report.findings[0]
        raise VerificationFailed(
            "checkpoint-differs",
            f"{folder} differs from {snapshot.path}.",
            why=f"{worst.where}: {worst.what}",
            next="Convert again into a new folder.",
        )


def _token_ids(source: Path, prompts: list[str]) -> list[list[int]]:
    from tokenizers import Tokenizer

    from nemobuild.errors import IntegrityError

    file = source / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise IntegrityError("bad-tokenizer", f"{file} cannot be read.", why=f"{error}.") from error
    return [tokenizer.encode(text).ids for text in prompts]
