"""The ledger: every kind of byte that an engine keeps on a GPU, per rank, each with its formula and an honest label.

``exact`` lines follow from the model alone. A ``bound`` is never exceeded. An ``estimate`` is arithmetic over what the
runtime is known to hold, or a constant taken from what such processes were seen to use; the reserve is there for them.
A formula that multiplies by the number of layers is a fault in this family: everything is summed block by block.

The functions are pure and take sizes in bytes, tokens and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from nemobuild.config import EngineConfig
from nemobuild.model.spec import Attention, Block, Linear, Mlp, ModelSpec, NoOp
from nemobuild.plan.gpus import Gpu

Label = Literal["exact", "bound", "estimate"]

TOKENS_PER_BLOCK = 32
"""The KV cache is handed out in blocks of this many tokens (default of TensorRT-LLM 1.0 to 1.2)."""
_BF16, _FLOAT32 = 2, 4
_WORK_TOKENS = 32_768
_GEMM_WORKSPACE_BYTES = 64 << 20
# Seen with nvidia-smi on Hopper: context, cuBLAS and TensorRT kernels; PyTorch brings more libraries and its allocator.
_LIBRARY_BYTES = {"tensorrt": 640 << 20, "llmapi": 1280 << 20}
_NCCL_BYTES = 512 << 20
_CUDA_GRAPH_BYTES = 1 << 30
# cudaMemGetInfo's total is below NVML's by 0.3 to 0.7 % (H100: 79.1 to 79.4 of 79.65 GiB, B200: 178.4 of 179.1).
_DRIVER_SHARE = 0.0075
_CPU_BASE_BYTES = 512 << 20
_RESERVE_SHARE, _LEAST_RESERVE_BYTES = 0.025, 768 << 20


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    bytes: int
    label: Label
    formula: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides the ledger of one rank beside the model: its share of it, the precisions, and the limits."""

    blocks: range
    first: bool
    last: bool
    tensor_parallel: int
    world: int
    fp8: bool
    fp8_kv: bool
    format: str
    runtime: str
    max_batch_size: int
    max_num_tokens: int
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class RankLedger:
    """Bytes on one GPU. ``needed_bytes`` is the least that works, ``lines`` what the chosen limits use."""

    rank: int
    stage: int
    blocks: range
    kv_bytes_per_token: int
    budget_bytes: int
    needed_bytes: int
    lines: tuple[Line, ...]

    @property
    def total_bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def weight_bytes(self) -> int:
        return sum(line.bytes for line in self.lines if line.name.endswith(WEIGHTS))


WEIGHTS = "weights"


def shapes(profile: EngineConfig, stages: Sequence[range], batch: int, tokens: int) -> list[Shape]:
    """One shape per pipeline stage; the ranks of tensor parallelism within a stage are equal."""
    checkpoint = profile.checkpoint
    return [
        Shape(
            blocks=blocks,
            first=stage == 0,
            last=stage == len(stages) - 1,
            tensor_parallel=checkpoint.tensor_parallel,
            world=checkpoint.ranks,
            fp8=checkpoint.precision == "fp8",
            fp8_kv=checkpoint.kv_cache == "fp8",
            format=checkpoint.format,
            runtime=profile.runtime,
            max_batch_size=batch,
            max_num_tokens=tokens,
            max_context_tokens=profile.limits.max_context_tokens,
        )
        for stage, blocks in enumerate(stages)
    ]


def attention_values(spec: ModelSpec, block: Block, tp: int) -> int:
    """Weights of one attention block on one of ``tp`` ranks: hidden x (2 x query width + 2 x KV width).

    KV heads are repeated where there are fewer than ranks. Nemotron-Super: 8192 x (2 x 8192 + 2 x 1024) = 150,994,944.
    """
    if not isinstance(block.attention, Attention):
        return 0
    query, kv = spec.query_width // tp, rank_kv_heads(block, tp) * spec.head_size
    return spec.hidden_size * (2 * query + 2 * kv)


def ffn_values(spec: ModelSpec, block: Block, tp: int) -> int:
    """Weights of one gated MLP on one rank: 3 x hidden x width / tp. 3 x 8192 x 28672 = 704,643,072."""
    return 3 * spec.hidden_size * block.ffn.width // tp if isinstance(block.ffn, Mlp) else 0


