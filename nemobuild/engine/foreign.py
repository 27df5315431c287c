"""What foreign programs say when they fail, and what that means: one sentence and the next thing to type.

TensorRT, TensorRT-LLM, CUDA, the loader and Docker report the few things that really go wrong in thousands of lines.
The table is read from the top, and the first pattern that a log holds anywhere decides: the specific stand before the
general, so that the consequence of a failure does not hide its cause.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from nemobuild.errors import ChildFailed, DoesNotFit, IntegrityError, NemobuildError, ToolchainError, UsageError

_LOG_TAIL_BYTES = 4 << 20
_LINES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Message:
    """``what`` and ``next`` may hold {names} of the pattern's groups."""

    pattern: re.Pattern[str]
    kind: type[NemobuildError]
    code: str
    what: str
    next: str


def _message(pattern: str, kind: type[NemobuildError], code: str, what: str, next: str) -> Message:
    return Message(re.compile(pattern, re.MULTILINE), kind, code, what, next)


_REBUILD = "Build the engine again where it is served: `nemobuild build PROFILE`, in the container that serves."
_SMALLER = (
    "Lower build.max_num_tokens or limits.max_batch_size; `nemobuild plan PROFILE --explain` shows what each costs."
)
_TOOLKIT = "Install NVIDIA's container toolkit, restart Docker, and see `nemobuild doctor`."

