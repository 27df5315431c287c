"""``docker run`` lines for the pinned image: what is run is printed as it is run, never hidden.

A folder has the same path inside as outside, so that a command reads alike in both places. Sources are mounted
read-only. The program runs as the user who asked, so that what it writes belongs to that user, and without a network
unless ports are named: neither building nor loading an engine needs one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemobuild.errors import ToolchainError
from nemobuild.plan.toolchain import Toolchain

# NCCL and the Python backend talk through shared memory; Docker's default of 64 MiB stops both.
SHM_BYTES = 2 << 30
# Triton copies the body of a request to the stack.
STACK_BYTES = 256 << 20
_NOBODY = "65534:65534"


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of the host that the container sees under the same path."""

    path: Path
    writable: bool = False


def find_docker() -> str:
    """Path of the ``docker`` program. Raises ``ToolchainError`` without one."""
    found = shutil.which("docker")
    if found is None:
        raise ToolchainError(
            "no-docker",
            "There is no docker program on PATH.",
            why="The pinned container holds the TensorRT-LLM that builds and serves.",
            next="Install Docker and NVIDIA's container toolkit, or run nemobuild inside the container with --local.",
        )
    return found


def docker_run(
    toolchain: Toolchain,
    argv: Sequence[str],
    mounts: Sequence[Mount],
    *,
    gpus: Sequence[int],
    name: str,
    workdir: Path | None = None,
    ports: Sequence[tuple[str, int]] = (),
    shm_bytes: int = SHM_BYTES,
    container_id: Path | None = None,
) -> list[str]:
    """The line that runs ``argv`` in the toolchain's image, under ``name``, on the cards with the numbers ``gpus``.

    ``ports`` are (address, port) of the host, each led to the same port inside. ``container_id`` is a file, not there
    yet, into which Docker writes the container's id.
    """
    devices = ",".join(map(str, gpus))
    line = ["docker", "run", "--rm", "--init", "--name", name]
    line += ["--gpus", f'"device={devices}"', "--shm-size", str(shm_bytes)]
    line += ["--ulimit", "memlock=-1", "--ulimit", f"stack={STACK_BYTES}"]
    line += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
    line += ["--user", _user(mounts), "--env", "HOME=/tmp"]
    line += ["--workdir", str(workdir.absolute() if workdir else "/tmp")]
    if container_id is not None:
        line += ["--cidfile", str(container_id)]
    if not ports:
        line += ["--network", "none"]
    for address, port in ports:
        line += ["--publish", f"{address}:{port}:{port}"]
    for mount in mounts:
        mode = "" if mount.writable else ",readonly"
        line += ["--mount", f"type=bind,source={mount.path.absolute()},target={mount.path.absolute()}{mode}"]
    return [*line, toolchain.image, *argv]


def _user(mounts: Sequence[Mount]) -> str:
    """Ours, whose files are written; root only where it must write, and nobody where it would only read."""
    if os.getuid() == 0 and not any(mount.writable for mount in mounts):
        return _NOBODY
    return f"{os.getuid()}:{os.getgid()}"
