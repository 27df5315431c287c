"""What every stage needs of the host: peak memory and disk. All of it is a bound or an estimate, rounded up.

The stages state their own numbers again, from the files at hand, before they start; these are for choosing a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemobuild.config import EngineConfig
from nemobuild.model.spec import Mlp, ModelSpec
from nemobuild.plan.memory import Label, attention_values, ffn_values, linear_values

_BF16 = 2
_FETCH_MEMORY_BYTES = 512 << 20
# The converter streams: interpreter, and up to eight workers with their buffers, whatever the model.
_CONVERT_MEMORY_BYTES = 256 << 20
# Calibration on the CPU: what each of at most 32 threads holds beside the arrays of its batch (``convert.calibrate``).
_THREADS, _BATCH_TOKENS, _LEAST_BATCH_BYTES, _THREAD_BYTES, _SCORE_ROWS = 32, 64, 16 << 20, 28 << 20, 256
_DEFAULT_SAMPLES = 256  # more than the texts that ship
# trtllm-build: PyTorch, TensorRT and the builder's tactics beside the weights.
_BUILDER_MEMORY_BYTES = 8 << 30
_SERVER_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class StageNeed:
    """``disk_bytes`` is what the stage leaves behind, and needs at its peak."""

    stage: str
    memory_bytes: int
    disk_bytes: int
    label: Label
    formula: str


def host_needs(spec: ModelSpec, profile: EngineConfig, rank_weight_bytes: Sequence[int]) -> tuple[StageNeed, ...]:
    """Needs of fetch, checkpoint, engine (``tensorrt`` only) and serve; ``rank_weight_bytes`` are those on the GPUs.

    Nemotron-Super to FP8: the snapshot takes 92.88 GiB of disk, the checkpoint 48.40 GiB, the engine as much again.
    """
    source_bytes, target_bytes = _BF16 * spec.parameter_count, sum(rank_weight_bytes)
    needs = [StageNeed("fetch", _FETCH_MEMORY_BYTES, source_bytes, "bound", "weights in BF16")]
    fp8 = profile.checkpoint.precision == "fp8"
    if fp8:
        calibration = profile.checkpoint.calibration
        tokens = (calibration.samples or _DEFAULT_SAMPLES) * calibration.tokens_per_sample
        needs.append(
            StageNeed(
                "checkpoint",
                _CONVERT_MEMORY_BYTES + calibration_bytes(spec, calibration.tokens_per_sample),
                target_bytes + 2 * tokens * spec.hidden_size * 4,
                "bound",
                "the widest block, batches of 32 threads (fewer cores, less); on disk also what calibration keeps",
            )
        )
    elif profile.checkpoint.format == "trtllm":
        needs.append(StageNeed("checkpoint", _CONVERT_MEMORY_BYTES, target_bytes, "bound", "streamed"))
    if profile.runtime == "tensorrt":
        at_once = sum(sorted(rank_weight_bytes)[-profile.build.workers :])
        needs.append(
            StageNeed(
                "engine",
                _BUILDER_MEMORY_BYTES + 2 * at_once,
                target_bytes,
                "estimate",
                "weights of the ranks built at once, and their serialised engines",
            )
        )
    if profile.runtime != "cpu":
        memory = _SERVER_MEMORY_BYTES + max(rank_weight_bytes)
        needs.append(StageNeed("serve", memory, 0, "estimate", "weights of one rank while it loads"))
    return tuple(needs)


def calibration_bytes(spec: ModelSpec, sample_tokens: int) -> int:
    """Memory of a calibration on 32 cores or more.

    The widest block in BF16, and for each thread the float32 arrays of a batch of 64 tokens, attention scores and the
    KV cache of a sample.

    Nemotron-Super with samples of 512 tokens: 1.59 GiB and 32 x 137 MiB; on two cores 0.7 GiB beside the block.
    """
    widest = max((b.ffn.width for b in spec.blocks if isinstance(b.ffn, Mlp)), default=0)
    kv_width = max(spec.kv_heads_per_block) * spec.head_size
    attention = 6 * (spec.query_width + kv_width) + kv_width if kv_width else 0
    per_token = 4 * (3 * spec.hidden_size + max(5 * widest, attention, spec.hidden_size))
    scores = 2 * 4 * spec.query_heads * min(_SCORE_ROWS, sample_tokens) * sample_tokens
    thread_bytes = max(_BATCH_TOKENS * per_token, _LEAST_BATCH_BYTES) + scores + 8 * kv_width * sample_tokens
    block_bytes = _BF16 * max(
        attention_values(spec, b, 1) + ffn_values(spec, b, 1) + linear_values(spec, b, 1) for b in spec.blocks
    )
    return block_bytes + _THREADS * (thread_bytes + _THREAD_BYTES)
