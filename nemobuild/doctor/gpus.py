"""The driver and the cards: healthy by themselves, and what the plan was made for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from nemobuild.doctor.findings import Finding, failed
from nemobuild.errors import DoesNotFit, ToolchainError
from nemobuild.nvml import GpuReading, NvidiaReading, check_count, pick_gpus
from nemobuild.plan.memory import RankLedger
from nemobuild.plan.planner import Plan
from nemobuild.plan.toolchain import Toolchain, toolchains
from nemobuild.units import format_bytes

# Oldest driver branch for a CUDA version, from NVIDIA's CUDA Compatibility guide (minor version compatibility).
_OLDEST_DRIVER = {12: 525, 13: 580}
_MEMORY_TOLERANCE = 0.99  # two cards of one kind differ by a little


def check_driver(nvidia: NvidiaReading | ToolchainError, plan: Plan | None) -> Iterator[Finding]:
    """Is there a driver, and is it new enough for the container?"""
    if isinstance(nvidia, ToolchainError):
        absent = nvidia.code in ("no-driver", "no-nvml-package")
        if (plan is not None and plan.gpu is None) or (plan is None and absent):
            yield Finding("driver", "note", nvidia.what, nvidia.why, "Planning and the cpu runtime work without it.")
        else:
            yield failed("driver", nvidia)
        return
    facts = {"driver": nvidia.driver, "cuda": list(nvidia.cuda), "gpus": len(nvidia.gpus)}
    cuda = ".".join(map(str, nvidia.cuda))
    yield Finding("driver", "ok", f"NVIDIA driver {nvidia.driver}, CUDA up to {cuda}.", facts=facts)
    wanted = plan.toolchain if plan else next(iter(toolchains().values()))
    if wanted is None or not wanted.driver or _version(nvidia.driver) >= _version(wanted.driver):
        return
    old = f"Container {wanted.tag} was released for driver {wanted.driver}, this one is older."
    if _runs(nvidia.driver, wanted):
        yield Finding(
            "driver",
            "warning",
            old,
            f"It runs by CUDA's minor version compatibility, from branch {_oldest(wanted)} on.",
            "Upgrade it when you can.",
        )
        return
    usable = [tag for tag, toolchain in toolchains().items() if _runs(nvidia.driver, toolchain)]
    following = f"Upgrade the driver to {wanted.driver}"
    following += f", or set machine.container to {usable[0]!r}." if usable else "."
    why = f"CUDA {wanted.cuda} needs driver branch {_oldest(wanted)} or newer."
    if plan is None:
        yield Finding("driver", "warning", old, why, following)
    else:
        yield failed("driver", ToolchainError("old-driver", old, why=why, next=following))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _oldest(toolchain: Toolchain) -> int:
    return _OLDEST_DRIVER[_version(toolchain.cuda)[0]]


def _runs(driver: str, toolchain: Toolchain) -> bool:
    return _version(driver)[0] >= _oldest(toolchain)


def check_gpus(gpus: tuple[GpuReading, ...], plan: Plan | None) -> Iterator[Finding]:
    """Every card by itself; then whether those that the plan would use are what it was made for."""
    wanted = plan.gpu if plan else None
    ranks = plan.ranks if plan and wanted else ()
    if not gpus:
        error = ToolchainError("no-gpu", "The driver is there, but no GPU.", next="See `nvidia-smi` and `lspci`.")
        yield failed("gpu", error) if wanted else Finding("gpu", "warning", error.what, error.why, error.next)
    for gpu in gpus:
        yield from _check_health(gpu)
    if not gpus or plan is None or wanted is None:
        return
    chosen = pick_gpus(gpus, wanted.sm, len(ranks))
    for gpu, rank in zip(chosen, ranks, strict=False):
        yield from _check_fit(gpu, plan, rank)
    try:
        check_count(chosen, len(ranks))
    except ToolchainError as error:
        yield failed("gpu", error)


def _check_health(gpu: GpuReading) -> Iterator[Finding]:
    check = f"gpu {gpu.index}"
    used, total = format_bytes(gpu.memory_used_bytes), format_bytes(gpu.memory_total_bytes)
    states = [
        f"{name} {'on' if state else 'off'}"
        for name, state in (("ECC", gpu.ecc), ("MIG", gpu.mig))
        if state is not None
    ]
    power = [] if gpu.power_cap_w is None else [f"{gpu.power_cap_w:.0f} W"]
    text = ", ".join([f"{gpu.name}: {total}, {used} used", f"SM {gpu.sm[0]}.{gpu.sm[1]}", *states, *power])
    yield Finding(check, "ok", f"{text}.", facts=asdict(gpu))
    if gpu.ecc_errors:
        yield Finding(
            check,
            "warning",
            f"It has had {gpu.ecc_errors} uncorrected memory errors since the driver started.",
            next="Reset it (`sudo nvidia-smi -r`); if they come again, have it replaced.",
        )
    if gpu.ecc is False:
        yield Finding(
            check,
            "warning",
            "ECC is off: a memory error goes unseen into answers.",
            next="Type `sudo nvidia-smi -e 1`.",
        )
    if gpu.power_cap_w and gpu.power_default_w and gpu.power_cap_w < 0.95 * gpu.power_default_w:
        yield Finding(
            check,
            "warning",
            f"Its power is capped at {gpu.power_cap_w:.0f} W of {gpu.power_default_w:.0f} W.",
            "It computes slower than the plan's ceilings say.",
            f"Type `sudo nvidia-smi -i {gpu.index} -pl {gpu.power_default_w:.0f}`.",
        )
    if gpu.processes:
        yield Finding(
            check,
            "warning",
            f"Other processes use it: {_named(gpu)}.",
            "They take its memory and its time.",
            "Stop those that are not needed.",
        )


def _named(gpu: GpuReading) -> str:
    return ", ".join(
        f"{process.name or 'a process'} ({process.pid}"
        + (f", {format_bytes(process.memory_bytes)})" if process.memory_bytes is not None else ")")
        for process in gpu.processes
    )


def _check_fit(gpu: GpuReading, plan: Plan, rank: RankLedger) -> Iterator[Finding]:
    wanted, check = plan.gpu, f"gpu {gpu.index}"
    assert wanted is not None
    here, there = (f"{sm[0]}.{sm[1]}" for sm in (gpu.sm, wanted.sm))
    if gpu.mig:
        yield failed(
            check,
            ToolchainError(
                "mig-on",
                f"MIG is on: GPU {gpu.index} is cut into slices.",
                why="The plan is for a whole card.",
                next=f"Type `sudo nvidia-smi -i {gpu.index} -mig 0`, or make a profile for a slice.",
            ),
        )
    if gpu.sm != wanted.sm:
        yield failed(
            check,
            ToolchainError(
                "another-gpu",
                f"GPU {gpu.index} has SM {here}; the profile is for {wanted.title}, SM {there}.",
                why="An engine runs only on the SM that it was built on."
                if plan.profile.runtime == "tensorrt"
                else "Kernels and precisions differ.",
                next="Name this card in machine.gpu, and type `nemobuild plan`.",
            ),
        )
    free_bytes = gpu.memory_total_bytes - gpu.memory_used_bytes
    planned_bytes = sum(line.bytes for line in rank.lines[:-1])  # the last is the rest of the card
    if gpu.memory_total_bytes < _MEMORY_TOLERANCE * wanted.memory_bytes:
        total = format_bytes(gpu.memory_total_bytes)
        yield failed(
            check,
            DoesNotFit(
                "small-gpu",
                f"GPU {gpu.index} has {total}; the profile is for {format_bytes(wanted.memory_bytes)}.",
                next="Name this card in machine.gpu, and type `nemobuild plan`.",
            ),
        )
    elif not plan.fits:
        return  # no card is free enough then, and the plan is at fault
    elif not gpu.mig and free_bytes < rank.needed_bytes:
        yield failed(
            check,
            DoesNotFit(
                "gpu-in-use",
                f"GPU {gpu.index} has {format_bytes(free_bytes)} free; "
                f"the plan needs {format_bytes(rank.needed_bytes)}.",
                why=f"It is used by {_named(gpu)}." if gpu.processes else "",
                next="Stop what uses it, or choose another card with CUDA_VISIBLE_DEVICES.",
            ),
        )
    elif not gpu.mig and free_bytes < planned_bytes:
        yield Finding(
            check,
            "warning",
            f"{format_bytes(free_bytes)} are free; with all limits the plan uses {format_bytes(planned_bytes)}.",
            "The KV cache will be smaller than planned, so fewer requests run at once.",
            "Stop other programs on the card.",
        )
