"""Whether a second server finds room beside the one that runs, so that a roll loses no request.

For the CPU: what the running one is seen to take of the host's memory, against what is available. For GPUs: what the
plan says one rank takes, against what NVML says is free; other cards than the running ones will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemobuild.doctor.machine import host_memory
from nemobuild.engine.process import session_bytes
from nemobuild.errors import NemobuildError
from nemobuild.nvml import pick_gpus, read_nvidia
from nemobuild.places import load_plan
from nemobuild.triton.launch import read_emitted
from nemobuild.units import format_bytes

_SPARE = 1.1


@dataclass(frozen=True, slots=True)
class Room:
    """``slots`` is ``two`` when there is room beside, on the GPUs ``cards`` by NVML's numbers."""

    slots: Literal["one", "two"]
    why: str
    cards: tuple[int, ...] = ()


def find_room(profile: str, new: Path, old: Path, old_pid: int) -> Room:
    """Room for a server of repository ``new`` beside that of ``old``, whose first process is ``old_pid``."""
    made = read_emitted(new)
    if made.runtime == "cpu":
        grown_bytes = max(0, _size_bytes(new) - _size_bytes(old))
        return _on_host(int(_SPARE * session_bytes(old_pid)) + grown_bytes)
    try:
        plan, gpus = load_plan(profile), read_nvidia().gpus
    except NemobuildError as error:
        return Room("one", f"it is not known what it needs: {error.what}")
    host = _on_host(max((need.memory_bytes for need in plan.host if need.stage == "serve"), default=0))
    if host.slots == "one":
        return host
    need_bytes = max(rank.total_bytes for rank in plan.ranks)
    allowed = pick_gpus(gpus, made.sm, len(gpus))
    free = [gpu.index for gpu in allowed if gpu.memory_total_bytes - gpu.memory_used_bytes >= need_bytes]
    text = f"a rank needs {format_bytes(need_bytes)}, and {len(free)} of {len(allowed)} GPUs have that free"
    if len(free) < made.ranks:
        return Room("one", f"{text}; {made.ranks} must")
    return Room("two", text, tuple(free[: made.ranks]))


def _on_host(need_bytes: int) -> Room:
    available_bytes = host_memory().available_bytes
    text = f"it needs {format_bytes(need_bytes)} of host memory, and {format_bytes(available_bytes)} are available"
    return Room("two" if need_bytes <= available_bytes else "one", text)


def _size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
