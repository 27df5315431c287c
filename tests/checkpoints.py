"""TensorRT-LLM checkpoints, BF16 and FP8, written from the format alone, to test their reader without the converter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from nemobuild.model import forward as fw
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


FP8 = ml_dtypes.float8_e4m3fn
# Part of a tensor's name in the checkpoint -> group of linears that share their scales.
_GROUPS = {
    "attention.qkv": "qkv",
    "attention.dense": "o",
    "attention": "attention_linear",
    "{ffn}.fc": "gate_up",
    "{ffn}.gate": "gate_up",
    "{ffn}.proj": "down",
    "{ffn}": "ffn_linear",
}


@dataclass(frozen=True)
class Fp8Scales:
    """Scales of block i: ``weight[i, group]``, ``input[i, group]``, and ``kv[i]`` of keys and values together."""

    weight: dict[tuple[int, str], np.float32]
    input: dict[tuple[int, str], np.float32]
    kv: dict[int, np.float32]


def fp8_scales(config: dict[str, Any], weights: dict[str, np.ndarray], prompts: list[list[int]]) -> Fp8Scales:
    """amax / 448 of the weights, of the inputs of all linears and of keys and values, over one pass of ``prompts``."""
    spec = spec_from_config(config)
    scales = Fp8Scales({}, {}, {})

    def read(name: str) -> np.ndarray:
        return weights[name].astype(np.float32)

    tokens = [t for prompt in prompts for t in prompt]
    starts = np.cumsum([0, *map(len, prompts)])
    hidden = fw.embed(fw.hf_ends(spec, read), np.asarray(tokens))
    segments = [fw.Segment(int(s), 0, len(p)) for s, p in zip(starts, prompts, strict=False)]
    step = fw.make_step(spec, segments, hidden)
    for i, block in enumerate(spec.blocks):

        def observe(name: str, x: np.ndarray, weight: np.ndarray, i: int = i) -> np.ndarray:
            scales.input[i, name] = np.float32(np.abs(x).max()) / np.float32(448)
            scales.weight[i, name] = np.float32(np.abs(weight).max()) / np.float32(448)
            return x @ weight.T

        cache = fw.new_cache(spec, block, len(tokens), hidden)
        hidden = fw.run_block(spec, block, fw.hf_block(spec, i, read), hidden, step, cache, observe)
        if cache is not None:
            scales.kv[i] = np.float32(max(np.abs(cache.keys).max(), np.abs(cache.values).max())) / np.float32(448)
    return scales


def cast(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """E4M3 of ``values`` / ``scale`` by the reference library, saturating."""
    return np.clip(values.astype(np.float32) / scale, -448, 448).astype(FP8)


def fp8_rank_tensors(
    spec: ModelSpec, weights: dict[str, np.ndarray], scales: Fp8Scales, tp: int, pp: int, *, kv: bool = True
) -> list[dict[str, np.ndarray]]:
    """Tensors of every rank file of an FP8 checkpoint."""
    ffn = "mlp" if spec.model_type == "llama" else "ffn"
    stages = np.array_split(np.arange(len(spec.blocks)), pp)
    ranks = []
    for rank, tensors in enumerate(rank_tensors(spec, weights, tp, pp)):
        out: dict[str, np.ndarray] = {}
        for name, value in tensors.items():
            if value.ndim == 1 or not name.startswith("transformer.layers."):
                out[name] = value
                continue
            _, _, local, part = name.removesuffix(".weight").split(".", 3)
            layer = int(stages[rank // tp][int(local)])
            group = _GROUPS[part.replace(ffn, "{ffn}")]
            out[name] = cast(value, scales.weight[layer, group])
            module = name.removesuffix("weight")
            out[module + "weights_scaling_factor"] = scales.weight[layer, group].reshape(1)
            out[module + "activation_scaling_factor"] = scales.input[layer, group].reshape(1)
            if kv and group == "qkv":
                out[module.replace("qkv.", "kv_cache_scaling_factor")] = scales.kv[layer].reshape(1)
        ranks.append(out)
    return ranks


def write_fp8_checkpoint(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    scales: Fp8Scales,
    tp: int = 1,
    pp: int = 1,
    *,
    kv: bool = True,
    **changes: Any,
) -> Path:
    """Write the FP8 checkpoint of a Hugging Face ``config``; ``changes`` replace keys of its config."""
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8" if kv else None,
        "exclude_modules": ["lm_head"],
    }
    changes = {"quantization": quantization} | changes
    (folder / "config.json").write_text(json.dumps(checkpoint_config(config, tp, pp) | changes))
    for rank, tensors in enumerate(fp8_rank_tensors(spec_from_config(config), weights, scales, tp, pp, kv=kv)):
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return folder


_NUMPY = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": FP8, "F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1"}


def load_tensors(file: Path) -> dict[str, np.ndarray]:
    """Tensors of a file, FP8 too, which the reference library's own NumPy reader lacks."""
    tensors = safetensors.deserialize(file.read_bytes())
    return {n: np.frombuffer(t["data"], _NUMPY[t["dtype"]]).reshape(t["shape"]).copy() for n, t in tensors}
