"""Drive ``trtllm-build``: the exact command for a plan, checked before it runs, and an engine read back afterwards.

The engine grows in a hidden folder and takes its place whole, with a manifest of what it was built from and with. It
carries TensorRT's timing cache along: given to the next build, that cuts most of the time, and makes it choose the
same kernels. What a failed build had timed until then is kept beside the engine for the next attempt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nemobuild.engine import foreign, process
from nemobuild.engine.builder import Builder
from nemobuild.engine.container import Mount
from nemobuild.engine.flags import TOOL, check_flags
from nemobuild.engine.readback import check_engine, engine_files
from nemobuild.errors import ChildFailed, DoesNotFit, NemobuildError, ToolchainError, from_os_error
from nemobuild.folders import check_free, partial_of, replace_folder
from nemobuild.nvml import read_nvidia
from nemobuild.plan.build_rules import Target
from nemobuild.plan.planner import Plan
from nemobuild.units import format_bytes, format_seconds

TIMING_CACHE = "timing.cache"
MANIFEST = "manifest.json"
# Flags that say where and how an engine is built, and not what it is.
_NOT_INPUTS = ("checkpoint_dir", "output_dir", "input_timing_cache", "output_timing_cache", "workers")


@dataclass(frozen=True, slots=True)
class Report:
    """What a build did and took. ``peak_gpu_bytes`` is None where the GPUs' memory could not be read."""

    engine: Path
    key: str
    files: dict[str, int]
    elapsed_s: float
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    log: Path


def build_command(plan: Plan, checkpoint: Path, engine: Path) -> list[str]:
    """The ``trtllm-build`` line for ``plan``: every limit that the plan set, and nothing left to a default that moves.

    The timing cache in ``engine`` is read, if there is one, and written.
    """
    profile, target = plan.profile, target_of(plan)
    fp8_attention = "enable" if target.fp8 and target.fp8_kv else "disable"
    flags: dict[str, object] = {
        "checkpoint_dir": checkpoint.absolute(),
        "output_dir": engine.absolute(),
        "max_batch_size": profile.limits.max_batch_size,
        "max_num_tokens": profile.build.max_num_tokens,
        "max_seq_len": profile.limits.max_context_tokens,
        "max_beam_width": 1,
        "kv_cache_type": "paged",
        "tokens_per_block": 32,
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": "enable",
        "use_fp8_context_fmha": fp8_attention,
        "gemm_plugin": profile.build.gemm_plugin,
        "multiple_profiles": "enable" if profile.build.multiple_profiles else "disable",
        "workers": profile.build.workers,
        "input_timing_cache": engine.absolute() / TIMING_CACHE,
        "output_timing_cache": engine.absolute() / TIMING_CACHE,
    }
    argv = [TOOL]
    for name, value in flags.items():
        argv += [f"--{name}", str(value)]
    return [*argv, "--weight_streaming"] if profile.build.weight_streaming else argv


def target_of(plan: Plan) -> Target:
    """The facts of ``plan`` that ``trtllm-build``'s flags depend on."""
    assert plan.gpu is not None and plan.toolchain is not None, "profiles of runtime tensorrt have a machine"
    form = plan.profile.checkpoint
    return Target(form.precision == "fp8", form.kv_cache == "fp8", form.ranks, plan.gpu.sm, plan.toolchain.trtllm)


def engine_inputs(plan: Plan, checkpoint_key: str | None, timing_cache: Path | None) -> dict[str, object]:
    """All that an engine depends on, by name; equal inputs give an engine of equal limits for the same machine.

    Checks the flags on the way, so a contradiction is told before there is a checkpoint. Raises as ``check_flags``.
    """
    target = target_of(plan)
    argv = build_command(plan, Path("checkpoint"), Path("engine"))
    flags = check_flags(argv, target)
    assert plan.gpu is not None and plan.toolchain is not None
    return {
        "checkpoint": checkpoint_key,
        **{name: value for name, value in flags.items() if f"--{name}" in argv and name not in _NOT_INPUTS},
        "gpu": plan.gpu.name,
        "sm": f"{target.sm[0]}.{target.sm[1]}",
        "trtllm": plan.toolchain.trtllm,
        "tensorrt": plan.toolchain.tensorrt,
        "timing_cache": "none" if timing_cache is None else _digest(timing_cache),
    }


