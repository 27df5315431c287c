"""Speed and memory of the BF16 conversion, against ``cp`` of the same bytes.

Two synthetic models with equal blocks are made in a temporary folder, the second about four times larger. Then
each contender copies or converts in turn, in several rounds; the table shows medians. Before every run the last
output is deleted and flushed and the machine left alone for a moment, so that all of them start from free
memory in the same state (on virtual machines memory that was just freed is much faster to use again).

``cp`` leaves its bytes in memory and returns; the conversion brings them to the disk before it renames the
folder, so ``convert / cp`` is the strict comparison and ``convert / cp + sync`` the like-for-like one.

    python benchmarks/convert_bf16.py --dir /path/with/40GB --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nemobuild.convert.executor import convert, prepare
from nemobuild.model.hf_config import spec_from_config
from nemobuild.units import format_bytes
from nemobuild.weights.safetensors import ShardWriter
from nemobuild.weights.snapshot import open_snapshot

RESULTS = Path(__file__).parent / "results"
BLOCKS = {"2 GiB": 4, "8 GiB": 20}
SHARD_BYTES = 2 << 30
CONTENDERS = ("cp", "convert, not flushed", "cp + sync", "convert")
# Speed of the conversion as a part of that of cp: name -> (time of cp, time of the conversion)
RATIOS = {
    "convert / cp": ("cp", "convert"),
    "convert / cp + sync": ("cp + sync", "convert"),
    "not flushed / cp": ("cp", "convert, not flushed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to measure (default: the system's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds of rest before each run")
    parser.add_argument("--sizes", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON and the table")
    parser.add_argument("--child", nargs=3, metavar=("SRC", "OUT", "DURABLE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, output, durable = options.child
        convert(open_snapshot(Path(source)), Path(output), workers=2, durable=durable == "1")
        return
    load_before = os.getloadavg()[0]
    models = []
    for size in options.sizes:
        folder = Path(tempfile.mkdtemp(prefix="convert-bench-", dir=options.dir))
        try:
            models.append({"model": size} | _measure(folder, BLOCKS[size], options.rounds, options.settle))
        finally:
            shutil.rmtree(folder)
    result = {
        "command": f"python benchmarks/convert_bf16.py --rounds {options.rounds} --settle {options.settle:g}",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": round(load_before, 2),
        "models": models,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "convert_bf16.json").write_text(json.dumps(result, indent=1) + "\n")
    table = _table(result)
    (options.results / "convert_bf16.md").write_text(table)
    print(table)


def _measure(folder: Path, blocks: int, rounds: int, settle_s: float) -> dict[str, Any]:
    source, output = folder / "source", folder / "output"
    _make_model(source, blocks)
    plan = prepare(open_snapshot(source), workers=2)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        shift = number % len(CONTENDERS)
        for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            time.sleep(settle_s)
            run = _timed(_command(name, source, output), folder / "time.txt")
            if number:  # the first round only warms the page cache with the source
                runs[name].append(run)
            print(f"  {blocks} blocks, round {number}: {name}: {run}", file=sys.stderr)
    median_s = {name: statistics.median(r["seconds"] for r in runs[name]) for name in CONTENDERS}
    return {
        "bytes": plan.source_bytes,
        "stated_peak_bytes": plan.peak_memory_bytes,
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in runs["convert"]),
        "median_s": median_s,
        "speed": {name: median_s[a] / median_s[b] for name, (a, b) in RATIOS.items()},
        "runs": runs,
    }


def _command(name: str, source: Path, output: Path) -> list[str]:
    if name == "cp":
        return ["cp", "-r", str(source), str(output)]
    if name == "cp + sync":
        return ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/* "$1"', str(source), str(output)]
    return [sys.executable, __file__, "--child", str(source), str(output), "1" if name == "convert" else "0"]


def _timed(command: list[str], notes: Path) -> dict[str, float]:
    """Seconds and peak resident bytes of a command. GNU time starts it, so that our own size is not counted."""
    time_tool = shutil.which("time")
    prefix = [time_tool, "-v", "-o", str(notes)] if time_tool else []
    started_s = time.perf_counter()
    process = subprocess.Popen([*prefix, *command])
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started_s
    if status:
        raise SystemExit(f"{command} ended with status {status}")
    peak_kib = usage.ru_maxrss
    if time_tool:
        line = next(line for line in notes.read_text().splitlines() if "Maximum resident" in line)
        peak_kib = int(line.split()[-1])
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu_s, 3), "peak_rss_bytes": peak_kib * 1024}


def _make_model(folder: Path, blocks: int) -> None:
    """A ``deci`` model of the 8B shape: hidden 4096, 32 heads, 8 KV heads, FFN 14336, small vocabulary."""
    config = {
        "model_type": "deci",
        "hidden_size": 4096,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads_per_layer": [8] * blocks,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room_bytes = SHARD_BYTES
    for name, shape in spec_from_config(config).tensor_shapes().items():
        nbytes = 2 * int(np.prod(shape))
        if nbytes > room_bytes:
            shards.append([])
            room_bytes = SHARD_BYTES
        shards[-1].append((name, "BF16", shape))
        room_bytes -= nbytes
    noise = np.random.default_rng(0).standard_normal(16 << 20, np.float32).view(np.uint16)[1::2].copy()
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        writer = ShardWriter(folder / file, tensors)
        for name, info in writer.tensors.items():
            for offset in range(0, info.nbytes, noise.nbytes):
                part = noise[: (info.nbytes - offset) // 2]
                writer.write(name, part.data, offset)
            weight_map[name] = file
        writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _table(result: dict[str, Any]) -> str:
    lines = [
        "# BF16 conversion against cp",
        "",
        f"`{result['command']}`; {result['cpus']} CPUs, Python {result['python']}; medians; "
        f"load average before: {result['load_average_before']}.",
        "",
        f"| model | {' | '.join(CONTENDERS)} | {' | '.join(RATIOS)} | peak memory (stated) |",
        "|---|" + "---|" * (len(CONTENDERS) + len(RATIOS) + 1),
    ]
    for model in result["models"]:
        times = [f"{model['median_s'][name]:.2f} s" for name in CONTENDERS]
        ratios = [f"{model['median_s'][a] / model['median_s'][b]:.2f}" for a, b in RATIOS.values()]
        peak = f"{format_bytes(model['peak_rss_bytes'])} ({format_bytes(model['stated_peak_bytes'])})"
        lines.append("| " + " | ".join([format_bytes(model["bytes"]), *times, *ratios, peak]) + " |")
    if len(result["models"]) > 1:
        small, large = result["models"][0], result["models"][-1]
        growth = large["peak_rss_bytes"] / small["peak_rss_bytes"] - 1
        lines += ["", f"A model {large['bytes'] / small['bytes']:.1f} times larger: {growth:+.1%} memory."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
