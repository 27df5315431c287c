"""What every target has to know of a served model: image, cards, memory, times, and the line that runs.

One image for all targets: the pinned base with nemobuild in it. It runs ``nemobuild serve`` with the gateway before
Triton, since the gateway has keys, limits and a health check that follows real tokens; Triton itself stays on the
container's loopback. The repository is a read-only volume, the API keys are a secret by reference.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemobuild import __version__
from nemobuild.engine.container import SHM_BYTES
from nemobuild.errors import UsageError
from nemobuild.gateway.process import DEFAULT_PORT
from nemobuild.plan.planner import Plan
from nemobuild.plan.report import does_not_fit

REPOSITORY = "/repository"
KEYS_FOLDER, KEYS_FILE = "/run/nemobuild", "api-keys.txt"
TMP_BYTES = 2 << 30
# An arbitrary user without a name; it owns nothing in the image, which is read-only anyway.
USER = 10001
# Between the signal to stop and the kill: answers under way end, Triton unloads.
GRACE_S = 120

_GIB = 1 << 30
_GATEWAY_BYTES, _CPU_SERVER_BYTES = 1 * _GIB, 2 * _GIB
# Bounds, not measured: how slowly the weights may come, and what CUDA, graphs and the first token add.
_SLOWEST_BYTES_PER_S = 100e6
_FIRST_TOKEN_S = {"cpu": 120, "tensorrt": 300, "llmapi": 900}
_DISK_RESERVE = 1.1


@dataclass(frozen=True, slots=True)
class Options:
    """``image`` is the reference to run; default: ``nemobuild-serve`` with a tag that names what is in it."""

    image: str | None = None
    replicas: int = 1
    max_replicas: int = 4
    gpus_per_node: int = 8


@dataclass(frozen=True, slots=True)
class Served:
    """``memory_bytes`` holds shared memory too; memory and cards are those of one node's part."""

    name: str
    image: str
    nodes: int
    gpus: int
    memory_bytes: int
    disk_bytes: int
    ready_timeout_s: int
    arguments: tuple[str, ...]


def served(plan: Plan, options: Options) -> Served:
    """What ``plan`` needs to be served. Raises ``DoesNotFit`` when it does not fit, ``UsageError`` for bad options."""
    if not plan.fits:
        raise does_not_fit(plan)
    if not 1 <= options.replicas <= options.max_replicas:
        raise UsageError(
            "bad-replicas",
            f"--replicas is {options.replicas}, --max-replicas {options.max_replicas}.",
            next="Swap them.",
        )
    ranks = 0 if plan.gpu is None else len(plan.ranks)
    nodes = max(1, -(-ranks // options.gpus_per_node))
    if ranks % nodes:
        raise UsageError(
            "uneven-nodes",
            f"{ranks} ranks cannot be spread evenly over {nodes} nodes.",
            next="Choose --gpus-per-node so that it divides checkpoint.tensor_parallel x pipeline_parallel.",
        )
    runtime = plan.profile.runtime
    weight_bytes = sum(rank.weight_bytes for rank in plan.ranks)
    if plan.gpu is None:
        host_bytes = plan.ranks[0].total_bytes + _CPU_SERVER_BYTES
    else:
        # The plan's need of the stage serve is one rank's; here all of a node load at once.
        need = next(need for need in plan.host if need.stage == "serve")
        largest = max(rank.weight_bytes for rank in plan.ranks)
        host_bytes = need.memory_bytes + (ranks // nodes - 1) * largest
    ready_s = _FIRST_TOKEN_S[runtime] + weight_bytes / _SLOWEST_BYTES_PER_S
    ready_timeout_s = int(-(-ready_s // 60) * 60)
    return Served(
        name=label(plan.name),
        image=options.image or image_name(plan),
        nodes=nodes,
        gpus=ranks // nodes,
        memory_bytes=_whole_gib(host_bytes + SHM_BYTES + TMP_BYTES + _GATEWAY_BYTES),
        disk_bytes=_whole_gib(int(weight_bytes * _DISK_RESERVE)),
        ready_timeout_s=ready_timeout_s,
        arguments=(
            *("serve", REPOSITORY),
            *(() if plan.gpu is None else ("--local",)),
            *("--openai", "--openai-host", "0.0.0.0", "--openai-port", str(DEFAULT_PORT)),
            *("--api-keys", f"{KEYS_FOLDER}/{KEYS_FILE}"),
            *("--log", "/tmp/triton.log", "--timeout", str(ready_timeout_s)),
        ),
    )


def on_one_node(plan: Plan, options: Options) -> Served:
    """As ``served``; raises ``UsageError`` when one node is not enough."""
    what = served(plan, options)
    if what.nodes > 1:
        raise UsageError("several-nodes", f"{plan.name} needs {what.nodes} nodes.", next="Use --to k8s.")
    return what


def image_name(plan: Plan) -> str:
    """The tag says which nemobuild stands on which base."""
    base = "cpu" if plan.toolchain is None else plan.toolchain.tag
    return f"nemobuild-serve:{__version__}-{base}"


def label(name: str) -> str:
    """``name`` as a DNS label that every kind of Kubernetes object takes: ``super-49b-v1-5-h100-fp8``."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return (plain if plain[:1].isalpha() else f"m-{plain}")[:50].rstrip("-")


def _whole_gib(count: float) -> int:
    return int(-(-count // _GIB)) * _GIB
