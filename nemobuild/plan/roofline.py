"""How fast a plan can be at best: what the card's bandwidth and arithmetic allow, and no server can pass.

A step of the decoder reads every weight once for all its requests, and the KV cache of each; a prompt is bound by
arithmetic. Nothing of a real server is in here (launches, sampling, network, the ranks waiting for one another), so the
numbers are ceilings, to compare limits and cards with, and never a forecast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemobuild.model.spec import Attention, ModelSpec
from nemobuild.plan.gpus import Gpu
from nemobuild.plan.memory import Shape, attention_values, ffn_values, kv_bytes_per_token, linear_values

_BF16 = 2


@dataclass(frozen=True, slots=True)
class DecodeCeiling:
    """``requests`` generating at once, each with ``context_tokens`` in the cache."""

    requests: int
    context_tokens: int
    tokens_per_s: float
    tokens_per_s_per_request: float
    bound: str


def decode_ceiling(
    spec: ModelSpec, stages: Sequence[Shape], gpu: Gpu, requests: int, context_tokens: int
) -> DecodeCeiling:
    """Tokens per second of all requests, and of each.

    Per stage the time of a step is the larger of bytes / bandwidth and operations / FLOP/s. A pipeline of p stages
    works on up to p groups of requests in turn: a round takes the sum over the stages, or once per group the slowest
    if that is longer. Every group reads the weights again, so more are not always faster; the best number counts.
    Nemotron-Super in FP8, one request: 49.9 GB / 3.35 TB/s is 67 tokens/s on an H100, 96 on an H200.
    """
    rounds = []
    for groups in range(1, min(requests, len(stages)) + 1):
        times = [_step_seconds(spec, shape, gpu, requests / groups, context_tokens) for shape in stages]
        slowest_s, bound = max(times)
        rounds.append((max(sum(seconds for seconds, _ in times), groups * slowest_s), bound))
    round_s, bound = min(rounds)
    return DecodeCeiling(requests, context_tokens, requests / round_s, 1 / round_s, bound)


def _step_seconds(spec: ModelSpec, shape: Shape, gpu: Gpu, requests: float, context_tokens: int) -> tuple[float, str]:
    matrices, head = _values(spec, shape)
    read_bytes = matrices * (1 if shape.fp8 else _BF16) + head * _BF16
    cache_bytes = kv_bytes_per_token(spec, shape.blocks, shape.tensor_parallel, shape.fp8_kv)
    memory_s = (read_bytes + requests * context_tokens * cache_bytes) / gpu.bandwidth_bytes_per_s
    compute_s = _matrix_seconds(shape, gpu, matrices, head, requests)
    compute_s += requests * _attention_flops(spec, shape) * context_tokens / gpu.bf16_flops
    return max((memory_s, "bandwidth"), (compute_s, "arithmetic"))


def prefill_ceiling(spec: ModelSpec, stages: Sequence[Shape], gpu: Gpu, tokens: int) -> float:
    """Prompt tokens per second for one prompt of ``tokens``.

    Two operations a weight, and 4 x query width x tokens / 2 for attention to what came before.
    Nemotron-Super in FP8: 95.5 GFLOP a token, so at most 20,700 tokens/s at 1,979 TFLOP/s.
    """
    seconds = 0.0
    for shape in stages:
        matrices, head = _values(spec, shape)
        # Only the last token needs the head.
        work_s = _matrix_seconds(shape, gpu, matrices, 0, tokens) + 2 * head / gpu.bf16_flops
        seconds = max(seconds, work_s + tokens * _attention_flops(spec, shape) * tokens / 2 / gpu.bf16_flops)
    return tokens / seconds


def _values(spec: ModelSpec, shape: Shape) -> tuple[int, int]:
    """Weights of the decoder's matrices and of lm_head on one rank of a stage."""
    tp = shape.tensor_parallel
    blocks = [spec.blocks[i] for i in shape.blocks]
    matrices = sum(attention_values(spec, b, tp) + ffn_values(spec, b, tp) + linear_values(spec, b, tp) for b in blocks)
    return matrices, spec.vocab_size * spec.hidden_size // tp * shape.last


def _matrix_seconds(shape: Shape, gpu: Gpu, matrices: int, head: int, tokens: float) -> float:
    flops = gpu.fp8_flops if shape.fp8 and gpu.fp8_flops else gpu.bf16_flops
    return tokens * (2 * matrices / flops + 2 * head / gpu.bf16_flops)


def _attention_flops(spec: ModelSpec, shape: Shape) -> int:
    """Operations of one token for each token it attends to: 4 x query width an attention block."""
    blocks = sum(isinstance(spec.blocks[i].attention, Attention) for i in shape.blocks)
    return 4 * spec.query_width // shape.tensor_parallel * blocks