MESSAGES: tuple[Message, ...] = (
    _message(
        r"not compatible with this version of TensorRT, expecting library version (?P<here>[\d.]*\d)",
        ToolchainError,
        "engine-of-another-tensorrt",
        "The engine was built with another TensorRT than the {here} that loads it.",
        _REBUILD,
    ),
    _message(
        r"Version tag does not match|kSERIALIZATION_VERSION failed|Serialization assertion .* failed",
        ToolchainError,
        "engine-of-another-tensorrt",
        "The engine was serialized by another version of TensorRT than the one that loads it.",
        _REBUILD,
    ),
    _message(
        r"incompatible device, expecting compute (?P<here>[\d.]*\d) got compute (?P<built>[\d.]*\d)",
        ToolchainError,
        "engine-of-another-gpu",
        "The engine was built for compute capability {built}, and this GPU has {here}.",
        _REBUILD,
    ),
    _message(
        r"Target GPU SM (?P<here>\d+) is not supported|no kernel image is available for execution on the device",
        ToolchainError,
        "gpu-not-supported",
        "This TensorRT-LLM has no kernels for this GPU.",
        "Choose a newer machine.container; `nemobuild plan PROFILE` knows which card needs which.",
    ),
    _message(
        r"could not select device driver .*gpu|nvidia-container-cli: (?!.*requirement)|invalid runtime name: nvidia",
        ToolchainError,
        "no-container-toolkit",
        "Docker cannot hand a GPU to a container.",
        _TOOLKIT,
    ),
    _message(
        r"unsatisfied condition: cuda|CUDA driver version is insufficient|forward compatibility was attempted",
        ToolchainError,
        "driver-too-old",
        "The NVIDIA driver is older than the container needs.",
        "Update the driver, or take an older machine.container; `nemobuild doctor` shows both versions.",
    ),
    _message(
        r"[Cc]annot connect to the Docker daemon|permission denied while trying to connect to the [Dd]ocker",
        ToolchainError,
        "no-docker-daemon",
        "The Docker daemon does not answer, or not to this user.",
        "Start it (`sudo systemctl start docker`) or join the group docker, then run the same command again.",
    ),
    _message(
        r"manifest unknown|pull access denied|repository does not exist|unauthorized: authentication required",
        ToolchainError,
        "no-image",
        "Docker cannot get the container image.",
        "Try `docker pull IMAGE` by hand; nvcr.io may want `docker login nvcr.io`.",
    ),
    _message(
        r"No space left on device|Disk quota exceeded|File too large",
        DoesNotFit,
        "disk-full",
        "The disk became full.",
        "Free some space, then run the same command again; `nemobuild plan PROFILE` says how much each stage needs.",
    ),
    _message(
        r"libcuda\.so\.1: cannot open shared object|Found no NVIDIA driver|no CUDA-capable device is detected",
        ToolchainError,
        "no-gpu",
        "The program found no NVIDIA GPU.",
        "Run it on a machine with one, or start the container with --gpus all; see `nemobuild doctor`.",
    ),
    _message(
        r"(?P<library>lib[\w.+-]+\.so[\w.]*): cannot open shared object file",
        ToolchainError,
        "library-missing",
        "The shared library {library} is missing.",
        "Use the pinned container (--container), where all libraries of one release are together.",
    ),
    _message(
        r"ModuleNotFoundError: No module named '(?P<module>[\w.]+)'",
        ToolchainError,
        "library-missing",
        "The Python module {module} is missing.",
        "Use the pinned container (--container), where all libraries of one release are together.",
    ),
    _message(
        r"CUDA out of memory|OutOfMemory \(|cudaErrorMemoryAllocation|CUDA (?:runtime )?error.*out of memory"
        r"|Requested amount of GPU memory .* could not be allocated|CUDA_ERROR_OUT_OF_MEMORY",
        DoesNotFit,
        "gpu-out-of-memory",
        "The GPU ran out of memory.",
        f"Stop other programs on the card. {_SMALLER}",
    ),
    _message(
        r"std::bad_alloc|^MemoryError|Cannot allocate memory|BrokenProcessPool|terminated abruptly",
        DoesNotFit,
        "host-out-of-memory",
        "The host ran out of memory.",
        "Stop other programs, set build.workers to 1, or take a machine with more memory.",
    ),
    _message(
        r"[Cc]ould not find any implementation for node",
        ChildFailed,
        "no-tactic",
        "TensorRT found no kernel that computes a part of the model within the memory left.",
        _SMALLER,
    ),
    _message(
        r"Required but not provided tensors: ?\{?'?(?P<tensor>[\w.]+)?",
        IntegrityError,
        "checkpoint-lacks-tensors",
        "The checkpoint lacks tensors that TensorRT-LLM needs.",
        "Check it with `nemobuild verify CHECKPOINT --against SOURCE`.",
    ),
    _message(
        r"Unsupported model architecture: (?P<name>\w+)",
        ToolchainError,
        "architecture-unknown",
        "This TensorRT-LLM does not know the architecture {name}.",
        "Use the pinned container (--container).",
    ),
    _message(
        r"got an unexpected keyword argument '(?P<key>\w+)'",
        ToolchainError,
        "config-key-unknown",
        "This TensorRT-LLM does not know the key {key} of the checkpoint's config.json.",
        "Use the pinned container (--container), or convert the weights again with this nemobuild.",
    ),
    _message(
        r"error: (?:unrecognized arguments: (?P<flag>\S+)|argument (?P<other>\S+): (?:invalid|expected).*)",
        UsageError,
        "flag-unknown",
        "This trtllm-build does not take the flags of the pinned version.",
        "Use the pinned container (--container), or set machine.container to the one that is here.",
    ),
    _message(
        r"NCCL (?:error|failure)|ncclSystemError|ncclUnhandledCudaError",
        ChildFailed,
        "nccl",
        "The GPUs could not talk to each other (NCCL).",
        "See `nemobuild doctor`; NCCL_P2P_DISABLE=1 helps where cards have no direct link.",
    ),
    _message(
        r"insufficient shared memory|Bus error",
        ToolchainError,
        "shared-memory-too-small",
        "Shared memory (/dev/shm) is too small.",
        "Start the container with --shm-size=2g or more.",
    ),
)


def explain(text: str) -> NemobuildError | None:
    """The error that ``text`` tells of, its ``why`` the line that says so; ``None`` when nothing in it is known."""
    for message in MESSAGES:
        for found in deque(message.pattern.finditer(text), maxlen=1):  # the last: a traceback shows the code first
            names = {name: value or "?" for name, value in found.groupdict().items()}
            line = text[text.rfind("\n", 0, found.start()) + 1 :].split("\n", 1)[0].strip()
            return message.kind(
                message.code, message.what.format(**names), why=f"It said: {_cut(line)}", next=message.next
            )
    return None


def tail(log: Path) -> str:
    """The end of a log as text; empty when there is none."""
    try:
        with log.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _LOG_TAIL_BYTES))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""


def last_lines(text: str) -> str:
    """The last lines of a log in one: all that can be said of an end that is not known."""
    lines = deque((line.strip() for line in text.splitlines() if line.strip()), maxlen=_LINES_SHOWN)
    return " / ".join(_cut(line) for line in lines)


def _cut(line: str) -> str:
    return line if len(line) <= 300 else f"{line[:300]}..."
