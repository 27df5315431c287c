"""A plan for people and for programs: sections of rows, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemobuild.errors import DoesNotFit
from nemobuild.plan.planner import Plan
from nemobuild.plan.roofline import DecodeCeiling, decode_ceiling, prefill_ceiling
from nemobuild.units import format_bytes, format_count

_BAR_COLUMNS = 30


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def verdict(plan: Plan) -> str:
    """One or two sentences."""
    return f"{heading(plan)} {outcome(plan)}"


def does_not_fit(plan: Plan) -> DoesNotFit:
    """What is missing, and the remedy that costs the least."""
    return DoesNotFit(
        "does-not-fit",
        f"{plan.name} does not fit.",
        why=" ".join(plan.shortfalls),
        next=f"The first remedy: {plan.remedies[0].change}." if plan.remedies else "Take a larger card.",
    )


def heading(plan: Plan) -> str:
    """Which profile where, up to the verb."""
    if plan.gpu is None or plan.toolchain is None:
        return f"{plan.name} on the CPU"
    count = f"{len(plan.ranks)} x " if len(plan.ranks) > 1 else ""
    return f"{plan.name} on {count}{plan.gpu.title} ({plan.profile.runtime}, TensorRT-LLM {plan.toolchain.trtllm})"


def outcome(plan: Plan) -> str:
    """What is to be said of ``heading``."""
    if not plan.fits:
        return f"does not fit. {' '.join(plan.shortfalls)}"
    if plan.gpu is None:
        return f"needs {format_bytes(plan.ranks[0].total_bytes)} of memory."
    if plan.weights_on_gpu < 1:
        return f"fits with {1 - plan.weights_on_gpu:.0%} of the decoder's weights on the host: slow."
    each = "" if len(plan.ranks) == 1 else " on every GPU"
    return f"fits, {format_bytes(plan.headroom_bytes)} beyond the least{each}."


def sections(plan: Plan, *, explain: bool = False) -> Iterator[Section]:
    """What to show below the verdict, most asked first."""
    for title, rank in _ledgers(plan):
        lines: list[tuple[str, ...]] = [
            (line.name, format_bytes(line.bytes), f"{line.bytes / rank.budget_bytes:.1%}", line.label, line.formula)
            for line in rank.lines
        ]
        total = f"of {format_bytes(rank.budget_bytes)}" if plan.gpu else ""
        lines.append(("all", format_bytes(rank.total_bytes), f"{rank.total_bytes / rank.budget_bytes:.1%}", "", total))
        yield Section(title, ("memory", "size", "share", "is", "how"), lines)
    rows: list[tuple[str, ...]]
    if plan.remedies:
        rows = [(r.title, _spare(r.headroom_bytes), r.change) for r in plan.remedies]
        yield Section("What would help, the cheapest first", ("remedy", "then", "in the profile"), rows)
    if explain:
        rows = [(e.name, f"{_number(e.value)} {e.unit}".strip(), e.origin, e.why) for e in plan.limits_explained]
        yield Section("Limits", ("limit", "value", "from", "why"), rows)
    elif plan.fits:
        yield Section("Limits", (), _limits(plan))
    if plan.concurrency:
        rows = [(format_count(tokens), format_count(count)) for tokens, count in plan.concurrency.items()]
        yield Section("Requests that the KV cache holds", ("context", "requests"), rows)
    if plan.fits and plan.gpu is not None and plan.weights_on_gpu == 1:
        ceilings = decode(plan)
        most = max(c.tokens_per_s for c in ceilings)
        rows = [
            (
                str(c.requests),
                f"{c.tokens_per_s:,.0f}",
                f"{c.tokens_per_s_per_request:,.1f}",
                c.bound,
                "█" * max(1, round(_BAR_COLUMNS * c.tokens_per_s / most)),
            )
            for c in ceilings
        ]
        title = f"Ceilings of generation at {format_count(_usual(plan))} tokens each (not forecasts)"
        yield Section(title, ("requests", "tokens/s", "per request", "bound by", ""), rows)
        rows = [(format_count(n), f"{speed:,.0f}", f"{n / speed:.2f} s") for n, speed in prefill(plan)]
        yield Section("Ceilings of reading a prompt", ("tokens", "tokens/s", "time"), rows)
    rows = [
        (need.stage, format_bytes(need.memory_bytes), format_bytes(need.disk_bytes), need.label, need.formula)
        for need in plan.host
    ]
    yield Section("The host needs, at each stage", ("stage", "memory", "disk", "is", "how"), rows)
    if plan.notes:
        yield Section("Notes", (), [(note,) for note in plan.notes])


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in bytes, tokens and seconds."""
    return {
        "name": plan.name,
        "fits": plan.fits,
        "verdict": verdict(plan),
        "headroom_bytes": plan.headroom_bytes,
        "shortfalls": list(plan.shortfalls),
        "runtime": plan.profile.runtime,
        "gpu": None if plan.gpu is None else asdict(plan.gpu),
        "toolchain": None if plan.toolchain is None else asdict(plan.toolchain),
        "limits": [asdict(limit) for limit in plan.limits_explained],
        "kv_cache_tokens": plan.kv_cache_tokens,
        "weights_on_gpu": plan.weights_on_gpu,
        "ranks": [
            {
                "rank": rank.rank,
                "stage": rank.stage,
                "blocks": [rank.blocks.start, rank.blocks.stop],
                "kv_bytes_per_token": rank.kv_bytes_per_token,
                "budget_bytes": rank.budget_bytes,
                "needed_bytes": rank.needed_bytes,
                "weight_bytes": rank.weight_bytes,
                "total_bytes": rank.total_bytes,
                "lines": [asdict(line) for line in rank.lines],
            }
            for rank in plan.ranks
        ],
        "concurrency": {str(tokens): count for tokens, count in plan.concurrency.items()},
        "decode_ceilings": [asdict(c) for c in decode(plan)],
        "prefill_ceilings": [{"tokens": tokens, "tokens_per_s": speed} for tokens, speed in prefill(plan)],
        "host": [asdict(need) for need in plan.host],
        "remedies": [asdict(remedy) for remedy in plan.remedies],
        "notes": list(plan.notes),
    }


