"""TensorRT-LLM checkpoints written from the format's description alone, to test their reader without the converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nemobuild.model.hf_config import spec_from_config
from nemobuild.model.spec import Attention, Linear, Mlp, ModelSpec, NoOp


def checkpoint_config(config: dict[str, Any], tp: int = 1, pp: int = 1) -> dict[str, Any]:
    """``config.json`` of the checkpoint of the Hugging Face ``config``."""
    spec = spec_from_config(config)
    result = {
        "architecture": "LlamaForCausalLM" if spec.model_type == "llama" else "DeciLMForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": spec.query_heads,
        "num_key_value_heads": config["num_key_value_heads"],
        "intermediate_size": config["intermediate_size"],
        "head_size": spec.head_size,
        "hidden_act": "silu",
        "norm_epsilon": spec.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": spec.rope.theta,
        "rotary_scaling": config.get("rope_scaling"),
        "max_position_embeddings": spec.max_context_tokens,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    if spec.model_type != "llama":
        kinds = {Attention: "attention", Mlp: "mlp", Linear: "linear", NoOp: "no_op"}
        result["layer_configs"] = [
            {
                "attention": {
                    "impl": kinds[type(b.attention)],
                    "num_key_value_heads": b.attention.kv_heads if isinstance(b.attention, Attention) else None,
                },
                "ffn": {
                    "impl": kinds[type(b.ffn)],
                    "intermediate_size": b.ffn.width if isinstance(b.ffn, Mlp) else None,
                },
            }
            for b in spec.blocks
        ]
    return result


def rank_tensors(
    spec: ModelSpec, weights: dict[str, np.ndarray], tp: int, pp: int, *, ffn: str | None = None
) -> list[dict[str, np.ndarray]]:
    """Tensors of every rank file. Without ``lm_head`` when the model is tied."""
    ffn = ffn or ("mlp" if spec.model_type == "llama" else "ffn")
    ranks = []
    for stage, layers in enumerate(np.array_split(np.arange(len(spec.blocks)), pp)):
        for t in range(tp):
            out: dict[str, np.ndarray] = {}
            if stage == 0:
                out["transformer.vocab_embedding.weight"] = weights["model.embed_tokens.weight"]
            for local, i in enumerate(layers):
                for name, value in _block(spec, weights, int(i), t, tp, ffn):
                    out[f"transformer.layers.{local}.{name}"] = value
            if stage == pp - 1:
                out["transformer.ln_f.weight"] = weights["model.norm.weight"]
                if "lm_head.weight" in weights:
                    head = weights["lm_head.weight"]
                    padded = np.concatenate([head, np.zeros((-len(head) % tp, head.shape[1]), head.dtype)])
                    out["lm_head.weight"] = np.split(padded, tp)[t]
            ranks.append({name: np.ascontiguousarray(value) for name, value in out.items()})
    return ranks


def _block(spec: ModelSpec, weights: dict[str, np.ndarray], i: int, t: int, tp: int, ffn: str) -> Any:
    block, hf = spec.blocks[i], f"model.layers.{i}"
    if not isinstance(block.attention, NoOp):
        yield "input_layernorm.weight", weights[f"{hf}.input_layernorm.weight"]
    if isinstance(block.attention, Attention):
        q, k, v = (weights[f"{hf}.self_attn.{x}_proj.weight"] for x in "qkv")
        repeats = max(1, tp // block.attention.kv_heads)
        k, v = (x.reshape(-1, spec.head_size, x.shape[1]).repeat(repeats, 0).reshape(-1, x.shape[1]) for x in (k, v))
        yield "attention.qkv.weight", np.concatenate([np.split(x, tp)[t] for x in (q, k, v)])
        yield "attention.dense.weight", np.split(weights[f"{hf}.self_attn.o_proj.weight"], tp, 1)[t]
    elif isinstance(block.attention, Linear):
        yield "attention.weight", np.split(weights[f"{hf}.self_attn.linear_attn.weight"], tp)[t]
    if not isinstance(block.ffn, NoOp):
        yield "post_layernorm.weight", weights[f"{hf}.post_attention_layernorm.weight"]
    if isinstance(block.ffn, Mlp):
        yield f"{ffn}.fc.weight", np.split(weights[f"{hf}.mlp.gate_proj.weight"], tp)[t]
        yield f"{ffn}.gate.weight", np.split(weights[f"{hf}.mlp.up_proj.weight"], tp)[t]
        yield f"{ffn}.proj.weight", np.split(weights[f"{hf}.mlp.down_proj.weight"], tp, 1)[t]
    elif isinstance(block.ffn, Linear):
        yield f"{ffn}.weight", np.split(weights[f"{hf}.mlp.linear_mlp.weight"], tp)[t]


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    tp: int = 1,
    pp: int = 1,
    *,
    ffn: str | None = None,
    **changes: Any,
) -> Path:
    """Write the checkpoint of a Hugging Face ``config`` and its ``weights``; ``changes`` replace keys of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(checkpoint_config(config, tp, pp) | changes))
    for rank, tensors in enumerate(rank_tensors(spec_from_config(config), weights, tp, pp, ffn=ffn)):
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder
