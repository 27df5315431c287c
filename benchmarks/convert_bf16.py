"""Speed and memory of the BF16 conversion, against ``cp`` of the same bytes (see ``cp_race``).

python benchmarks/convert_bf16.py --dir /path/with/40GB --rounds 5
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cp_race import Race

from nemobuild.convert.executor import convert, prepare
from nemobuild.weights.snapshot import open_snapshot


def facts(source: Path) -> dict[str, Any]:
    plan = prepare(open_snapshot(source), workers=2)
    return {"bytes": plan.source_bytes, "stated_peak_bytes": plan.peak_memory_bytes}


def child(source: Path, output: Path, flush: str) -> None:
    convert(open_snapshot(source), output, workers=2, durable=flush == "flush")


RACE = Race(
    name="convert_bf16",
    title="BF16 conversion against cp",
    blocks={"2 GiB": 4, "8 GiB": 20},
    contenders={"convert, not flushed": ("leave",), "convert": ("flush",)},
    ratios={
        "convert / cp": ("cp", "convert"),
        "convert / cp + sync": ("cp + sync", "convert"),
        "not flushed / cp": ("cp", "convert, not flushed"),
    },
    prepare=facts,
    child=child,
)

if __name__ == "__main__":
    RACE.main()
