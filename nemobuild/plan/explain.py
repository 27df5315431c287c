"""What a plan says in words: where each limit comes from, and what to know of this model on this card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemobuild.config import EngineConfig
from nemobuild.model.parallel import balanced_ranges
from nemobuild.model.spec import ModelSpec
from nemobuild.plan import memory
from nemobuild.plan.gpus import Gpu
from nemobuild.plan.toolchain import Toolchain

# Of the PyTorch runtime: up to this line it uses the checkpoint's KV scales for NVFP4 only.
_LAST_UNSCALED_KV = (1, 2)
# Section -> field -> (unit, what it is): every limit that there is.
EXPLAINED = {
    "limits": {
        "max_context_tokens": ("tokens", "prompt, thinking and answer of one request (max_seq_len)"),
        "max_prompt_tokens": ("tokens", "all but one of the context, unless set"),
        "thinking_tokens": ("tokens", "expected for thinking"),
        "default_max_tokens": ("tokens", "the answer when a request names no bound"),
        "expected_prompt_tokens": ("tokens", "the usual prompt"),
        "max_batch_size": ("requests", "generate at once"),
        "max_queue_size": ("requests", "may wait"),
        "kv_cache_tokens": ("tokens", "KV cache over all requests"),
        "max_request_bytes": ("bytes", "of one text field"),
        "min_tokens_per_second": ("tokens/s", "the slowest stream to accept"),
    },
    "build": {
        "max_num_tokens": ("tokens", "in one step over all requests"),
        "kv_cache_fraction": ("", "of the memory free after loading, for the KV cache"),
    },
}


@dataclass(frozen=True, slots=True)
class Explained:
    """A limit, where it comes from (``profile``, ``default`` or ``derived``), and why it has this value."""

    name: str
    value: float
    unit: str
    origin: str
    why: str


def notes(
    spec: ModelSpec, profile: EngineConfig, gpu: Gpu, toolchain: Toolchain, stages: Sequence[range]
) -> Iterator[str]:
    yield from _split_notes(spec, profile, stages)
    checkpoint = profile.checkpoint
    if profile.runtime == "tensorrt" and checkpoint.precision == "fp8" and checkpoint.kv_cache == "bf16":
        yield "With FP8 weights and a BF16 KV cache, paged context attention runs in BF16 (trtllm-build's rule)."
    if profile.runtime == "llmapi" and checkpoint.kv_cache == "fp8" and toolchain.line <= _LAST_UNSCALED_KV:
        yield f"TensorRT-LLM {toolchain.trtllm} keeps FP8 keys and values with scale 1.0; measured scales are not used."
    if checkpoint.tensor_parallel > min(filter(None, spec.kv_heads_per_block), default=1 << 20):
        yield "More ranks than KV heads: heads are repeated, so the KV cache per rank shrinks no further."
    yield from (note if note.endswith(".") else f"{note}." for note in gpu.notes)


def _split_notes(spec: ModelSpec, profile: EngineConfig, stages: Sequence[range]) -> Iterator[str]:
    """What an even cut of uneven blocks does, and the better cut where there is one."""
    if len(stages) == 1:
        return
    work = memory.block_work(spec, profile)
    sums = [sum(work[i] for i in blocks) for blocks in stages]
    for stage, blocks in enumerate(stages):
        if not any(spec.kv_heads_per_block[i] for i in blocks):
            yield f"Stage {stage} (blocks {blocks[0]} to {blocks[-1]}) has no attention, and so no KV cache."
    if max(sums) < 1.2 * min(sums):
        return
    most, least = sums.index(max(sums)), sums.index(min(sums))
    cut = balanced_ranges(work, len(stages))
    better = max(sum(work[i] for i in blocks) for blocks in cut)
    times = f"{max(sums) / min(sums):.1f} times the work of stage {least}" if min(sums) else f"work, stage {least} none"
    yield f"Stage {most} has {times}; the others wait for it."
    if better < 0.98 * max(sums):
        sizes = " + ".join(str(len(blocks)) for blocks in cut)
        gain = f"A cut of {sizes} blocks would take {1 - better / max(sums):.0%} off the slowest stage"
        yield (
            f"{gain}: set build.pipeline_split to balanced."
            if profile.runtime == "llmapi"
            else f"{gain}, but trtllm-build cuts into equal counts only: use tensor parallelism, or the runtime llmapi."
        )


def explain(profile: EngineConfig, resolved: EngineConfig, why: Mapping[str, str]) -> tuple[Explained, ...]:
    """Every limit with its origin; a limit that the profile leaves open and the planner does not touch is a default."""
    found = []
    for section, names in EXPLAINED.items():
        before, after = getattr(profile, section), getattr(resolved, section)
        for name, (unit, meaning) in names.items():
            full = f"{section}.{name}"
            value = getattr(after, name)
            if value is None:
                continue
            if name in before.model_fields_set and getattr(before, name) is not None:
                origin, reason = "profile", meaning
            elif full in why:
                origin, reason = "derived", why[full]
            else:
                origin, reason = "default", meaning
            found.append(Explained(full, value, unit, origin, reason))
    return tuple(found)