def linear_values(spec: ModelSpec, block: Block, tp: int) -> int:
    """Weights of the square maps that stand for attention or FFN on one rank: hidden x hidden / tp each."""
    return sum(spec.hidden_size**2 // tp for part in (block.attention, block.ffn) if isinstance(part, Linear))


def rank_kv_heads(block: Block, tp: int) -> int:
    """KV heads of a block on one of ``tp`` ranks: kv / tp, at least one, none without attention."""
    return max(1, block.attention.kv_heads // tp) if isinstance(block.attention, Attention) else 0


def kv_bytes_per_token(spec: ModelSpec, blocks: Iterable[int], tp: int, fp8_kv: bool) -> int:
    """KV cache of one token on one rank: sum over its attention blocks of 2 x KV heads x head size x bytes.

    Nemotron-Super, one rank: 49 x 2 x 8 x 128 = 100,352 bytes in FP8, 200,704 in BF16.
    """
    heads = sum(rank_kv_heads(spec.blocks[i], tp) for i in blocks)
    return 2 * heads * spec.head_size * (1 if fp8_kv else _BF16)


def scale_count(spec: ModelSpec, shape: Shape) -> int:
    """FP8 scales on one rank: two per linear layer, and those of the KV cache.

    The TensorRT-LLM form joins q, k and v and has three KV scales a block; the Hugging Face form has two.
    Nemotron-Super: 338 x 2 + 49 x 3 = 823, or 436 x 2 + 49 x 2 = 970.
    """
    if not shape.fp8:
        return 0
    per_attention, per_kv = (4, 2) if shape.format == "hf" else (2, 3)
    count = 0
    for i in shape.blocks:
        block = spec.blocks[i]
        if isinstance(block.attention, Attention):
            count += 2 * per_attention + (per_kv if shape.fp8_kv else 0)
        count += 2 * isinstance(block.attention, Linear) + 2 * isinstance(block.ffn, Linear)
        count += 6 * isinstance(block.ffn, Mlp)
    return count


def weight_lines(spec: ModelSpec, shape: Shape) -> list[Line]:
    """Weights of one rank, by kind. Exact: the bytes of its tensors.

    Nemotron-Super on one rank: 51,969,556,480 bytes in FP8 and 3,292 of scales; 99,734,290,432 in BF16.
    """
    tp, size, precision = shape.tensor_parallel, (1 if shape.fp8 else _BF16), "FP8" if shape.fp8 else "BF16"
    mine = [spec.blocks[i] for i in shape.blocks]
    norms = sum((not isinstance(b.attention, NoOp)) + (not isinstance(b.ffn, NoOp)) for b in mine) + shape.last
    padded = -(-spec.vocab_size // tp)
    per_rank = f" / tp {tp}" if tp > 1 else ""
    rows = (
        (
            f"attention {WEIGHTS}",
            size * sum(attention_values(spec, b, tp) for b in mine),
            f"attention blocks, {precision}{per_rank}",
        ),
        (
            f"FFN {WEIGHTS}",
            size * sum(ffn_values(spec, b, tp) for b in mine),
            f"3 x hidden x width, {precision}{per_rank}",
        ),
        (
            f"linear {WEIGHTS}",
            size * sum(linear_values(spec, b, tp) for b in mine),
            f"hidden x hidden, {precision}{per_rank}",
        ),
        (f"embedding {WEIGHTS}", _BF16 * spec.vocab_size * spec.hidden_size * shape.first, "vocabulary x hidden, BF16"),
        (f"lm_head {WEIGHTS}", _BF16 * padded * spec.hidden_size * shape.last, f"vocabulary{per_rank} x hidden, BF16"),
        (f"norm {WEIGHTS}", _BF16 * spec.hidden_size * norms, "one vector a part and one at the end, BF16"),
        (f"scale {WEIGHTS}", _FLOAT32 * scale_count(spec, shape), "one float32 each"),
    )
    return [Line(name, count, "exact", formula) for name, count, formula in rows if count]


def decoder_bytes(spec: ModelSpec, shape: Shape) -> int:
    """Bytes of the decoder's matrices on one rank: what weight streaming can keep on the host."""
    kinds = [f"{kind} {WEIGHTS}" for kind in ("attention", "FFN", "linear")]
    return sum(line.bytes for line in weight_lines(spec, shape) if line.name in kinds)


def checkpoint_bytes(spec: ModelSpec, profile: EngineConfig) -> int:
    """Weights of the whole checkpoint, all ranks."""
    (shape,) = shapes(profile, [range(len(spec.blocks))], 1, 1)
    return profile.checkpoint.tensor_parallel * sum(line.bytes for line in weight_lines(spec, shape))


def block_work(spec: ModelSpec, profile: EngineConfig) -> list[int]:
    """Bytes that a decode step reads in every block: its weights, and ``_WORK_TOKENS`` of KV cache over all requests.

    The last block carries lm_head. This is the work that a pipeline has to share out evenly; it depends on no limit, so
    that a longer context never moves blocks to a rank that has no room for them.
    """
    size = 1 if profile.checkpoint.precision == "fp8" else _BF16
    fp8_kv = profile.checkpoint.kv_cache == "fp8"
    work = [
        size * (attention_values(spec, b, 1) + ffn_values(spec, b, 1) + linear_values(spec, b, 1))
        + kv_bytes_per_token(spec, [i], 1, fp8_kv) * _WORK_TOKENS
        for i, b in enumerate(spec.blocks)
    ]
    work[-1] += _BF16 * spec.vocab_size * spec.hidden_size
    return work


def rope_line(spec: ModelSpec) -> Line:
    """Cosines and sines for every position: positions x head size x 4 bytes, one table a rank.

    131,072 x 128 x 4 = 64 MiB in TensorRT-LLM (float32). vLLM holds it in BF16, 32 MiB: 48.40 GiB of FP8 weights and
    that table are the 48.43 GiB which its log shows for Nemotron-Super.
    """
    return Line("RoPE table", spec.max_context_tokens * spec.head_size * _FLOAT32, "bound", "positions x head size x 4")


def activation_bytes_per_token(spec: ModelSpec, shape: Shape) -> int:
    """Arrays alive at once for one token in the widest block of a rank: the residual stream, its normalised form (in
    the precision of the weights), the sum, and what one part makes inside.

    Nemotron-Super in FP8: 8192 x (2 + 1 + 2) + 28672 x (2 x 2 + 1) = 184,320 bytes.
    """
    value, tp, inside = 1 if shape.fp8 else _BF16, shape.tensor_parallel, 0
    for i in shape.blocks:
        block = spec.blocks[i]
        if isinstance(block.attention, Attention):
            kv_width = rank_kv_heads(block, tp) * spec.head_size
            inside = max(inside, _BF16 * (2 * spec.query_width // tp + 2 * kv_width))
        if isinstance(block.ffn, Mlp):
            inside = max(inside, (2 * _BF16 + value) * block.ffn.width // tp)
    return spec.hidden_size * (2 * _BF16 + value) + inside


def fixed_lines(spec: ModelSpec, shape: Shape, gpu: Gpu) -> list[Line]:
    """All lines but the KV cache and the reserve."""
    tp, tokens, batch = shape.tensor_parallel, shape.max_num_tokens, shape.max_batch_size
    per_token = activation_bytes_per_token(spec, shape)
    qkv = max(
        (
            spec.query_width // tp + 2 * rank_kv_heads(spec.blocks[i], tp) * spec.head_size
            for i in shape.blocks
            if isinstance(spec.blocks[i].attention, Attention)
        ),
        default=0,
    )
    vocabulary = -(-spec.vocab_size // tp) * tp
    lines = [
        *weight_lines(spec, shape),
        rope_line(spec),
        Line("activations", tokens * per_token, "estimate", f"{tokens:,} tokens x {per_token:,}, the widest block"),
        Line(
            "workspace",
            _BF16 * tokens * qkv + _GEMM_WORKSPACE_BYTES,
            "estimate",
            f"{tokens:,} tokens x {_BF16 * qkv:,} for attention, 64 MiB for GEMM",
        ),
    ]
    if shape.last:
        sampling = batch * (4 * _FLOAT32 * vocabulary + 3 * _FLOAT32 * shape.max_context_tokens)
        lines.append(
            Line(
                "logits and sampling",
                sampling,
                "estimate",
                f"batch {batch} x (4 x 4 x vocabulary + 3 x 4 x context)",
            )
        )
    libraries = _LIBRARY_BYTES[shape.runtime] + int(_DRIVER_SHARE * gpu.memory_bytes)
    lines.append(Line("CUDA and libraries", libraries, "estimate", "context, kernels, what the driver keeps"))
    if shape.runtime == "llmapi":
        lines.append(Line("CUDA graphs", _CUDA_GRAPH_BYTES, "estimate", "recorded decode steps"))
    if shape.world > 1:
        lines.append(Line("NCCL", _NCCL_BYTES, "estimate", "buffers between the ranks"))
    return lines


def kv_line(tokens: int, per_token: int) -> Line:
    """KV cache of ``tokens``, a multiple of ``TOKENS_PER_BLOCK``. 32,768 x 100,352 = 3.06 GiB."""
    return Line("KV cache", tokens * per_token, "exact", f"{tokens:,} tokens x {per_token:,} bytes")


def in_blocks(tokens: int) -> int:
    """``tokens`` rounded up to whole KV blocks."""
    return -(-tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def reserve_bytes(gpu: Gpu) -> int:
    """Kept free for what estimates miss and for fragmentation: 2.5 % of the card, at least 768 MiB."""
    return max(_LEAST_RESERVE_BYTES, int(_RESERVE_SHARE * gpu.memory_bytes))


def cpu_lines(spec: ModelSpec, profile: EngineConfig) -> list[Line]:
    """Memory of the CPU runtime: weights and KV cache in float32, whatever their precision in the checkpoint."""
    limits = profile.limits
    tokens, per_token = limits.kv_pool_tokens, spec.kv_bytes_per_token(_FLOAT32)
    return [
        Line(f"model {WEIGHTS}", spec.parameter_count * _FLOAT32, "bound", "parameters x 4"),
        Line("KV cache", tokens * per_token, "bound", f"{tokens:,} tokens x {per_token:,} bytes"),
        Line("Python and Triton", _CPU_BASE_BYTES, "estimate", "six models, a process each"),
    ]