def build(
    plan: Plan,
    checkpoint: Path,
    engine: Path,
    *,
    builder: Builder,
    checkpoint_key: str | None,
    log: Path,
    timing_cache: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Report:
    """Build the folder ``engine`` from ``checkpoint``, in place of what may be there.

    ``timing_cache`` is one of an earlier build. Raises ``UsageError`` (flags), ``DoesNotFit`` (memory, disk),
    ``ToolchainError`` (what is installed), ``ChildFailed``, and ``VerificationFailed`` when the engine has other limits
    than the plan. Then nothing is left but the log, and TensorRT's timings.
    """
    inputs = engine_inputs(plan, checkpoint_key, timing_cache)
    partial = partial_of(engine)
    argv = build_command(plan, checkpoint, partial)
    target = target_of(plan)
    flags = check_flags(argv, target)
    kept = kept_timing_cache(engine)
    check_free(engine.parent, sum(need.disk_bytes for need in plan.host if need.stage == "engine"), "the engine")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # an engine cannot be gone on with
        partial.mkdir(parents=True)
        if timing_cache is not None:
            shutil.copyfile(timing_cache, partial / TIMING_CACHE)
        finished = _run(argv, builder, checkpoint, partial, plan.profile.build.timeout_s, log, on_line)
        if not finished.killed and not finished.timed_out and _size(partial / TIMING_CACHE):
            os.replace(partial / TIMING_CACHE, kept)
        if failure := _failure(finished, log, plan):
            raise failure
        if kept.exists():
            os.replace(kept, partial / TIMING_CACHE)
        form = plan.profile.checkpoint
        check_engine(partial, flags, target, (form.tensor_parallel, form.pipeline_parallel))
        names = ("config.json", *engine_files(target.ranks))
        sizes = {name: (partial / name).stat().st_size for name in names}
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        manifest = {"kind": "engine", "key": key, "inputs": inputs, **asdict(builder.built_with)}
        manifest |= {"measured": asdict(finished), "files": sizes}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        replace_folder(partial, engine)
    except OSError as error:
        raise from_os_error(error, engine, "building") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Report(engine, key, sizes, finished.elapsed_s, finished.peak_memory_bytes, finished.peak_gpu_bytes, log)


def kept_timing_cache(engine: Path) -> Path:
    """Where the timings of a failed build are kept for the next attempt."""
    return engine.with_name(f"{engine.name}.{TIMING_CACHE}")


def known_timing_cache(engine: Path) -> Path | None:
    """The newest timing cache: that of a failed build, or of the engine that is there."""
    return next((path for path in (kept_timing_cache(engine), engine / TIMING_CACHE) if _size(path)), None)


def _run(
    argv: list[str],
    builder: Builder,
    checkpoint: Path,
    partial: Path,
    timeout_s: float,
    log: Path,
    on_line: Callable[[str], None] | None,
) -> process.Finished:
    name = f"nemobuild-{uuid.uuid4().hex[:12]}"
    container_id = partial.with_name(f"{partial.name}.container")
    container_id.unlink(missing_ok=True)
    mounts = (Mount(checkpoint), Mount(partial, writable=True))
    try:
        return process.run(
            builder.line(argv, mounts, name, container_id),
            log=log,
            timeout_s=timeout_s,
            env=os.environ | dict(builder.environment()),
            on_line=on_line,
            gpu_bytes=lambda: _gpu_bytes(builder.gpus),
            container_id=container_id if builder.container else None,
            stop=["docker", "stop", "-t", "5", name] if builder.container else None,
        )
    finally:
        container_id.unlink(missing_ok=True)


def _gpu_bytes(indices: tuple[int, ...]) -> int | None:
    try:
        return sum(gpu.memory_used_bytes for gpu in read_nvidia().gpus if gpu.index in indices)
    except ToolchainError:
        return None


def _failure(finished: process.Finished, log: Path, plan: Plan) -> NemobuildError | None:
    """Why a build failed, as one sentence and the next thing to type; ``None`` for one that did not."""
    if finished.status == 0 and not finished.timed_out:
        return None
    peak = f"It had used {format_bytes(finished.peak_memory_bytes)} of host memory"
    peak += "." if finished.peak_gpu_bytes is None else f" and {format_bytes(finished.peak_gpu_bytes)} on the GPU."
    text = foreign.tail(log)
    last_words = f"Its last words: {foreign.last_lines(text) or 'none'}."
    if finished.timed_out:
        failure: NemobuildError = ChildFailed(
            "build-timeout",
            f"{TOOL} was stopped after {format_seconds(finished.elapsed_s)}.",
            why=f"build.timeout_s is {plan.profile.build.timeout_s}. {last_words}",
            next="Raise build.timeout_s, and run the same command again.",
        )
    elif finished.killed and finished.oom_killed:
        failure = DoesNotFit(
            "host-out-of-memory",
            f"The kernel killed {TOOL}: the host ran out of memory.",
            why=peak,
            next="Stop other programs, set build.workers to 1, or take a machine with more memory.",
        )
    elif finished.killed:
        failure = ChildFailed(
            "build-killed",
            f"{TOOL} was killed.",
            why=f"{peak} When nobody did that by hand, it was a limit on memory.",
            next="See `dmesg`; run the same command again.",
        )
    else:
        failure = foreign.explain(text) or ChildFailed(
            "build-failed",
            f"{TOOL} failed with status {finished.status}.",
            why=last_words,
        )
    failure.next = f"{failure.next} The whole log is in {log}.".strip()
    return failure


def _digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise from_os_error(error, file, "reading the timing cache") from error


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_size
    return 0
