"""What an engine was built with, and whether that is what is here: an engine loads nowhere else.

TensorRT writes its version and the GPU's compute capability into an engine and refuses another one, minutes into
loading, with a message that names neither the file nor the remedy. TensorRT-LLM does not even look at its own version.
So both are noted when an engine is built, and compared before it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from nemobuild.errors import IntegrityError, ToolchainError
from nemobuild.nvml import GpuReading
from nemobuild.plan.toolchain import Toolchain, same_version, toolchains


@dataclass(frozen=True, slots=True)
class BuiltWith:
    """``sm`` is "9.0" for an H100. ``None``: not known, which is compared with nothing. ``container`` is its tag."""

    gpu: str | None = None
    sm: str | None = None
    driver: str | None = None
    tensorrt: str | None = None
    trtllm: str | None = None
    container: str | None = None


# What must agree: field, its name for readers. A driver may be newer, and a container only carries the others.
_MUST_AGREE = (("sm", "compute capability"), ("tensorrt", "TensorRT"), ("trtllm", "TensorRT-LLM"))


def built_with(manifest: Mapping[str, Any]) -> BuiltWith:
    """The part of an engine's ``manifest.json`` that tells what it was built with."""
    fields = {name: manifest.get(name) for name in BuiltWith.__slots__}
    for name, value in fields.items():
        if value is not None and not isinstance(value, str):
            raise IntegrityError("bad-manifest", f"{name} in the engine's manifest.json is {value!r}, not a text.")
    return BuiltWith(**fields)


def compare_with_here(manifest: Mapping[str, Any], here: BuiltWith) -> None:
    """Raise ``ToolchainError`` when the engine of ``manifest`` cannot be loaded by what is ``here``."""
    made = built_with(manifest)
    differing = [
        (title, getattr(made, field), getattr(here, field))
        for field, title in _MUST_AGREE
        if not same_version(getattr(made, field), getattr(here, field))
    ]
    if not differing:
        return
    made_by = ", ".join(f"{title} {value}" for title, value, _ in differing)
    serves = ", ".join(f"{title} {value}" for title, _, value in differing)
    if made.sm not in (None, here.sm) and here.sm is not None:
        next = f"Serve it on {made.gpu or 'the card that it was built for'}, or build it again for this GPU."
    elif made.container is not None:
        next = f"Serve it in container {made.container}, or build it again for the one here."
    else:
        next = "Build it again here: `nemobuild build PROFILE`."
    raise ToolchainError(
        "engine-of-another-kind",
        f"The engine was built with {made_by}; serving with {serves}.",
        why="TensorRT loads an engine only where the version and the kind of GPU are those of its build.",
        next=next,
    )


def sm_text(sm: tuple[int, int]) -> str:
    """ "9.0" for (9, 0)."""
    return f"{sm[0]}.{sm[1]}"


def installed() -> BuiltWith:
    """The versions on this machine, which inside the vendor's container are that container's; nothing is imported."""
    tag = os.environ.get("NVIDIA_TRITON_SERVER_VERSION")
    image = toolchains().get(tag or "")
    return BuiltWith(
        tensorrt=_package("tensorrt") or (image.tensorrt if image else None),
        trtllm=_package("tensorrt_llm") or (image.trtllm if image else None),
        container=tag,
    )


def compare_all(
    manifest: Mapping[str, Any], toolchain: Toolchain | None, driver: str | None, gpus: Sequence[GpuReading]
) -> None:
    """``compare_with_here`` for every one of ``gpus``, served by ``toolchain``'s container or else by this machine."""
    for gpu in gpus or (None,):
        compare_with_here(manifest, here(toolchain, driver, gpu))


def here(toolchain: Toolchain | None, driver: str | None, gpu: GpuReading | None) -> BuiltWith:
    """What serves: ``toolchain``'s container, or without one this machine; on ``gpu``, if any."""
    made = installed()
    if toolchain is not None:
        made = BuiltWith(tensorrt=toolchain.tensorrt, trtllm=toolchain.trtllm, container=toolchain.tag)
    if gpu is None:
        return replace(made, driver=driver)
    return replace(made, gpu=gpu.name, sm=sm_text(gpu.sm), driver=driver)


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