def decode(plan: Plan) -> list[DecodeCeiling]:
    """Ceilings for 1, 2, 4 ... requests, up to the batch size; none without a GPU or with streamed weights."""
    if plan.gpu is None or plan.weights_on_gpu < 1:
        return []
    counts = sorted({1 << k for k in range(plan.max_batch_size.bit_length())} | {plan.max_batch_size})
    return [decode_ceiling(plan.spec, plan.shapes, plan.gpu, count, _usual(plan)) for count in counts]


def prefill(plan: Plan) -> list[tuple[int, float]]:
    if plan.gpu is None or plan.weights_on_gpu < 1:
        return []
    longest = plan.profile.limits.prompt_limit
    return [(n, prefill_ceiling(plan.spec, plan.shapes, plan.gpu, n)) for n in sorted({min(2048, longest), longest})]


def _usual(plan: Plan) -> int:
    return plan.profile.limits.request_tokens


def _ledgers(plan: Plan) -> Iterator[tuple[str, Any]]:
    """One ledger for all ranks of a stage: they are equal."""
    tp = plan.profile.checkpoint.tensor_parallel
    for rank in plan.ranks[::tp]:
        if len(plan.ranks) == 1:
            yield "", rank
            continue
        ranks = f"GPU {rank.rank}" if tp == 1 else f"GPUs {rank.rank} to {rank.rank + tp - 1}, each"
        yield f"{ranks} (blocks {rank.blocks.start} to {rank.blocks.stop - 1})", rank


def _limits(plan: Plan) -> list[tuple[str, ...]]:
    names = """limits.max_context_tokens limits.max_batch_size build.max_num_tokens limits.kv_cache_tokens
    build.kv_cache_fraction"""
    found = {e.name: e for e in plan.limits_explained}
    rows = [found[name] for name in names.split() if name in found]
    return [(e.name.split(".")[1], f"{_number(e.value)} {e.unit}".strip(), e.why) for e in rows]


def _number(value: float) -> str:
    return format_count(value) if isinstance(value, int) else f"{value:g}"


def _spare(headroom_bytes: int) -> str:
    return (
        f"{format_bytes(headroom_bytes)} to spare"
        if headroom_bytes >= 0
        else f"{format_bytes(-headroom_bytes)} missing"
    )
