"""The TensorRT-LLM checkpoint of a model: its ``config.json`` and the tensors of every rank file.

Layout read from TensorRT-LLM 1.0 to 1.2 (``models/nemotron_nas/convert.py``, ``models/modeling_utils.py``). Three
surprises to keep in mind: ``fc`` is the gate projection of Hugging Face and ``gate`` its up projection; layer
indices count from zero on every pipeline rank; a block without attention has no ``input_layernorm``.

Only keys that every version of that range accepts are written to ``mapping`` and ``quantization``: these are
passed to constructors that refuse unknown ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemobuild.convert.fp8_map import ScaleNames
from nemobuild.convert.tensor_map import Piece, Target, TensorMap
from nemobuild.model.parallel import check_parallel, pipeline_ranges
from nemobuild.model.spec import Attention, Block, Linear, Mlp, ModelSpec, NoOp

DTYPE = "BF16"
SCALES = ScaleNames(
    weight="weights_scaling_factor",
    input="activation_scaling_factor",
    shape=(1,),
    # The runtime wants the first; NVIDIA ModelOpt writes all three, and so every reader of its checkpoints takes them.
    kv=tuple(
        ("attention.qkv.weight", f"attention.{kind}_cache_scaling_factor", ref)
        for kind, ref in (("kv", "kv"), ("k", "key"), ("v", "value"))
    ),
)
_IMPL = {Attention: "attention", Mlp: "mlp", Linear: "linear", NoOp: "no_op"}


def checkpoint_config(
    spec: ModelSpec, tp: int = 1, pp: int = 1, *, fp8: bool = False, fp8_kv: bool = False
) -> dict[str, Any]:
    """``config.json`` of the checkpoint, BF16 or FP8. Per-block values are global, not per rank."""
    nas = is_deci(spec)
    config: dict[str, Any] = {
        "architecture": "DeciLMForCausalLM" if nas else "LlamaForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": spec.query_heads,
        # For DeciLM the two are only fall-backs: layer_configs holds the value of each block.
        "num_key_value_heads": max(spec.kv_heads_per_block) or spec.query_heads,
        "intermediate_size": max(_widths(spec), default=4 * spec.hidden_size),
        "head_size": spec.head_size,
        "hidden_act": "silu",
        "norm_epsilon": spec.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": spec.rope.theta,
        "rotary_scaling": _rotary_scaling(spec),
        "max_position_embeddings": spec.max_context_tokens,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": {"quant_algo": "FP8" if fp8 else None, "kv_cache_quant_algo": "FP8" if fp8_kv else None},
    }
    if fp8:
        # A list replaces the runtime's default, which leaves lm_head out of the quantisation too.
        config["quantization"]["exclude_modules"] = ["lm_head"]
    if nas:
        config["layer_configs"] = [_layer_config(block) for block in spec.blocks]
    return config


def is_deci(spec: ModelSpec) -> bool:
    """Whether the blocks may differ, so that the checkpoint needs ``DeciLMForCausalLM``."""
    return spec.model_type != "llama"


def tensor_map(spec: ModelSpec, tp: int = 1, pp: int = 1) -> TensorMap:
    """Targets of rank files 0 to ``tp * pp - 1``; the rank of (pipeline p, tensor t) is ``p * tp + t``.

    Raises ``UsageError`` for a split that the model does not allow.
    """
    check_parallel(spec, tp, pp)
    ranks = [
        tuple(_rank(spec, layers, t, tp, first=p == 0, last=p == pp - 1))
        for p, layers in enumerate(pipeline_ranges(len(spec.blocks), pp))
        for t in range(tp)
    ]
    return TensorMap(tuple(ranks), _copies(spec, tp))


def _rank(spec: ModelSpec, layers: range, t: int, tp: int, *, first: bool, last: bool) -> Iterator[Target]:
    embedding, hidden, vocab = "model.embed_tokens.weight", spec.hidden_size, spec.vocab_size
    if first:
        yield _whole("transformer.vocab_embedding.weight", embedding, (vocab, hidden))
    for local, i in enumerate(layers):
        yield from _block(spec, spec.blocks[i], f"transformer.layers.{local}", f"model.layers.{i}", t, tp)
    if last:
        yield _whole("transformer.ln_f.weight", "model.norm.weight", (hidden,))
        rows = -(-vocab // tp)
        start, end = min(t * rows, vocab), min((t + 1) * rows, vocab)
        pieces = []
        if end > start:
            source = embedding if spec.tied_embeddings else "lm_head.weight"
            pieces.append(Piece(source, (start, end), (0, hidden), 0))
        if end - start < rows:
            pieces.append(Piece(None, (0, rows - (end - start)), (0, hidden), end - start))
        yield Target("lm_head.weight", DTYPE, (rows, hidden), tuple(pieces))


def _block(spec: ModelSpec, block: Block, target: str, source: str, t: int, tp: int) -> Iterator[Target]:
    hidden, head = spec.hidden_size, spec.head_size
    ffn = "ffn" if is_deci(spec) else "mlp"
    if not isinstance(block.attention, NoOp):
        yield _whole(f"{target}.input_layernorm.weight", f"{source}.input_layernorm.weight", (hidden,))
    if isinstance(block.attention, Attention):
        attention, kv_heads = f"{source}.self_attn", block.attention.kv_heads
        query = _share(spec.query_width, t, tp)
        # More ranks than KV heads: neighbours share a head (0, 0, 1, 1).
        first = t * kv_heads // tp
        kv = (first * head, (first + max(1, kv_heads // tp)) * head)
        parts = [(f"{attention}.q_proj.weight", query), *((f"{attention}.{x}_proj.weight", kv) for x in "kv")]
        yield _stack(f"{target}.attention.qkv.weight", parts, hidden)
        yield _columns(f"{target}.attention.dense.weight", f"{attention}.o_proj.weight", hidden, query)
    elif isinstance(block.attention, Linear):
        share = _share(hidden, t, tp)
        yield _stack(f"{target}.attention.weight", [(f"{source}.self_attn.linear_attn.weight", share)], hidden)
    if not isinstance(block.ffn, NoOp):
        yield _whole(f"{target}.post_layernorm.weight", f"{source}.post_attention_layernorm.weight", (hidden,))
    if isinstance(block.ffn, Mlp):
        share = _share(block.ffn.width, t, tp)
        yield _stack(f"{target}.{ffn}.fc.weight", [(f"{source}.mlp.gate_proj.weight", share)], hidden)
        yield _stack(f"{target}.{ffn}.gate.weight", [(f"{source}.mlp.up_proj.weight", share)], hidden)
        yield _columns(f"{target}.{ffn}.proj.weight", f"{source}.mlp.down_proj.weight", hidden, share)
    elif isinstance(block.ffn, Linear):
        share = _share(hidden, t, tp)
        yield _stack(f"{target}.{ffn}.weight", [(f"{source}.mlp.linear_mlp.weight", share)], hidden)


def _share(size: int, t: int, tp: int) -> tuple[int, int]:
    return t * size // tp, (t + 1) * size // tp


def _whole(name: str, source: str, shape: tuple[int, ...]) -> Target:
    rows, columns = shape if len(shape) == 2 else (1, shape[0])
    return Target(name, DTYPE, shape, (Piece(source, (0, rows), (0, columns), 0),))


def _stack(name: str, parts: list[tuple[str, tuple[int, int]]], columns: int) -> Target:
    """Row ranges of several sources, one below the other."""
    pieces, at = [], 0
    for source, rows in parts:
        pieces.append(Piece(source, rows, (0, columns), at))
        at += rows[1] - rows[0]
    return Target(name, DTYPE, (at, columns), tuple(pieces))


def _columns(name: str, source: str, rows: int, columns: tuple[int, int]) -> Target:
    return Target(name, DTYPE, (rows, columns[1] - columns[0]), (Piece(source, (0, rows), columns, 0),))


def _copies(spec: ModelSpec, tp: int) -> dict[str, int]:
    """How often each source is used, where that is not once: the replication that the format asks for."""
    copies = {name: tp for name, shape in spec.tensor_shapes().items() if len(shape) == 1}
    copies["model.embed_tokens.weight"] = tp + spec.tied_embeddings
    for i, kv_heads in enumerate(spec.kv_heads_per_block):
        if 0 < kv_heads < tp:
            copies |= {f"model.layers.{i}.self_attn.{x}_proj.weight": tp // kv_heads for x in "kv"}
    return {name: count for name, count in copies.items() if count != 1}


def _widths(spec: ModelSpec) -> list[int]:
    return [block.ffn.width for block in spec.blocks if isinstance(block.ffn, Mlp)]


def _layer_config(block: Block) -> dict[str, Any]:
    kv_heads = block.attention.kv_heads if isinstance(block.attention, Attention) else None
    width = block.ffn.width if isinstance(block.ffn, Mlp) else None
    return {
        "attention": {"impl": _IMPL[type(block.attention)], "num_key_value_heads": kv_heads},
        "ffn": {"impl": _IMPL[type(block.ffn)], "intermediate_size": width},
    }


def _rotary_scaling(spec: ModelSpec) -> dict[str, Any] | None:
    scaling = spec.rope.scaling
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
