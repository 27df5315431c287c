"""A machine with TensorRT-LLM, or with Docker, for commands under test: stand-in programs on PATH, and a profile."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml

STANDINS = Path(__file__).parent / "standins"
H100 = "NVIDIA H100 80GB HBM3:9.0"


def install(program: str, path: Path) -> None:
    """The stand-in ``program`` as an executable at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STANDINS / program}.py" "$@"\n')
    path.chmod(0o755)


def install_trtllm(prefix: Path, *, trtllm: str = "1.2.1", tensorrt: str = "10.14.1.48") -> None:
    """``trtllm-build`` below ``prefix``, with the records of the packages that it would come in."""
    install("trtllm_build", prefix / "bin" / "trtllm-build")
    for name, version in (("tensorrt_llm", trtllm), ("tensorrt", tensorrt)):
        folder = prefix / "lib" / "python3.12" / "dist-packages" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def machine(folder: Path, *, local: bool = True, cards: str = H100, **more: str) -> dict[str, str]:
    """Environment of a machine with TensorRT-LLM, or else with Docker and its image; ``more`` goes to the stand-ins."""
    install_trtllm(folder / "trtllm")
    install("docker", folder / "docker" / "docker")
    (folder / "containers").mkdir()
    tools = folder / "trtllm" / "bin" if local else folder / "docker"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STANDIN_")}
    return kept | {
        "PATH": f"{tools}:/usr/bin:/bin",
        "PYTHONPATH": str(STANDINS / "driver"),
        "STANDIN_CARDS": cards,
        "STANDIN_IMAGE": str(folder / "trtllm"),
        "STANDIN_DOCKER_STATE": str(folder / "containers"),
        "STANDIN_CALLS": str(folder / "calls"),
        **more,
    }


def write_profile(path: Path, source: Path, **changes: Any) -> Path:
    """A profile for an engine of the model in ``source``; ``changes`` are fields such as ``limits__max_batch_size``."""
    profile: dict[str, Any] = {
        "description": "A tiny model.",
        "runtime": "tensorrt",
        "model": {"source": str(source)},
        "machine": {"gpu": "h100-sxm"},
        "checkpoint": {"precision": "bf16"},
        "build": {"max_num_tokens": 1024},
        "limits": {
            "max_batch_size": 8,
            "max_context_tokens": 512,
            "default_max_tokens": 64,
            "expected_prompt_tokens": 64,
        },
        "reasoning": {"policy": "nemotron-super-v1.5", "default": "on"},
    }
    for name, value in changes.items():
        section, _, field = name.partition("__")
        if field:
            profile.setdefault(section, {})[field] = value
        else:
            profile[section] = value
    path.write_text(yaml.safe_dump(profile))
    return path


def enter(monkeypatch: Any, environment: dict[str, str]) -> None:
    """Let this very process be on that machine."""
    for name in ("PATH", *(name for name in environment if name.startswith("STANDIN_"))):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.syspath_prepend(environment["PYTHONPATH"])
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
