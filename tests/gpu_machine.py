"""A machine with GPUs, as nemobuild sees one: stand-ins for NVML, Docker and the vendor's image, on PATH by choice."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.toolchains import STANDINS, install

PROGRAMS = ("tritonserver", "mpirun", "trtllm-llmapi-launch")
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "total": 81559 << 20,
    "used": 1 << 20,
    "sm": [9, 0],
    "ecc": True,
    "ecc_errors": 0,
    "mig": False,
    "power_mw": 700_000,
    "default_power_mw": 700_000,
    "processes": [],
}


def h100(**changes: Any) -> dict[str, Any]:
    """An H100 in the stand-in's terms, with ``changes``."""
    return H100 | changes


def nvml(monkeypatch: Any, *gpus: dict[str, Any], **more: Any) -> None:
    """From now on this process and its children see these GPUs."""
    monkeypatch.syspath_prepend(str(STANDINS / "driver"))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(STANDINS / "driver"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = {"driver": "590.44.01", "cuda": 13010, "gpus": list(gpus)} | more
    monkeypatch.setenv("STANDIN_NVML", json.dumps(machine))


def image(monkeypatch: Any, folder: Path) -> Path:
    """The vendor's image as a folder; its ``bin`` is on PATH only inside."""
    for name in PROGRAMS:
        install(name.replace("-", "_"), folder / "bin" / name)
    library = folder / "backends" / "tensorrtllm" / "libtriton_tensorrtllm.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF")
    monkeypatch.setenv("STANDIN_IMAGE", str(folder))
    return folder


def docker(monkeypatch: Any, folder: Path) -> Path:
    """A ``docker`` on PATH, in front of any other; its containers are listed in ``folder``."""
    install("docker", folder / "bin" / "docker")
    (folder / "state").mkdir()
    monkeypatch.setenv("STANDIN_DOCKER_STATE", str(folder / "state"))
    put_first(monkeypatch, folder / "bin")
    return folder / "state"


def put_first(monkeypatch: Any, folder: Path) -> None:
    """``folder`` and the system's programs are PATH, and nothing of the user's."""
    here = [str(folder), "/usr/bin", "/bin"]
    assert not any(shutil.which(name, path="/usr/bin:/bin") for name in PROGRAMS)
    monkeypatch.setenv("PATH", ":".join(here))
