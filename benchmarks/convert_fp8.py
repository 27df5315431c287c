"""Speed and memory of the FP8 conversion with given scales, against ``cp`` of the BF16 source.

The scales are found beforehand, so this measures the cast and the way through the disk alone: read all weights, look
each up, write half the bytes. Models, rounds and the order of contenders are those of ``convert_bf16.py``.

    python benchmarks/convert_fp8.py --dir /path/with/20GB --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import convert_bf16 as base

from nemobuild.convert.executor import convert, prepare
from nemobuild.convert.fp8 import amax_of, scale_of
from nemobuild.convert.scales import BlockScales, GroupScales, KvScales, dump_scales, load_scales, quant_groups
from nemobuild.units import format_bytes
from nemobuild.weights.safetensors import read_array
from nemobuild.weights.snapshot import Snapshot, open_snapshot

BLOCKS = {"1 GiB": 1, "4 GiB": 9}
CONTENDERS = ("cp", "trtllm, not flushed", "hf, not flushed", "cp + sync", "trtllm")
# Speed of the conversion as a part of that of cp: name -> (time of cp, time of the conversion)
RATIOS = {
    "trtllm, not flushed / cp": ("cp", "trtllm, not flushed"),
    "hf, not flushed / cp": ("cp", "hf, not flushed"),
    "trtllm / cp": ("cp", "trtllm"),
    "trtllm / cp + sync": ("cp + sync", "trtllm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=None, help="folder on the disk to measure (default: the system's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds of rest before each run")
    parser.add_argument("--sizes", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--results", type=Path, default=base.RESULTS, help="folder for the JSON and the table")
    parser.add_argument("--child", nargs=4, metavar=("SRC", "OUT", "FORMAT", "DURABLE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, output, form, durable = options.child
        scales = load_scales((Path(source).parent / "scales.json").read_text())
        snapshot, target = open_snapshot(Path(source)), Path(output)
        settings: dict[str, Any] = {"precision": "fp8", "kv_cache": "fp8", "format": form, "scales": scales}
        convert(snapshot, target, workers=2, durable=durable == "1", **settings)
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
        "command": f"python benchmarks/convert_fp8.py --rounds {options.rounds} --settle {options.settle:g}",
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()}
        | {"load_average_before": round(load_before, 2)},
        "models": models,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "convert_fp8.json").write_text(json.dumps(result, indent=1) + "\n")
    table = _table(result)
    (options.results / "convert_fp8.md").write_text(table)
    print(table)


def _measure(folder: Path, blocks: int, rounds: int, settle_s: float) -> dict[str, Any]:
    source, output = folder / "source", folder / "output"
    base._make_model(source, blocks)
    snapshot = open_snapshot(source)
    (folder / "scales.json").write_text(dump_scales(_scales(snapshot)))
    plan = prepare(snapshot, precision="fp8", kv_cache="fp8", workers=2)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(rounds + 1):
        shift = number % len(CONTENDERS)
        for name in CONTENDERS[shift:] + CONTENDERS[:shift]:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            time.sleep(settle_s)
            run = base._timed(_command(name, source, output), folder / "time.txt")
            if number:  # the first round only warms the page cache with the source
                runs[name].append(run)
            print(f"  {blocks} blocks, round {number}: {name}: {run}", file=sys.stderr)
    median_s = {name: statistics.median(r["seconds"] for r in runs[name]) for name in CONTENDERS}
    return {
        "bytes": plan.source_bytes,
        "target_bytes": plan.target_bytes,
        "stated_peak_bytes": plan.peak_memory_bytes,
        "peak_rss_bytes": max(r["peak_rss_bytes"] for name in CONTENDERS if "cp" not in name for r in runs[name]),
        "median_s": median_s,
        "speed": {name: median_s[a] / median_s[b] for name, (a, b) in RATIOS.items()},
        "runs": runs,
    }


def _scales(snapshot: Snapshot) -> list[BlockScales]:
    """True weight scales; input and KV scales do not matter here."""
    blocks = []
    for i in range(len(snapshot.spec.blocks)):
        groups = {}
        for group, names in quant_groups(snapshot.spec, i).items():
            amax = max(amax_of(read_array(snapshot.tensors[name], bits=True).reshape(-1), "BF16") for name in names)
            groups[group] = GroupScales(scale_of(amax), 1.0)
        blocks.append(BlockScales(groups, KvScales(1.0, 1.0)))
    return blocks


def _command(name: str, source: Path, output: Path) -> list[str]:
    if name.startswith("cp"):
        return base._command(name, source, output)
    form, _, rest = name.partition(",")
    return [sys.executable, __file__, "--child", str(source), str(output), form, "0" if rest else "1"]


def _table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# FP8 conversion with given scales against cp of the BF16 source",
        "",
        f"`{result['command']}`; {machine['cpus']} CPUs, Python {machine['python']}; "
        f"medians; load average before: {machine['load_average_before']}.",
        "",
        f"| model | {' | '.join(CONTENDERS)} | {' | '.join(RATIOS)} | peak memory (stated) |",
        "|---|" + "---|" * (len(CONTENDERS) + len(RATIOS) + 1),
    ]
    for model in result["models"]:
        times = [f"{model['median_s'][name]:.2f} s" for name in CONTENDERS]
        ratios = [f"{model['speed'][name]:.2f}" for name in RATIOS]
        peak = f"{format_bytes(model['peak_rss_bytes'])} ({format_bytes(model['stated_peak_bytes'])})"
        lines.append("| " + " | ".join([format_bytes(model["bytes"]), *times, *ratios, peak]) + " |")
    if len(result["models"]) > 1:
        small, large = result["models"][0], result["models"][-1]
        growth = large["peak_rss_bytes"] / small["peak_rss_bytes"] - 1
        lines += ["", f"A model {large['bytes'] / small['bytes']:.1f} times larger: {growth:+.1%} memory."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
