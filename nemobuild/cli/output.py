"""The only printer. Results go to standard output; progress, hints and errors go to standard error.

With ``--json`` a result is one JSON document on standard output and an error one on standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nemobuild.errors import NemobuildError
from nemobuild.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


def result(value: Any, text: str, *, as_json: bool) -> None:
    """Show a command's result: ``value`` as JSON, or ``text``."""
    print(json.dumps(value, indent=1, ensure_ascii=False) if as_json else text)


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Columns aligned by their widest cell, two spaces apart."""
    lines = [list(head), *map(list, rows)] if head else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def read_input() -> str:
    """All of standard input as text. Bytes that are not UTF-8 stay recognisable, and are refused later by name."""
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")


def hint(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def event(kind: str, **fields: Any) -> None:
    """One line of JSON on standard output, at once."""
    print(json.dumps({"event": kind} | fields, ensure_ascii=False), flush=True)


def piece(text: str, *, dim: bool = False) -> None:
    """A piece of a stream, shown at once. ``dim`` sets it apart where the terminal can."""
    if dim and sys.stdout.isatty():
        text = f"\x1b[2m{text}\x1b[0m"
    sys.stdout.write(text)
    sys.stdout.flush()


def error(failure: NemobuildError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(failure.as_dict(), ensure_ascii=False), file=sys.stderr)
        return
    lines = [f"error: {failure.what}", failure.why, failure.next]
    print("\n       ".join(line for line in lines if line), file=sys.stderr)


@contextmanager
def byte_progress(title: str, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A bar with GiB/s and time left; call it with (done, total) bytes and, if it says more, what is at work.

    Nothing is shown when ``quiet``.
    """
    if quiet:
        yield lambda done, total, now="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    bar: RichProgress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None)

        def show(done: int, total: int, now: str = "") -> None:
            bar.update(task, completed=done, total=total or None, description=f"{title} {now}".rstrip())

        yield show


@contextmanager
def resumable(target: object, asks: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say what an interrupt leaves, and how to go on: with ``--resume`` where what was at work ``asks`` for it."""
    try:
        yield
    except KeyboardInterrupt:
        how = "go on with --resume" if asks() else "run the same command again"
        hint(f"interrupted; what is done is kept: {how} (for {target})")
        raise


def speed(count_bytes: int, seconds: float) -> str:
    rate = count_bytes / seconds if seconds > 0 else 0.0
    return f"{format_bytes(count_bytes)} in {format_seconds(seconds)} ({format_bytes(rate)}/s)"
