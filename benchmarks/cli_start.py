"""How long a user waits for commands that only answer: whole processes, median of several rounds.

    python benchmarks/cli_start.py [--rounds 9]

The bare interpreter is timed in the same rounds, so that the figures can be read on another machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "nemobuild --help": ["-m", "nemobuild", "--help"],
    "nemobuild profiles": ["-m", "nemobuild", "profiles"],
    "nemobuild inspect super-49b-v1.5": ["-m", "nemobuild", "inspect", "super-49b-v1.5"],
    "nemobuild inspect ultra-253b-v1 --json": ["-m", "nemobuild", "inspect", "ultra-253b-v1", "--json"],
    "nemobuild plan super-49b-v1.5-h100-fp8": ["-m", "nemobuild", "plan", "super-49b-v1.5-h100-fp8"],
}
GOAL_S = dict.fromkeys(COMMANDS, 0.4) | {"nemobuild plan super-49b-v1.5-h100-fp8": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            times[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    lines = ["# Start of commands that only answer", "", f"`python benchmarks/cli_start.py --rounds {rounds}`", ""]
    lines += ["| command | median | slowest | goal |", "|---|---|---|---|"]
    lines += [
        f"| `{name}` | {medians[name]:.3f} s | {max(values):.3f} s | {GOAL_S[name]} s |"
        for name, values in times.items()
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cli_start.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "cli_start.json").write_text(json.dumps({"rounds": rounds, "seconds": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
