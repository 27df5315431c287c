"""The cards that nemobuild plans for, as data: memory, speed, and what each cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from nemobuild.config import read_yaml
from nemobuild.errors import UsageError, nearest
from nemobuild.resources import data_folder

FP8_SM = (8, 9)
"""First compute capability with FP8 tensor cores (Ada)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. ``memory_bytes`` is NVML's total, which is less than the name says where ECC or the driver takes some.

    FLOP/s are those of dense matrices on tensor cores; ``fp8_flops`` is None where there are no FP8 ones.
    """

    name: str
    title: str
    memory_bytes: int
    sm: tuple[int, int]
    bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    nvlink: bool
    source: str
    notes: tuple[str, ...] = ()

    @property
    def fp8(self) -> bool:
        return self.sm >= FP8_SM


def load_gpu(name: str) -> Gpu:
    """The card of that name. Raises ``UsageError`` that proposes the nearest."""
    known = _data()
    if name not in known:
        begun = [repr(other) for other in known if name and other.startswith(name)]
        raise UsageError(
            "unknown-gpu",
            f"The GPU {name!r} is unknown.",
            why=f"Did you mean {' or '.join(begun)}?" if begun else nearest(name, known),
            next="Name one of them, or add it to engine_configs/gpus.yaml.",
        )
    return _gpu(name, known[name])


def gpus() -> list[Gpu]:
    """All known cards, smallest memory first."""
    return sorted((_gpu(name, fields) for name, fields in _data().items()), key=lambda gpu: gpu.memory_bytes)


@cache
def _data() -> dict[str, dict[str, Any]]:
    data: dict[str, dict[str, Any]] = read_yaml(data_folder("engine_configs") / "gpus.yaml")
    return data


def _gpu(name: str, fields: dict[str, Any]) -> Gpu:
    fp8_tflops = fields["fp8_tflops"]
    return Gpu(
        name=name,
        title=fields["title"],
        memory_bytes=fields["memory_mib"] << 20,
        sm=(fields["sm"][0], fields["sm"][1]),
        bandwidth_bytes_per_s=fields["bandwidth_gb_s"] * 1e9,
        bf16_flops=fields["bf16_tflops"] * 1e12,
        fp8_flops=None if fp8_tflops is None else fp8_tflops * 1e12,
        nvlink=fields["nvlink"],
        source=fields["source"],
        notes=tuple(fields.get("notes", ())),
    )
