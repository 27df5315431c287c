"""The exact lines that start Triton: on this machine, inside the vendor's container, and that container itself.

Inside the container they are what the vendor's ``launch_triton_server.py`` would start. That script itself leaves its
server in the background, listens on every address, and gives two servers the same names of shared memory, so the line
is started here without it. MPI is used only when there is more than one rank: each rank of an engine is a Triton of
its own of which only the first has the text models; ``tensorrt_llm.LLM`` has one Triton, to which
``trtllm-llmapi-launch`` brings the other ranks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from nemobuild.config import CheckpointConfig, MachineConfig
from nemobuild.engine.built_with import compare_all
from nemobuild.engine.container import Mount, docker_run, find_docker
from nemobuild.errors import IntegrityError, ToolchainError, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.nvml import GpuReading, check_count, pick_gpus, read_nvidia, visible_gpus
from nemobuild.plan.gpus import load_gpu
from nemobuild.plan.planner import Plan
from nemobuild.plan.toolchain import Toolchain, load_toolchain
from nemobuild.triton.carrier import find_triton

DEFAULT_PORTS = (8000, 8001, 8002)
Where = Literal["auto", "local", "container"]
# What only the vendor's image has, by runtime: a file below the folder of Triton, or a program.
_BACKEND_FILE = "backends/tensorrtllm/libtriton_tensorrtllm.so"
_LLMAPI_LAUNCHER = "trtllm-llmapi-launch"
# What no client needs, and what would let one load models, map memory of this machine or choose a file to log to.
# Triton opens these to whoever sends a header; no header's name can hold a colon, so nobody can.
_CLOSED_APIS = "shared-memory,model-repository,trace,logging:closed:to-all=never"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.http_port, self.grpc_port, self.metrics_port

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"


class _Profile(BaseModel):
    """The part of a profile that decides how its repository is served; other versions may differ in the rest."""

    runtime: Literal["cpu", "tensorrt", "llmapi"]
    machine: MachineConfig | None
    checkpoint: CheckpointConfig


@dataclass(frozen=True, slots=True)
class Emitted:
    """What the manifest of an emitted repository says of how it wants to be served. Without one: like ``cpu``."""

    runtime: str = "cpu"
    ranks: int = 1
    toolchain: Toolchain | None = None
    sm: tuple[int, int] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)  # the manifest of the engine in it


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one server. ``removal`` ends what may outlive the process: a container."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    removal: tuple[str, ...] = ()


def read_emitted(repository: Path) -> Emitted:
    """What the repository's manifest says.

    Raises ``UsageError`` for a folder that is no repository, ``IntegrityError`` for a manifest that is not ours.
    """
    if not any(repository.glob("*/config.pbtxt")):
        raise UsageError(
            "no-repository", f"{repository} is not a model repository.", next="Make one: `nemobuild repo`."
        )
    file = repository / "manifest.json"
    if not file.is_file():
        return Emitted()
    manifest = load_json(file)
    try:
        profile = _Profile.model_validate(manifest.get("profile"))
    except ValidationError as error:
        raise IntegrityError(
            "bad-manifest",
            f"{file} holds no profile that this nemobuild knows.",
            why=f"{error.errors()[0]['msg']}.",
            next="Emit the repository again: `nemobuild repo`.",
        ) from error
    if profile.machine is None:
        return Emitted(profile.runtime)
    engine = manifest.get("engine")
    if profile.runtime == "llmapi":  # no engine, but options that are those of one version
        engine = {"trtllm": manifest.get("trtllm"), "container": profile.machine.container}
    return Emitted(
        runtime=profile.runtime,
        ranks=profile.checkpoint.ranks,
        toolchain=load_toolchain(profile.machine.container),
        sm=load_gpu(profile.machine.gpu).sm,
        engine=engine if isinstance(engine, dict) else {},
    )


def serve_line(
    runtime: str,
    ranks: int,
    repository: Path,
    endpoint: Endpoint,
    *,
    server_id: str = "nemobuild",
    binary: str = "tritonserver",
    listen: str | None = None,
) -> list[str]:
    """The line that serves ``repository`` where its runtime is installed; to be started in that folder.

    ``server_id`` is the name that the server gives of itself, and the beginning of the names of its shared memory.
    ``listen`` is the address to bind, where that is not the endpoint's: inside a container.
    """
    if runtime == "llmapi":
        line = _server(binary, repository, endpoint, server_id, 0, listen)
        return line if ranks == 1 else ["mpirun", "--allow-run-as-root", "-n", str(ranks), _LLMAPI_LAUNCHER, *line]
    if ranks == 1 or runtime == "cpu":
        return _server(binary, repository, endpoint, server_id, 0, listen)
    line = ["mpirun", "--allow-run-as-root"]
    for rank in range(ranks):
        line += [":"] * (rank > 0) + ["-n", "1", *_server(binary, repository, endpoint, server_id, rank, listen)]
        if rank:
            line += ["--model-control-mode=explicit", "--load-model=tensorrt_llm"]
    return line


def container_line(
    made: Emitted,
    repository: Path,
    endpoint: Endpoint,
    *,
    gpus: Sequence[int] = (),
    server_id: str = "nemobuild",
    name: str = "nemobuild",
) -> list[str]:
    """The ``docker run`` that serves ``repository``, mounted read-only, in the container of its profile.

    ``gpus`` are the cards by NVML's numbers; default: the first ones.
    """
    assert made.toolchain is not None  # what is served in a container names it
    inside = serve_line(made.runtime, made.ranks, repository, endpoint, server_id=server_id, listen="0.0.0.0")
    return docker_run(
        made.toolchain,
        inside,
        [Mount(repository.resolve())],
        gpus=gpus or range(made.ranks),
        name=name,
        ports=[(endpoint.host, port) for port in endpoint.ports],
        workdir=repository.resolve(),
    )


def serve_commands(plan: Plan, repository: Path) -> list[tuple[str, list[str]]]:
    """Title and line of each way to serve what ``plan`` makes, for ``nemobuild plan --commands``."""
    endpoint = Endpoint("127.0.0.1", *DEFAULT_PORTS)
    made = Emitted(plan.profile.runtime, plan.profile.checkpoint.ranks, plan.toolchain)
    inside = serve_line(made.runtime, made.ranks, repository, endpoint)
    if made.toolchain is None:
        return [("serve", inside)]
    return [
        ("serve in a container", container_line(made, repository, endpoint)),
        ("or inside that container, from the repository's folder", inside),
    ]


def choose_launch(
    made: Emitted,
    repository: Path,
    endpoint: Endpoint,
    server_id: str,
    where: Where = "auto",
    cards: Sequence[int] = (),
) -> Launch:
    """How to serve ``repository`` from here: with the Triton of this machine where it can, else in a container.

    ``cards`` are the GPUs to use, by NVML's numbers; default: the first that fit.

    Before anything is loaded, the engine is compared with what would load it. Raises ``ToolchainError`` when it was
    built for something else, or nothing here can serve it; ``UsageError`` when ``where`` asks for what cannot be.
    """
    if made.runtime == "cpu" and where == "container":
        raise UsageError("cpu-container", "The cpu runtime needs no container.", next="Leave --container out.")
    missing = "" if made.runtime == "cpu" else missing_here(made.runtime, made.ranks)
    if missing and (where == "local" or made.toolchain is None):
        raise ToolchainError(
            "no-vendor-triton",
            f"This machine cannot serve the {made.runtime} runtime by itself.",
            why=f"Here, {missing}.",
            next="Use Docker (--container), or work inside the container that the profile names.",
        )
    container = made.toolchain if missing or where == "container" else None
    if made.runtime == "cpu":
        gpus: tuple[GpuReading, ...] = ()
    else:
        nvidia = read_nvidia()
        chosen = tuple(gpu for gpu in nvidia.gpus if gpu.index in cards)
        gpus = chosen or pick_gpus(nvidia.gpus, made.sm, made.ranks)
        check_count(gpus, made.ranks)
        compare_all(made.engine, container, nvidia.driver, gpus)
    numbers = [gpu.index for gpu in gpus]
    if container is not None:
        docker, name = find_docker(), server_id.strip("_")
        line = container_line(made, repository, endpoint, gpus=numbers, server_id=server_id, name=name)
        return Launch(tuple(line), removal=(docker, "rm", "--force", name))
    install = find_triton()
    line = serve_line(made.runtime, made.ranks, repository, endpoint, server_id=server_id, binary=str(install.binary))
    if install.backend_directory is not None:
        line.append(f"--backend-directory={install.backend_directory}")
    return Launch(tuple(line), dict(install.env) | visible_gpus(numbers))


def missing_here(runtime: str, ranks: int) -> str:
    """What the vendor's image has and this machine lacks to serve ``runtime`` by itself, or nothing."""
    found = shutil.which("tritonserver")
    if found is None:
        return "there is no tritonserver on PATH"
    home = Path(found).resolve().parent.parent
    if runtime == "tensorrt" and not (home / _BACKEND_FILE).is_file():
        return f"Triton's folder {home} has no {_BACKEND_FILE}"
    if runtime == "llmapi" and not shutil.which(_LLMAPI_LAUNCHER):
        return f"there is no {_LLMAPI_LAUNCHER} on PATH, so no tensorrt_llm"
    if ranks > 1 and not shutil.which("mpirun"):
        return "there is no mpirun on PATH"
    return ""


def _server(
    binary: str, repository: Path, endpoint: Endpoint, server_id: str, rank: int, listen: str | None
) -> list[str]:
    line = [
        binary,
        f"--model-repository={repository.resolve()}",
        "--disable-auto-complete-config",  # the emitted configs are complete
        "--exit-timeout-secs=5",
        f"--id={server_id}",
        # Two servers on one machine stay apart, and so do the ranks of one.
        f"--backend-config=python,shm-region-prefix-name={server_id}{rank or ''}",
        f"--http-restricted-api={_CLOSED_APIS}",
        f"--grpc-restricted-protocol={_CLOSED_APIS}",
    ]
    for name, port in zip(("http", "grpc", "metrics"), endpoint.ports, strict=True):
        line += [f"--{name}-address={listen or endpoint.host}", f"--{name}-port={port}"]
    return line
