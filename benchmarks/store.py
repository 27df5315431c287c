"""What the store costs: a command that finds nothing to do, and a commit beside the writing of the same bytes.

    python benchmarks/store.py [--dir FOLDER] [--gib 2] [--rounds 5]

The bytes are written in pieces of 16 MiB, in turns: until they are on the disk (``fsync``), which is the yardstick;
with a commit instead of that ``fsync``, since a commit brings them to the disk while it takes their digests; and with
a commit after it, as after a conversion, which has its own. The median of the ratios of each round counts. Before each
run the last output is deleted, and the disk is left to end what it does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

from nemobuild.store import Store
from nemobuild.units import format_bytes

PROFILE = "smollm2-nas-cpu"
PIECE_BYTES = 16 << 20
WAYS = ("write + fsync", "write, then commit", "write + fsync, then commit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to measure (default: the system's)")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder for the JSON and the table")
    options = parser.parse_args()
    machine = harness.machine()
    work = Path(tempfile.mkdtemp(prefix="store-bench-", dir=options.dir))
    try:
        commits = commit_times(work, int(options.gib * (1 << 30)), options.rounds)
        waits = no_op_times(work, options.rounds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result: dict[str, Any] = {"command": f"python benchmarks/store.py --gib {options.gib:g} --rounds {options.rounds}"}
    result |= {"machine": machine, "bytes": int(options.gib * (1 << 30)), "commit": commits, "no_op": waits}
    harness.publish("store", result, "\n".join([*table(result), ""]), options.results)


def commit_times(work: Path, size_bytes: int, rounds: int) -> dict[str, Any]:
    """Seconds of each way in each round, and the medians of their ratios to the first."""
    block = os.urandom(PIECE_BYTES)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            shutil.rmtree(work / "artefact", ignore_errors=True)
            shutil.rmtree(work / "store", ignore_errors=True)
            (work / "artefact").mkdir()
            os.sync()
            started_s = time.perf_counter()
            write(work / "artefact" / "rank0.safetensors", block, size_bytes, sync="fsync" in way)
            if "commit" in way:
                key = hashlib.sha256(f"{way} {number}".encode()).hexdigest()
                Store(work / "store").commit("checkpoint", key, work / "artefact", {})
            seconds[way].append(round(time.perf_counter() - started_s, 4))
    yard = seconds[WAYS[0]]
    ratios = {
        way: round(statistics.median(mine / base for mine, base in zip(seconds[way], yard, strict=True)) - 1, 4)
        for way in WAYS[1:]
    }
    return {"seconds": seconds, "overhead": ratios}


def write(file: Path, block: bytes, size_bytes: int, *, sync: bool) -> None:
    with file.open("wb", buffering=0) as stream:
        for _ in range(size_bytes // len(block)):
            stream.write(block)
        if sync:
            os.fsync(stream.fileno())


def no_op_times(work: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of whole processes: ``build`` with all in its place, and ``up`` until it starts Triton."""
    nemobuild = [sys.executable, "-m", "nemobuild"]
    environment = os.environ | {"NEMOBUILD_STORE": str(work / "real")}
    subprocess.run([*nemobuild, "build", PROFILE], cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[float]] = {"build": [], "up": []}
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        subprocess.run([*nemobuild, "build", PROFILE], cwd=work, env=environment, check=True, stdout=subprocess.DEVNULL)
        found["build"].append(round(time.perf_counter() - started_s, 3))
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [*nemobuild, "up", PROFILE],
            cwd=work,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        while "starting Triton" not in (line := process.stderr.readline()):
            if not line:
                raise SystemExit("up ended before it started Triton")
        found["up"].append(round(time.perf_counter() - started_s, 3))
        process.send_signal(signal.SIGINT)
        process.communicate()
    return {name: values[1:] for name, values in found.items()}  # the first has published


def table(result: dict[str, Any]) -> list[str]:
    lines = harness.heading("The store", result)
    commit, size = result["commit"], format_bytes(result["bytes"])
    medians = {way: statistics.median(values) for way, values in commit["seconds"].items()}
    rows = [
        (
            way,
            f"{seconds:.2f} s",
            "" if way == WAYS[0] else f"{commit['overhead'][way]:+.1%}",
            "" if way == WAYS[0] else "< 5%",
        )
        for way, seconds in medians.items()
    ]
    lines += [f"{size}, median of {len(commit['seconds'][WAYS[0]])} rounds:", ""]
    lines += [*harness.rows(("", "time", "overhead", "goal"), rows), ""]
    waits = [
        (
            f"`{name} {PROFILE}`",
            f"{statistics.median(values):.2f} s",
            f"{min(values):.2f} to {max(values):.2f} s",
            "< 1 s",
        )
        for name, values in result["no_op"].items()
    ]
    lines += ["With nothing to do, `up` until it starts Triton, all bytes of the repository verified:", ""]
    return [*lines, *harness.rows(("command", "median", "spread", "goal"), waits)]


if __name__ == "__main__":
    main()
