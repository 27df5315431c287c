"""A conversion against ``cp`` of its source, in turns: the common part of the two conversion benchmarks.

Two synthetic models with equal blocks are made in a temporary folder, the second about four times larger. Then
each contender copies or converts in turn, in several rounds; the table shows medians. Before every run the last
output is deleted and flushed and the machine left alone for a moment, so that all of them start from free
memory in the same state (on virtual machines memory that was just freed is much faster to use again).

``cp`` leaves its bytes in memory and returns; a conversion brings them to the disk before it renames the folder, so
the ratio to ``cp`` is the strict comparison and that to ``cp + sync`` the like-for-like one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from nemobuild.units import format_bytes

CHILD = "--child"
COPIES = {"cp": 'cp -r "$0" "$1"', "cp + sync": 'cp -r "$0" "$1" && sync "$1"/* "$1"'}


@dataclass(frozen=True)
class Race:
    """``contenders`` are run as this program again, with ``--child`` SOURCE OUTPUT and the arguments of each.

    ``ratios`` has name -> (time of a copy, time of a conversion); ``prepare`` takes the source and gives what is to be
    noted of it: ``bytes`` and ``stated_peak_bytes`` at least.
    """

    name: str
    title: str
    blocks: Mapping[str, int]
    contenders: Mapping[str, tuple[str, ...]]
    ratios: Mapping[str, tuple[str, str]]
    prepare: Callable[[Path], dict[str, Any]]
    child: Callable[..., None]

    def main(self) -> None:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--dir", type=Path, default=None, help="folder on the disk to measure (default: the system's)"
        )
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--settle", type=float, default=4.0, help="seconds of rest before each run")
        parser.add_argument("--sizes", nargs="+", choices=self.blocks, default=list(self.blocks))
        parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the JSON and the table")
        parser.add_argument(CHILD, nargs="+", help=argparse.SUPPRESS)
        options = parser.parse_args()
        if options.child:
            source, output, *arguments = options.child
            return self.child(Path(source), Path(output), *arguments)
        machine = harness.machine()
        models = []
        for size in options.sizes:
            folder = Path(tempfile.mkdtemp(prefix="convert-bench-", dir=options.dir))
            try:
                models.append({"model": size} | self._measure(folder, size, options.rounds, options.settle))
            finally:
                shutil.rmtree(folder)
        command = f"python benchmarks/{self.name}.py --rounds {options.rounds} --settle {options.settle:g}"
        result = {"command": command, "machine": machine, "models": models}
        harness.publish(self.name, result, self._table(result), options.results)
        return None

    def _measure(self, folder: Path, size: str, rounds: int, settle_s: float) -> dict[str, Any]:
        source, output = folder / "source", folder / "output"
        harness.make_model(source, harness.EIGHT_B, self.blocks[size])
        facts = self.prepare(source)
        names = (*COPIES, *self.contenders)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(rounds + 1):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                shutil.rmtree(output, ignore_errors=True)
                os.sync()
                time.sleep(settle_s)
                run = harness.timed(self._command(name, source, output), folder / "time.txt")
                if number:  # the first round only warms the page cache with the source
                    runs[name].append(run)
                print(f"  {size}, round {number}: {name}: {run}", file=sys.stderr)
        median_s = {name: statistics.median(r["seconds"] for r in runs[name]) for name in names}
        return facts | {
            "peak_rss_bytes": max(r["peak_rss_bytes"] for name in self.contenders for r in runs[name]),
            "median_s": median_s,
            "speed": {name: median_s[a] / median_s[b] for name, (a, b) in self.ratios.items()},
            "runs": runs,
        }

    def _command(self, name: str, source: Path, output: Path) -> list[str]:
        if name in COPIES:
            return ["sh", "-c", COPIES[name], str(source), str(output)]
        return [
            sys.executable,
            str(Path(sys.argv[0]).resolve()),
            CHILD,
            str(source),
            str(output),
            *self.contenders[name],
        ]

    def _table(self, result: Mapping[str, Any]) -> str:
        lines = []
        for model in result["models"]:
            times = [f"{seconds:.2f} s" for seconds in model["median_s"].values()]
            ratios = [f"{ratio:.2f}" for ratio in model["speed"].values()]
            peak = f"{format_bytes(model['peak_rss_bytes'])} ({format_bytes(model['stated_peak_bytes'])})"
            lines.append([format_bytes(model["bytes"]), *times, *ratios, peak])
        head = ["model", *COPIES, *self.contenders, *self.ratios, "peak memory (stated)"]
        table = [*harness.heading(self.title, result), "Medians of whole processes.", "", *harness.rows(head, lines)]
        return "\n".join([*table, *harness.growth(result["models"])]) + "\n"
