"""Where ``trtllm-build`` runs: on this machine, or in the pinned container. Found and checked before any work begins.

An engine built by another TensorRT, or on another kind of GPU, than the profile names is worth nothing, and building
takes hours: so the versions of a local ``trtllm-build`` are read from the packages installed beside it, and the GPUs
through NVML.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from nemobuild.engine import foreign
from nemobuild.engine.built_with import BuiltWith, sm_text
from nemobuild.engine.container import Mount, docker_run, find_docker
from nemobuild.engine.flags import TOOL
from nemobuild.errors import ToolchainError
from nemobuild.nvml import GpuReading, NvidiaReading, check_count, pick_gpus, read_nvidia, visible_gpus
from nemobuild.plan.gpus import Gpu
from nemobuild.plan.planner import Plan
from nemobuild.plan.toolchain import Toolchain, same_version

Where = Literal["auto", "local", "container"]
_DAEMON_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Builder:
    """``container`` None: the ``trtllm-build`` on PATH. ``gpus`` are the cards to use, by NVML's numbers."""

    container: Toolchain | None
    gpus: tuple[int, ...]
    built_with: BuiltWith

    def line(self, argv: Sequence[str], mounts: Sequence[Mount], name: str, container_id: Path) -> list[str]:
        """What to run for ``argv``."""
        if self.container is None:
            return list(argv)
        return docker_run(self.container, argv, mounts, gpus=self.gpus, name=name, container_id=container_id)

    def environment(self) -> Mapping[str, str]:
        """Additions to the environment."""
        return visible_gpus(self.gpus) if self.container is None else {}


def find_builder(plan: Plan, where: Where = "auto") -> Builder:
    """The builder for ``plan``: ``auto`` takes a local one when there is any.

    Raises ``ToolchainError`` when there is none, its versions are not those of the profile's container, the Docker
    daemon does not answer, or the machine has not the GPUs of the profile.
    """
    toolchain, gpu = _needed(plan)
    program = shutil.which(TOOL)
    if where == "local" and program is None:
        raise ToolchainError(
            "no-trtllm-build",
            f"There is no {TOOL} on PATH.",
            next=f"Run nemobuild inside {toolchain.image}, or let it start that with --container.",
        )
    local = where == "local" or (where == "auto" and program is not None)
    if local and program is not None:
        versions = _check_versions(toolchain, Path(program))
    else:
        _check_daemon(find_docker())
        versions = {"tensorrt": toolchain.tensorrt, "tensorrt_llm": toolchain.trtllm}
    reading = read_nvidia()
    cards = _cards(reading, gpu.sm, plan.profile.build.workers, f"{gpu.title} ({sm_text(gpu.sm)})")
    made = BuiltWith(
        gpu=cards[0].name,
        sm=sm_text(gpu.sm),
        driver=reading.driver,
        tensorrt=versions.get("tensorrt"),
        trtllm=versions.get("tensorrt_llm"),
        container=None if local else toolchain.tag,
    )
    return Builder(None if local else toolchain, tuple(card.index for card in cards), made)


def _needed(plan: Plan) -> tuple[Toolchain, Gpu]:
    assert plan.toolchain is not None and plan.gpu is not None, "profiles of runtime tensorrt have a machine"
    return plan.toolchain, plan.gpu


def _check_versions(toolchain: Toolchain, program: Path) -> Mapping[str, str]:
    """What ``installed_versions`` finds, when it is that of ``toolchain``."""
    found = installed_versions(program)
    for package, wanted in (("tensorrt_llm", toolchain.trtllm), ("tensorrt", toolchain.tensorrt)):
        here = found.get(package)
        if not same_version(here, wanted):
            raise ToolchainError(
                "another-version",
                f"The {TOOL} here is of {package} {here}; container {toolchain.tag} of the profile has {wanted}.",
                why=f"It is {program}.",
                next="Build in the container (--container), or name the container that is here in machine.container.",
            )
    return found


def installed_versions(program: Path) -> dict[str, str]:
    """Versions of the Python packages installed under the prefix of ``program``, without running anything."""
    prefix = program.resolve().parent.parent
    folders = [str(p) for p in prefix.glob("lib/python3*/*-packages")]
    return {
        found.metadata["Name"].replace("-", "_").lower(): found.version
        for found in metadata.distributions(path=folders)
        if found.metadata["Name"] in ("tensorrt", "tensorrt_llm", "tensorrt-llm")
    }


def _check_daemon(docker: str) -> None:
    """Raise now, and not after hours of converting, when Docker does not answer."""
    try:
        done = subprocess.run(
            [docker, "version", "--format", "{{.Server.Version}}"],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DAEMON_TIMEOUT_S,
        )
        said, failed = done.stderr.strip(), done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        said, failed = str(error), True
    if failed:
        raise foreign.explain(said) or ToolchainError(
            "no-docker-daemon",
            "The Docker daemon does not answer.",
            why=f"{foreign.last_lines(said) or 'It said nothing'}.",
            next="Try `docker version`; see `nemobuild doctor`.",
        )


def _cards(reading: NvidiaReading, sm: tuple[int, int], count: int, wanted: str) -> tuple[GpuReading, ...]:
    cards = pick_gpus(reading.gpus, sm, count)
    if reading.gpus and all(card.sm == sm for card in cards):
        check_count(cards, count)
    if len(cards) < count or any(card.sm != sm for card in cards):
        here = ", ".join(f"{gpu.name} ({sm_text(gpu.sm)})" for gpu in reading.gpus) or "no GPU"
        raise ToolchainError(
            "another-gpu",
            f"The profile is for {wanted}, of which {count} build; this machine has {here}.",
            why="An engine runs only on the compute capability that it was built on.",
            next="Build where it is served, or choose a profile of this machine's GPU (`nemobuild profiles`).",
        )
    return cards
