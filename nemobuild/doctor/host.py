"""The machine around the cards: memory, disk, shared memory, ports."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from nemobuild.doctor.findings import Finding, failed
from nemobuild.doctor.machine import Listener, host_memory
from nemobuild.engine.container import SHM_BYTES
from nemobuild.errors import DoesNotFit
from nemobuild.plan.planner import Plan
from nemobuild.triton.launch import DEFAULT_PORTS, missing_here
from nemobuild.units import format_bytes

_FOLDERS = {"fetch": "snapshot"}  # of a stage, where it has another name
_CPU_SHM_BYTES = 64 << 20  # seen to take 5 MiB idle, more with long requests


def check_memory(plan: Plan | None) -> Iterator[Finding]:
    """Host memory against the stage that needs the most."""
    memory = host_memory()
    limit = " (limit of the control group)" if memory.limited else ""
    text = f"{format_bytes(memory.total_bytes)}{limit}, {format_bytes(memory.available_bytes)} available."
    yield Finding("memory", "ok", text, facts=asdict(memory))
    if plan is None or not plan.host:
        return
    stage = max(plan.host, key=lambda need: need.memory_bytes)
    if stage.memory_bytes > memory.available_bytes:
        yield failed(
            "memory",
            DoesNotFit(
                "small-memory",
                f"{stage.stage} needs {format_bytes(stage.memory_bytes)} of host memory.",
                why=text,
                next="Stop other programs." if stage.memory_bytes <= memory.total_bytes else "Use a larger machine.",
            ),
        )


def check_disk(folder: Path, plan: Plan | None) -> Iterator[Finding]:
    """Free space where the artefacts go, against all stages that are not done yet."""
    present = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(present)
    text = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} free in {present}."
    yield Finding("disk", "ok", text, facts={"folder": str(present), "free_bytes": usage.free})
    needs = [
        need
        for need in (plan.host if plan else ())
        if need.disk_bytes and not (folder / _FOLDERS.get(need.stage, need.stage)).is_dir()
    ]
    need_bytes = sum(need.disk_bytes for need in needs)
    if need_bytes > usage.free:
        stages = ", ".join(f"{need.stage} {format_bytes(need.disk_bytes)}" for need in needs)
        yield failed(
            "disk",
            DoesNotFit(
                "small-disk", f"What is to be made needs {format_bytes(need_bytes)} of disk ({stages}).", why=text
            ),
        )
    if not os.access(present, os.W_OK):
        yield Finding("disk", "warning", f"{present} cannot be written to.", next="Work in another folder.")


def check_shm(plan: Plan | None) -> Iterator[Finding]:
    """Shared memory: Triton's Python models, MPI and NCCL talk through it."""
    usage = shutil.disk_usage("/dev/shm")
    yield from judge_shm(usage.total, usage.free, plan)


def judge_shm(total_bytes: int, free_bytes: int, plan: Plan | None) -> Iterator[Finding]:
    """A container that we start gets shared memory of its own, so this counts for what is served without one."""
    text = f"/dev/shm has {format_bytes(total_bytes)}, {format_bytes(free_bytes)} free."
    yield Finding("shm", "ok", text, facts={"total_bytes": total_bytes, "free_bytes": free_bytes})
    runtime = plan.profile.runtime if plan else "cpu"
    if plan and runtime != "cpu" and missing_here(runtime, plan.profile.checkpoint.ranks):
        return
    need_bytes = _CPU_SHM_BYTES if runtime == "cpu" else SHM_BYTES
    if free_bytes < need_bytes:
        yield failed(
            "shm",
            DoesNotFit(
                "small-shm",
                f"The {runtime} runtime needs {format_bytes(need_bytes)} of shared memory.",
                why=text,
                next="Start the container with --shm-size=2g, or remount /dev/shm larger; remove what is left in it.",
            ),
        )


def check_ports(listening: Sequence[Listener]) -> Iterator[Finding]:
    """Triton's usual ports, and every Triton that other machines can reach: it asks nobody for a password."""
    facts = {"listening": [asdict(listener) for listener in listening]}
    taken = {listener.port: listener for listener in listening if listener.port in DEFAULT_PORTS}
    ports = ", ".join(map(str, DEFAULT_PORTS))
    if not taken:
        yield Finding("ports", "ok", f"Triton's usual ports {ports} are free.", facts=facts)
    for port, listener in taken.items():
        yield Finding(
            "ports",
            "note",
            f"Port {port} is in use by {listener.program or 'a process of another user'}.",
            next="`nemobuild serve` takes a free one instead, and says which.",
            facts=facts,
        )
    for listener in listening:
        if listener.exposed and (listener.program == "tritonserver" or listener.port in DEFAULT_PORTS):
            yield Finding(
                "ports",
                "warning",
                f"Port {listener.port} listens on {listener.address}: other machines can reach it.",
                "Triton has no authentication; whoever reaches it may use the model.",
                "`nemobuild doctor --exposed` says what else. Serve on 127.0.0.1, behind a gateway.",
            )
