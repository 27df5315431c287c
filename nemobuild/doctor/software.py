"""What would run the engine: versions against the matrix, Docker with its GPU toolkit, a Triton for the cpu runtime."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemobuild import __version__
from nemobuild.doctor.findings import Finding, failed
from nemobuild.engine.built_with import compare_all, installed
from nemobuild.engine.container import find_docker
from nemobuild.engine.foreign import explain, last_lines
from nemobuild.errors import NemobuildError, ToolchainError
from nemobuild.model.hf_config import load_json
from nemobuild.nvml import NvidiaReading, pick_gpus
from nemobuild.plan.advisories import open_advisories, read_on
from nemobuild.plan.planner import Plan
from nemobuild.plan.toolchain import same_version, toolchains
from nemobuild.triton.carrier import REQUIREMENT, check_platform, find_libpython
from nemobuild.triton.launch import missing_here

_DOCKER_TIMEOUT_S = 20.0


def check_versions(plan: Plan | None) -> Iterator[Finding]:
    """nemobuild, Python, and inside the vendor's container TensorRT and TensorRT-LLM against the matrix."""
    own = installed()
    facts: dict[str, Any] = {"nemobuild": __version__, "python": platform.python_version()}
    facts |= {name: getattr(own, name) for name in ("container", "trtllm", "tensorrt")}
    known = [f"{name} {value}" for name, value in facts.items() if value]
    yield Finding("versions", "ok", f"{', '.join(known)}.", facts=facts)
    if own.trtllm is None:
        return
    wanted = plan.toolchain if plan else toolchains().get(own.container or "")
    if wanted is None and plan is None:
        fitting = [tag for tag, known_one in toolchains().items() if same_version(known_one.trtllm, own.trtllm)]
        what = f"TensorRT-LLM {own.trtllm} is " + (
            f"that of container {fitting[0]}." if fitting else "not in the matrix."
        )
        yield Finding("versions", "note" if fitting else "warning", what, next="See engine_configs/toolchain.yaml.")
    elif wanted is not None and not same_version(own.trtllm, wanted.trtllm):
        yield failed(
            "versions",
            ToolchainError(
                "another-trtllm",
                f"TensorRT-LLM {own.trtllm} is installed; container {wanted.tag} has {wanted.trtllm}.",
                why="Flags, checkpoints and engines are made for one version.",
                next=f"Work in {wanted.image}, or name another machine.container.",
            ),
        )


def check_advisories(plan: Plan | None) -> Iterator[Finding]:
    """Known holes in what the plan would serve with, without a plan in the server of the cpu runtime."""
    toolchain = plan.toolchain if plan else None
    found = open_advisories(toolchain)
    as_of = f"By NVIDIA's bulletins as they were read on {read_on()}; later ones are not in the list."
    if not found:
        yield Finding("advisories", "ok", "No bulletin is known for the container.", as_of)
        return
    advice = "Take a container in which they are fixed, where there is one; let nobody but the gateway reach Triton."
    if toolchain is None:
        advice = "Keep it on loopback, as `serve` does, and let others reach the gateway only; it is for trials and CI."
    listed = ", ".join(f"{a.id} ({a.worst}, fixed in {a.product} {a.fixed_in})" for a in found)
    where = "the Triton of the cpu runtime" if toolchain is None else f"container {toolchain.tag}"
    yield Finding(
        "advisories",
        "warning" if toolchain else "note",
        f"Bulletins open for {where}: {listed}.",
        as_of,
        advice,
        facts={"advisories": [asdict(a) | {"date": str(a.date), "source": a.source} for a in found]},
    )


def check_container(plan: Plan | None) -> Iterator[Finding]:
    """Docker and its way to the GPUs: an error only where the plan has to use it."""
    wanted = plan is not None and plan.gpu is not None
    lacking = missing_here(plan.profile.runtime, plan.profile.checkpoint.ranks) if plan and wanted else ""
    if wanted and not lacking:
        yield Finding("container", "ok", "This machine serves the profile's runtime without a container.")
    try:
        info = _docker_info(find_docker())
    except NemobuildError as error:
        yield failed("container", error) if lacking else Finding("container", "note", error.what)
        return
    runtimes = sorted(info.get("Runtimes") or {})
    devices = [str(device.get("ID")) for device in info.get("DiscoveredDevices") or ()]
    gpu = "nvidia" in runtimes or any("nvidia.com/gpu" in device for device in devices)
    facts = {"docker": info.get("ServerVersion"), "runtimes": runtimes, "devices": devices, "gpu": gpu}
    yield Finding(
        "container", "ok", f"Docker {info.get('ServerVersion')}, runtimes {', '.join(runtimes)}.", facts=facts
    )
    if not gpu and wanted:
        toolkit = ToolchainError(
            "no-container-toolkit",
            "Docker has no way to hand a GPU to a container.",
            why="Neither a runtime nvidia nor a CDI device nvidia.com/gpu is known to it.",
            next="Install NVIDIA's container toolkit: `nvidia-ctk runtime configure`, then restart Docker.",
        )
        yield failed("container", toolkit) if lacking else Finding("container", "note", toolkit.what)


def _docker_info(docker: str) -> dict[str, Any]:
    command = [docker, "info", "--format", "{{json .}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOCKER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(
            "no-docker-daemon", f"`docker info` said nothing for {_DOCKER_TIMEOUT_S:.0f} s.", next="Restart Docker."
        ) from error
    info = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode or not info.get("ServerVersion"):
        said = "\n".join([*(info.get("ServerErrors") or ()), done.stderr])
        raise explain(said) or ToolchainError("no-docker-daemon", "Docker does not work.", why=last_lines(said))
    return dict(info)


def check_triton(plan: Plan | None) -> Iterator[Finding]:
    """The server of the cpu runtime: one on PATH, or the one that the package index carries."""
    if plan is not None and plan.gpu is not None:
        return
    if found := shutil.which("tritonserver"):
        yield Finding("triton", "ok", f"tritonserver is {found}.")
        return
    try:
        check_platform()
        find_libpython()
    except ToolchainError as error:
        yield failed("triton", error)
        return
    yield Finding("triton", "ok", f"The cpu runtime takes its tritonserver from {REQUIREMENT}.")


def check_engine(plan: Plan | None, engine: Path, nvidia: NvidiaReading | None) -> Iterator[Finding]:
    """An engine that is built already: can it be loaded here?"""
    if plan is None or plan.gpu is None or not (engine / "manifest.json").is_file():
        return
    local = not missing_here(plan.profile.runtime, plan.profile.checkpoint.ranks)
    gpus = pick_gpus(nvidia.gpus, plan.gpu.sm, len(plan.ranks)) if nvidia else ()
    try:
        manifest = load_json(engine / "manifest.json")
        compare_all(manifest, None if local else plan.toolchain, nvidia.driver if nvidia else None, gpus)
    except NemobuildError as error:
        yield failed("engine", error)
        return
    yield Finding("engine", "ok", f"The engine in {engine} was built with what is here.")
