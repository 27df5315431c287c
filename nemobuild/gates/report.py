"""What a rebuild did and found, for people (Markdown with pictures) and for machines (JSON), in one folder."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from nemobuild.errors import from_os_error
from nemobuild.folders import replace_folder
from nemobuild.gates.results import Gate
from nemobuild.store import Store
from nemobuild.units import format_bytes, format_seconds

_COLOURS = ("#4a7d00", "#2f6fdb")
_SHOWN = 200  # characters of an answer


@dataclass(frozen=True, slots=True)
class Stage:
    """One artefact: what was done and why, and its size beside that of the version before."""

    name: str
    action: str
    why: Sequence[str]
    elapsed_s: float
    size_bytes: int
    size_before_bytes: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """``changed`` are sentences; ``revisions`` are the commits before and now, where the source has them."""

    title: str
    verdict: str
    profile: str
    revisions: tuple[str | None, str | None]
    changed: Sequence[str]
    stages: Sequence[Stage]
    gates: Sequence[Gate]
    made_at: str
    pictures: Mapping[str, str] = field(default_factory=dict)


def stored_bytes(store: Store, stage: str, key: str) -> int:
    """Size of an object in the store."""
    return sum(int(entry["bytes"]) for entry in store.record(stage, key)["files"].values())


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.md``, ``report.json`` and the pictures as ``folder``, which is replaced whole."""
    stage = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        pictures = {**report.pictures, **_drawn(report)}
        for name, svg in pictures.items():
            (stage / f"{name}.svg").write_text(svg, encoding="utf-8")
        (stage / "report.md").write_text(markdown(report, list(pictures)), encoding="utf-8")
        (stage / "report.json").write_text(json.dumps(as_json(report), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise from_os_error(error, stage, "writing the report to") from error
    replace_folder(stage, folder)
    return folder


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON holds it: no NaN, no infinity, no pictures."""
    value = asdict(report) | {"gates": [asdict(gate) | {"passed": gate.passed} for gate in report.gates]}
    del value["pictures"]
    found: dict[str, Any] = _finite(value)
    return found


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    lines = [f"# {report.title}", "", f"**{report.verdict}**", ""]
    if any(report.revisions):
        before, now = (revision or "none" for revision in report.revisions)
        lines += [f"Revision {before} -> {now}.", ""]
    lines += ["## What changed", "", *[f"- {_line(text)}" for text in report.changed or ("nothing",)], ""]
    lines += _table(("stage", "done", "time", "size", "before", "why"), [_row(stage) for stage in report.stages])
    lines += ["", "## Gates", ""]
    for gate in report.gates:
        word = "not run" if gate.skipped else "passed" if gate.passed else "failed"
        lines += [f"### {gate.name}: {word}", ""]
        if gate.skipped:
            lines += [f"{gate.skipped}.", ""]
            continue
        lines += [f"Took {format_seconds(gate.elapsed_s)}.", ""]
        marks = {True: "yes", False: "**no**", None: ""}
        lines += _table(
            ("what", "value", "allowed", "holds"), [(c.what, c.value, c.bound, marks[c.passed]) for c in gate.checks]
        )
        lines += ["", *_answers(gate)]
    lines += [f"![{name}]({name}.svg)" for name in pictures]
    return "\n".join(lines).rstrip() + "\n"


def bars(title: str, unit: str, rows: Sequence[tuple[str, Sequence[float]]], kinds: Sequence[str]) -> str:
    """A standalone SVG: a bar for each value of each row, the colours by ``kinds``."""
    top = max((value for _, values in rows for value in values if math.isfinite(value)), default=0.0) or 1.0
    parts, y = [], 44
    for at, kind in enumerate(kinds):
        parts.append(f'<rect x="{14 + 220 * at}" y="36" width="14" height="8" fill="{_COLOURS[at]}"/>')
        parts.append(f'<text x="{34 + 220 * at}" y="44">{escape(kind)}</text>')
    for label, values in rows:
        y += 12
        parts.append(f'<text x="14" y="{y + 9}">{escape(label)}</text>')
        for at, value in enumerate(values):
            width = 360 * value / top if math.isfinite(value) else 0
            parts.append(f'<rect x="140" y="{y}" width="{width:.1f}" height="10" fill="{_COLOURS[at]}"/>')
            parts.append(f'<text x="{146 + width:.1f}" y="{y + 9}">{value:.1f}</text>')
            y += 13
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="580" height="{y + 14}" role="img" font-family="sans-serif" '
        f'font-size="11" fill="#444"><title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="14" y="22" font-size="14">{escape(title)}, {escape(unit)}</text>{"".join(parts)}</svg>\n'
    )


def _drawn(report: Report) -> dict[str, str]:
    pictures = {}
    made = [(stage.name, [stage.elapsed_s]) for stage in report.stages if stage.elapsed_s]
    made += [(f"gate {gate.name}", [gate.elapsed_s]) for gate in report.gates if gate.elapsed_s]
    if made:
        pictures["times"] = bars("Where the time went", "seconds", made, ())
    for gate in report.gates:
        if cells := gate.details.get("cells"):
            both = [cells, before] if (before := gate.details.get("before")) else [cells]
            rows = [
                (f"round {at + 1}", [one["tokens_per_s"] for one in rounds])
                for at, rounds in enumerate(zip(*both, strict=True))
            ]
            pictures[gate.name] = bars("Speed", "tokens per second", rows, ("this version", "before")[: len(both)])
    return pictures


def _answers(gate: Gate) -> list[str]:
    """The table of a gate whose details hold answers: those that are not right first."""
    answers = gate.details.get("answers")
    if not answers:
        return []
    before = gate.details.get("before", {})
    words = {True: "right", False: "**not right**", None: ""}
    rows = [
        (
            one["prompt"],
            words[one["right"]],
            words[before.get(one["prompt"])],
            one["unsound"] or one["wrong"],
            one["text"][:_SHOWN] or json.dumps(one["tool_calls"], ensure_ascii=False)[:_SHOWN],
        )
        for one in sorted(answers, key=lambda one: bool(one["right"]))
    ]
    return [*_table(("prompt", "answer", "before", "why", "text"), rows), ""]


def _row(stage: Stage) -> tuple[str, ...]:
    before = "" if stage.size_before_bytes is None else format_bytes(stage.size_before_bytes)
    took = format_seconds(stage.elapsed_s) if stage.elapsed_s else ""
    return stage.name, stage.action, took, format_bytes(stage.size_bytes), before, "; ".join(stage.why)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(map(_line, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _line(text: str) -> str:
    """``text`` as it is in one line of Markdown: what a model says, or a commit, is nobody's markup here."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    return text.replace("|", "\\|").replace("<", "&lt;").replace("`", "\\`").replace("![", "!\\[").replace("](", "]\\(")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
