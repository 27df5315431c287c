"""Speed and memory of the FP8 conversion with given scales, against ``cp`` of the BF16 source (see ``cp_race``).

The scales are found beforehand, so this measures the cast and the way through the disk alone: read all weights, look
each up, write half the bytes.

    python benchmarks/convert_fp8.py --dir /path/with/20GB --rounds 5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_race import Race

from nemobuild.convert.executor import convert, prepare
from nemobuild.convert.fp8 import amax_of, scale_of
from nemobuild.convert.scales import BlockScales, GroupScales, KvScales, dump_scales, load_scales, quant_groups
from nemobuild.weights.safetensors import read_array
from nemobuild.weights.snapshot import Snapshot, open_snapshot


def facts(source: Path) -> dict[str, Any]:
    snapshot = open_snapshot(source)
    _scales_file(source).write_text(dump_scales(_scales(snapshot)))
    plan = prepare(snapshot, precision="fp8", kv_cache="fp8", workers=2)
    return {"bytes": plan.source_bytes, "stated_peak_bytes": plan.peak_memory_bytes, "target_bytes": plan.target_bytes}


def child(source: Path, output: Path, form: str, flush: str) -> None:
    scales = load_scales(_scales_file(source).read_text())
    settings: dict[str, Any] = {"precision": "fp8", "kv_cache": "fp8", "format": form, "scales": scales}
    convert(open_snapshot(source), output, workers=2, durable=flush == "flush", **settings)


def _scales_file(source: Path) -> Path:
    return source.parent / "scales.json"


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


RACE = Race(
    name="convert_fp8",
    title="FP8 conversion with given scales against cp of the BF16 source",
    blocks={"1 GiB": 1, "4 GiB": 9},
    contenders={
        "trtllm, not flushed": ("trtllm", "leave"),
        "hf, not flushed": ("hf", "leave"),
        "trtllm": ("trtllm", "flush"),
    },
    ratios={
        "trtllm, not flushed / cp": ("cp", "trtllm, not flushed"),
        "hf, not flushed / cp": ("cp", "hf, not flushed"),
        "trtllm / cp": ("cp", "trtllm"),
        "trtllm / cp + sync": ("cp + sync", "trtllm"),
    },
    prepare=facts,
    child=child,
)

if __name__ == "__main__":
    RACE.main()
