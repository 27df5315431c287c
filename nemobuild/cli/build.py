"""``nemobuild build``: engine and model repository of a profile, reusing what is done already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Events, Json
from nemobuild.errors import UsageError

if TYPE_CHECKING:
    from nemobuild.pipeline import Options, Step

_WORDS = {
    "keep": ("keep", "kept"),
    "make": ("make", "made"),
    "remake": ("make anew", "made anew"),
    "reuse": ("reuse from the store", "reused from the store"),
}
_FROM_STORE = "; reused from the store"


def build(
    profile: Annotated[str, typer.Argument(help="Profile name or YAML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and why.")] = False,
    local: Annotated[bool, typer.Option("--local", help="Use the trtllm-build on PATH.")] = False,
    container: Annotated[bool, typer.Option("--container", help="Use the profile's container, by Docker.")] = False,
    device: Annotated[str, typer.Option(help="Where FP8 is calibrated: cpu or cuda.")] = "cpu",
    timing_cache: Annotated[
        Path | None, typer.Option(help="TensorRT's timings to use; default: those of the last build.")
    ] = None,
    events: Events = False,
    json: Json = False,
) -> None:
    """Bring a profile's checkpoint, engine and repository up to date. What is done already is kept."""
    from nemobuild.pipeline import Options, steps

    if local and container:
        raise UsageError("local-or-container", "--local and --container exclude each other.", next="Give one of them.")
    options = Options("local" if local else "container" if container else "auto", device, timing_cache)
    if not (json or events):
        _tell_advisories(profile)
    if dry_run:
        show(steps(profile, options), done=False, json=json)
        return
    done = run(profile, options, quiet=json, events=events)
    if not events:
        show(done, done=True, json=json)


def _tell_advisories(profile: str) -> None:
    """What is known to be wrong with the container that is built for; the file is read, nothing is asked."""
    from nemobuild.config import load_profile
    from nemobuild.plan.advisories import summary
    from nemobuild.plan.toolchain import load_toolchain

    machine = load_profile(profile).machine
    if machine is not None and (text := summary(load_toolchain(machine.container))):
        output.hint(text)


def run(profile: str, options: Options, *, quiet: bool, events: bool) -> list[Step]:
    """``pipeline.build`` with a view of what it does: one bar, or JSON lines on standard output."""
    from nemobuild.pipeline import build as carry_out

    with output.resumable(profile, lambda: False), output.byte_progress("build", quiet=quiet or events) as bar:

        def tell(step: Step) -> None:
            if events:
                output.event("step", **_as_dict(step))
            elif not quiet and step.action != "keep" and step.report is None:
                output.hint(f"{step.stage}: {'; '.join(step.why)}{_FROM_STORE if step.action == 'reuse' else ''}")

        def progress(stage: str, done: int, total: int, now: str) -> None:
            bar(done, total, f"{stage} {now[:60]}")
            if events:
                output.event("progress", stage=stage, done_bytes=done, total_bytes=total, now=now)

        return carry_out(profile, options, on_step=tell, on_progress=progress)


def _as_dict(step: Step) -> dict[str, Any]:
    return {
        "stage": step.stage,
        "folder": str(step.folder),
        "action": step.action,
        "why": list(step.why),
        "key": step.key,
        "elapsed_s": step.elapsed_s,
        "report": step.report,
    }


def show(steps: list[Step], *, done: bool, json: bool) -> None:
    from nemobuild.units import format_bytes, format_seconds

    rows = []
    for step in steps:
        words = _WORDS[step.action][done]
        took = format_seconds(step.elapsed_s) if step.report is not None else ""
        report = step.report or {}
        used = [
            f"{title} {format_bytes(size)}"
            for field, title in (("peak_memory_bytes", "host"), ("peak_gpu_bytes", "GPU"))
            if isinstance(size := report.get(field), int)
        ]
        rows.append((step.stage, words, took, "; ".join((*step.why, *used)), str(step.folder)))
    value = [_as_dict(step) for step in steps]
    output.result(value, output.table(rows), as_json=json)
