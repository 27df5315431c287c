"""Seeded tiny models, written as real Hugging Face folders with the reference safetensors library.

``tiny_config()`` has every kind of block: attention with 8, 4, 2 and 1 KV heads, linear and absent
attention, MLPs given by multiplier and by width, linear and absent FFNs, and a block with neither part.
The vocabulary (265) is not a multiple of 2 or 4, so tensor parallelism has to pad it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nemobuild.model.hf_config import spec_from_config

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
)
BOS, END_OF_TEXT, EOM, EOT = 256, 257, 260, 261


def _attention(group: int | None = None, *, linear: bool = False) -> dict[str, Any]:
    no_op = group is None and not linear
    return {"n_heads_in_group": group, "no_op": no_op, "replace_with_linear": linear, "sparsify": None}


def _ffn(*, mult: float | None = None, width: int | None = None, linear: bool = False) -> dict[str, Any]:
    part: dict[str, Any] = {"no_op": not (mult or width or linear), "replace_with_linear": linear}
    return part | ({"ffn_mult": mult} if mult else {}) | ({"intermediate_size": width} if width else {})


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A ``nemotron-nas`` config.json with every kind of block; ``changes`` replace top-level keys."""
    parts = [
        (_attention(2), _ffn(width=192)),
        (_attention(4), _ffn(mult=2.0)),
        (_attention(linear=True), _ffn(width=64)),
        (_attention(), _ffn(width=96)),
        (_attention(1), _ffn(linear=True)),
        (_attention(8), _ffn()),
        (_attention(), _ffn()),
        (_attention(), _ffn(linear=True)),
        (_attention(linear=True), _ffn()),
        (_attention(4), _ffn(width=128)),
    ]
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "hidden_size": 128,
        "num_hidden_layers": len(parts),
        "num_attention_heads": 8,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "vocab_size": 256 + len(SPECIAL_TOKENS),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": [END_OF_TEXT, EOM, EOT],
        "block_configs": [{"attention": a, "ffn": f} for a, f in parts],
    }
    return config | changes


def llama_config(**changes: Any) -> dict[str, Any]:
    """A uniform ``llama`` config.json with tied embeddings."""
    config = tiny_config() | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "intermediate_size": 192,
        "tie_word_embeddings": True,
    }
    del config["block_configs"]
    return config | changes


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """BF16 weights by Hugging Face name: norms near one, matrices scaled to keep the residual stream tame."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in spec_from_config(config).tensor_shapes().items():
        values = rng.standard_normal(shape, dtype=np.float32)
        values = 1 + 0.1 * values if len(shape) == 1 else values * (1.5 / np.sqrt(shape[-1]))
        weights[name] = values.astype(ml_dtypes.bfloat16)
    return weights


def write_model(
    folder: Path, config: dict[str, Any] | None = None, *, seed: int = 0, shards: int = 2, template: str | None = None
) -> Path:
    """Write config, weights (in ``shards`` files with an index), tokenizer and chat template; return ``folder``."""
    config = config or tiny_config()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_weights(folder, random_weights(config, seed), shards)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config: dict[str, Any] = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    if template is not None:
        tokenizer_config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def write_weights(folder: Path, weights: dict[str, np.ndarray], shards: int = 2) -> None:
    names = list(weights)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: token id = position of the byte in the byte-level alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer
