"""What the NVIDIA driver says about this machine, read through NVML: the one module that imports ``pynvml``.

Every reading is taken anew, so that a caller may sample memory while something runs. What a card does not support
(ECC on a workstation card, MIG on most) is ``None``, not an error; what keeps NVML from answering at all is a
``ToolchainError`` with what to do about it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemobuild.errors import ToolchainError, UsageError

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NO_GPU = ("", "-1", "NoDevFiles")  # in VISIBLE


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU. From within a container, foreign processes have numbers but no names."""

    pid: int
    name: str | None
    memory_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU. ``None`` where the card has no such thing; ``ecc_errors`` are uncorrected, since the driver's start."""

    index: int
    uuid: str
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    sm: tuple[int, int]
    ecc: bool | None
    ecc_errors: int | None
    mig: bool | None
    power_cap_w: float | None
    power_default_w: float | None
    processes: tuple[GpuProcess, ...]


@dataclass(frozen=True, slots=True)
class NvidiaReading:
    """The driver's version, the newest CUDA that it runs by itself, and its GPUs."""

    driver: str
    cuda: tuple[int, int]
    gpus: tuple[GpuReading, ...]


def read_nvidia() -> NvidiaReading:
    """Driver and GPUs now. Takes some milliseconds.

    Raises ``ToolchainError`` when there is no driver, it does not answer, or the package ``nvidia-ml-py`` is missing.
    """
    try:
        import pynvml
    except ImportError as error:
        raise ToolchainError(
            "no-nvml-package",
            "GPUs cannot be read without the Python package nvidia-ml-py.",
            next="Type `pip install 'nemobuild[gpu]'`.",
        ) from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise _no_start(pynvml, error) from error
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion()  # 13010 is 13.1
        return NvidiaReading(
            driver=pynvml.nvmlSystemGetDriverVersion(),
            cuda=(number // 1000, number % 1000 // 10),
            gpus=tuple(_read(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())),
        )
    except pynvml.NVMLError as error:
        raise ToolchainError(
            "nvml-failed",
            "The NVIDIA driver does not answer.",
            why=f"NVML says: {error}.",
            next="See `nvidia-smi` and `dmesg`; a lost GPU needs a restart of the machine.",
        ) from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def pick_gpus(gpus: tuple[GpuReading, ...], sm: tuple[int, int] | None, count: int) -> tuple[GpuReading, ...]:
    """``count`` GPUs to use: those in CUDA_VISIBLE_DEVICES if it is set, else of the compute capability ``sm``, else
    any. May be fewer. Raises ``UsageError`` for a variable that is not understood.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return _visible(visible, gpus)[:count]
    fitting = tuple(gpu for gpu in gpus if gpu.sm == sm)
    return (fitting if len(fitting) >= count else gpus)[:count]


def _visible(text: str, gpus: tuple[GpuReading, ...]) -> tuple[GpuReading, ...]:
    """What CUDA sees, in that order: GPUs by number or by the beginning of their UUID, up to the first that is none."""
    found: list[GpuReading] = []
    for word in map(str.strip, text.split(",")):
        if word in _NO_GPU:
            break
        if not (word.isdecimal() or word.startswith("GPU-")):
            raise UsageError(
                "bad-visible-devices",
                f"{VISIBLE} is {text!r}.",
                why=f"{word!r} is neither a GPU's number nor its UUID (GPU-...); slices of a GPU are not supported.",
                next="See `nvidia-smi -L`, then correct it or unset it.",
            )
        named = [gpu for gpu in gpus if gpu.uuid.startswith(word) or word == str(gpu.index)]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return tuple(found)


def check_count(gpus: Sequence[GpuReading], ranks: int) -> None:
    """Raise ``ToolchainError`` when these ``gpus``, of ``pick_gpus``, are not one for every rank."""
    if len(gpus) < ranks:
        visible = os.environ.get(VISIBLE)
        raise ToolchainError(
            "too-few-gpus",
            f"{ranks} GPUs are needed; there are {len(gpus)}.",
            why="" if visible is None else f"{VISIBLE} is {visible!r}.",
            next="Use a machine that has them, or lower tensor_parallel and machine.count; see `nemobuild plan`.",
        )


def visible_gpus(numbers: Sequence[int]) -> dict[str, str]:
    """Variables that show a program only these cards: NVML counts by place on the bus, CUDA by speed unless told so."""
    if not numbers:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE: ",".join(map(str, numbers))}


def _read(pynvml: Any, index: int) -> GpuReading:
    gpu = pynvml.nvmlDeviceGetHandleByIndex(index)

    def optional(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(gpu, *arguments)
        except pynvml.NVMLError:  # not supported, not permitted, or not while MIG is on
            return None

    def enabled(read: Callable[..., Any]) -> bool | None:
        modes = optional(read)  # now, and after the next reset
        return None if modes is None else bool(modes[0] == pynvml.NVML_FEATURE_ENABLED)

    def watts(read: Callable[..., Any]) -> float | None:
        milliwatts = optional(read)
        return None if milliwatts is None else milliwatts / 1000

    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(gpu)
    return GpuReading(
        index=index,
        uuid=pynvml.nvmlDeviceGetUUID(gpu),
        name=pynvml.nvmlDeviceGetName(gpu),
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.used,
        sm=(major, minor),
        ecc=enabled(pynvml.nvmlDeviceGetEccMode),
        ecc_errors=optional(
            pynvml.nvmlDeviceGetTotalEccErrors, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        ),
        mig=enabled(pynvml.nvmlDeviceGetMigMode),
        power_cap_w=watts(pynvml.nvmlDeviceGetEnforcedPowerLimit),
        power_default_w=watts(pynvml.nvmlDeviceGetPowerManagementDefaultLimit),
        processes=tuple(
            GpuProcess(process.pid, _process_name(pynvml, process.pid), process.usedGpuMemory)
            for process in optional(pynvml.nvmlDeviceGetComputeRunningProcesses) or ()
        ),
    )


def _process_name(pynvml: Any, pid: int) -> str | None:
    try:
        return str(pynvml.nvmlSystemGetProcessName(pid))
    except (pynvml.NVMLError, UnicodeDecodeError):
        return None


def _no_start(pynvml: Any, error: Any) -> ToolchainError:
    known = {
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: ToolchainError(
            "no-driver",
            "There is no NVIDIA driver on this machine.",
            why="Its library libnvidia-ml.so.1 was not found.",
            next="Install the driver; in a container start it with --gpus all and NVIDIA's container toolkit.",
        ),
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED: ToolchainError(
            "driver-not-loaded",
            "The NVIDIA driver is installed but not loaded.",
            next="Type `sudo modprobe nvidia`, and see `dmesg` if that fails.",
        ),
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: ToolchainError(
            "driver-mismatch",
            "The loaded NVIDIA driver and its libraries are of different versions.",
            why="The driver was upgraded while the old one was loaded.",
            next="Restart the machine.",
        ),
        pynvml.NVML_ERROR_NO_PERMISSION: ToolchainError(
            "driver-not-permitted",
            "The NVIDIA driver may not be used by this user.",
            next="Join the group that owns /dev/nvidia*, or ask who runs this machine.",
        ),
    }
    other = ToolchainError("driver-broken", "The NVIDIA driver does not start.", why=f"NVML says: {error}.")
    return known.get(error.value, other)
