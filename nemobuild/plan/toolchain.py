"""Which container holds which versions, as data: an engine runs only on the TensorRT that built it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from nemobuild.config import read_yaml
from nemobuild.errors import ToolchainError, nearest
from nemobuild.resources import data_folder


@dataclass(frozen=True, slots=True)
class Toolchain:
    """One image of Triton with TensorRT-LLM. ``driver`` is the oldest that it was released for, or empty."""

    tag: str
    image: str
    trtllm: str
    tensorrt: str
    cuda: str
    driver: str
    runtimes: tuple[str, ...]

    @property
    def line(self) -> tuple[int, int]:
        """(1, 2) for TensorRT-LLM 1.2.1: what options depend on."""
        major, minor = self.trtllm.split(".")[:2]
        return int(major), int(minor)


def same_version(one: str | None, other: str | None) -> bool:
    """Whether two versions name the same release: a package says ``1.0.3.2510`` where a table says ``1.0.3``.

    What is not known (None) differs from nothing.
    """
    if one is None or other is None:
        return True
    return all(a == b for a, b in zip(one.split("."), other.split("."), strict=False))


@cache
def toolchains() -> dict[str, Toolchain]:
    """All known containers by tag, newest first."""
    data = read_yaml(data_folder("engine_configs") / "toolchain.yaml")
    return {
        tag: Toolchain(
            tag=tag,
            image=f"nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3",
            **fields | {"runtimes": tuple(fields["runtimes"])},
        )
        for tag, fields in data.items()
    }


def load_toolchain(tag: str) -> Toolchain:
    """The container of that tag. Raises ``ToolchainError`` that proposes the nearest."""
    known = toolchains()
    if tag not in known:
        raise ToolchainError(
            "unknown-container",
            f"machine.container {tag!r} is not in the toolchain matrix.",
            why=nearest(tag, known),
            next="Name one of them, or add a line to engine_configs/toolchain.yaml.",
        )
    return known[tag]
