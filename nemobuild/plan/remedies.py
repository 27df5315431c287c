"""What to change when a plan does not fit, each tried by planning it.

The order is that of the cost: precision that the model was proved in, then shorter contexts, more or larger cards, and
last what makes every token slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from nemobuild.config import EngineConfig
from nemobuild.errors import NemobuildError
from nemobuild.plan.gpus import gpus, load_gpu
from nemobuild.plan.planner import Plan, Remedy, check_limits, solve
from nemobuild.units import format_bytes

Change = dict[str, Any]


def remedies(plan: Plan, profile: EngineConfig) -> tuple[Remedy, ...]:
    """Those that make it fit, in the order of what they cost, and then those that only help."""
    found = []
    for title, change in _changes(plan, profile):
        made = _changed(plan, profile, change)
        if made is not None:
            text = ", ".join(f"{field}: {_yaml(value)}" for field, value in change.items())
            found.append(Remedy(title + _streamed(made), text, made.fits, made.headroom_bytes))
    helps = [r for r in found if not r.fits and r.headroom_bytes > plan.headroom_bytes]
    return tuple([r for r in found if r.fits] + sorted(helps, key=lambda r: -r.headroom_bytes))


def _changes(plan: Plan, profile: EngineConfig) -> Iterator[tuple[str, Change]]:
    """Titles, and fields of the profile with their new values."""
    checkpoint, limits = profile.checkpoint, profile.limits
    assert plan.gpu is not None and profile.machine is not None
    eight_bits: Change = {"checkpoint.precision": "fp8", "checkpoint.kv_cache": "fp8"}
    if plan.gpu.fp8 and checkpoint.precision == "bf16":
        yield "FP8 weights", {"checkpoint.precision": "fp8"}
        yield "FP8 weights and KV cache", eight_bits
    elif plan.gpu.fp8 and checkpoint.kv_cache == "bf16":
        yield "FP8 KV cache", {"checkpoint.kv_cache": "fp8"}
    if limits.max_batch_size is not None:
        yield from _halved("fewer requests at once", "limits.max_batch_size", limits.max_batch_size, plan, profile)
    if limits.kv_cache_tokens is None:
        yield from _halved("shorter context", "limits.max_context_tokens", limits.max_context_tokens, plan, profile)
    if limits.min_tokens_per_second is not None:
        yield "no bound on speed", {"limits.min_tokens_per_second": None}
    tp, pp = checkpoint.tensor_parallel, checkpoint.pipeline_parallel
    for times in (2, 4, 8):
        change = {"checkpoint.tensor_parallel": tp * times, "machine.count": tp * times * pp}
        if _fits(plan, profile, change):
            yield f"{tp * times * pp} of these GPUs", change
            break
    for gpu in gpus():
        larger = gpu.memory_bytes > plan.gpu.memory_bytes or gpu.bandwidth_bytes_per_s > plan.gpu.bandwidth_bytes_per_s
        if larger and _fits(plan, profile, {"machine.gpu": gpu.name}):
            yield gpu.title, {"machine.gpu": gpu.name}
            break
    if profile.runtime == "tensorrt" and not profile.build.weight_streaming:
        yield "weight streaming", {"build.weight_streaming": True, "build.gemm_plugin": "disable"}


def _halved(title: str, field: str, value: int, plan: Plan, profile: EngineConfig) -> Iterator[tuple[str, Change]]:
    """The first that fits of ``value`` halved again and again; the last that is allowed when none does."""
    last: Change | None = None
    while value > 1:
        value //= 2
        change = {field: value}
        tried = _changed(plan, profile, change)
        if tried is None:
            break
        last = change
        if tried.fits:
            break
    if last is not None:
        yield title, last


def _fits(plan: Plan, profile: EngineConfig, change: Change) -> bool:
    made = _changed(plan, profile, change)
    return made is not None and made.fits


def _changed(plan: Plan, profile: EngineConfig, change: Change) -> Plan | None:
    """The plan after ``change``; None where the model, the card or the profile's other limits do not allow it."""
    data = profile.model_dump()
    for field, value in change.items():
        section, name = field.split(".")
        data[section][name] = value
    try:
        changed = EngineConfig.model_validate(data)
        check_limits(plan.spec, changed)
        gpu = load_gpu(change["machine.gpu"]) if "machine.gpu" in change else plan.gpu
        assert gpu is not None
        return solve(plan.spec, changed, gpu, plan.name)
    except (ValidationError, NemobuildError):
        return None


def _streamed(plan: Plan) -> str:
    host_bytes = -sum(line.bytes for line in plan.ranks[0].lines if line.bytes < 0)
    return f"; every step then reads {format_bytes(host_bytes)} over PCIe" if host_bytes else ""


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
