"""Scales of the tiny models, and FP8 Hugging Face folders written from the formats' descriptions alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nemobuild.convert.scales import BlockScales, GroupScales, KvScales
from nemobuild.model.hf_config import spec_from_config
from tests.checkpoints import FP8, Fp8Scales, cast
from tests.tiny import random_weights, write_model, write_weights

MEMBERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "attention_linear": ("self_attn.linear_attn",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "ffn_linear": ("mlp.linear_mlp",),
}


def amax(array: np.ndarray) -> np.float32:
    return np.abs(array.astype(np.float32)).max()


def given_scales(
    config: dict[str, Any], weights: dict[str, np.ndarray], seed: int = 0, *, static: bool = True
) -> list[BlockScales]:
    """amax / 448 of the weights of each group; input and KV scales made up."""
    rng = np.random.default_rng(seed)
    blocks = []
    for i in range(len(spec_from_config(config).blocks)):
        groups = {}
        for group, parts in MEMBERS.items():
            names = [f"model.layers.{i}.{part}.weight" for part in parts]
            if names[0] in weights:
                scale = max(amax(weights[name]) for name in names) / np.float32(448)
                groups[f"model.layers.{i}.{group}"] = GroupScales(float(scale), made_up(rng) if static else None)
        attends = f"model.layers.{i}.self_attn.k_proj.weight" in weights
        # Some above 1 and some below, since the clamp has to leave the former.
        blocks.append(BlockScales(groups, KvScales(made_up(rng), made_up(rng)) if attends and static else None))
    return blocks


def made_up(rng: np.random.Generator) -> float:
    return float(np.float32(np.exp(rng.uniform(-4, 1))))


def as_checkpoint_scales(blocks: list[BlockScales]) -> Fp8Scales:
    """The same for the independent writer of TensorRT-LLM checkpoints; the two KV scales merged and clamped."""
    pairs = [(i, g.rsplit(".", 1)[1], s) for i, block in enumerate(blocks) for g, s in block.groups.items()]
    return Fp8Scales(
        {(i, g): np.float32(s.weight) for i, g, s in pairs},
        {(i, g): np.float32(s.input or 0) for i, g, s in pairs},
        {i: np.float32(max(b.kv.key, b.kv.value, 1.0)) for i, b in enumerate(blocks) if b.kv is not None},
    )


def fp8_tensors(
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    *,
    form: str = "modelopt",
    equal: bool = False,
    kv: bool = True,
    static: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Tensors of an FP8 Hugging Face folder; ``equal`` gives the linear layers of one input one scale."""
    blocks = given_scales(config, weights, seed)
    out = {}
    shape = () if form == "modelopt" else (1,)
    for name, array in weights.items():
        group = next((g for g, parts in MEMBERS.items() if any(name.endswith(f"{p}.weight") for p in parts)), None)
        if group is None:
            out[name] = array
            continue
        i, stem = int(name.split(".")[2]), name.removesuffix("weight")
        pair = blocks[i].groups[f"model.layers.{i}.{group}"]
        scale = np.float32(pair.weight) if equal else amax(array) / np.float32(448)
        out[name] = cast(array, scale)
        out[stem + "weight_scale"] = np.full(shape, scale, np.float32)
        if static:
            out[stem + "input_scale"] = np.full(shape, pair.input, np.float32)
        scales = blocks[i].kv
        if kv and scales is not None and group == "qkv":
            for x, value in (("k", scales.key), ("v", scales.value)):
                where = f"model.layers.{i}.self_attn." + (f"{x}_proj." if form == "modelopt" else "")
                out[f"{where}{x}_scale"] = np.full(shape, value, np.float32)
    return out


SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}


def quantization_config(form: str, *, kv: bool = True, static: bool = True) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    if form == "modelopt":
        inputs = SCHEME | {"dynamic": not static}
        group = {"input_activations": inputs, "weights": SCHEME, "targets": ["Linear"]}
        return {
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
            "quant_algo": "FP8",
            **({"kv_cache_scheme": SCHEME} if kv else {}),
            "producer": {"name": "modelopt", "version": "0.37.0"},
            "quant_method": "modelopt",
        }
    scheme = SCHEME | {"strategy": "tensor", "symmetric": True, "group_size": None, "block_structure": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "input_activations": scheme,
                "output_activations": None,
                "weights": scheme,
                "targets": ["Linear"],
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": scheme if kv else None,
    }


def write_fp8_folder(
    folder: Path,
    config: dict[str, Any],
    *,
    form: str = "modelopt",
    kv: bool = True,
    change: Callable[[dict[str, np.ndarray], dict[str, Any], dict[str, Any]], None] | None = None,
    **options: Any,
) -> Path:
    """An FP8 folder; ``change`` may edit the tensors, ``config.json`` and ``hf_quant_config.json`` before."""
    write_model(folder, config)
    tensors = fp8_tensors(config, random_weights(config), form=form, kv=kv, **options)
    inline = quantization_config(form, kv=kv, static=options.get("static", True))
    config = config | {"quantization_config": inline}
    algorithms = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8" if kv else None, "exclude_modules": ["lm_head"]}
    separate: dict[str, Any] = {"producer": {"name": "modelopt", "version": "0.37.0"}, "quantization": algorithms}
    if form != "modelopt":
        separate = {}
    if change is not None:
        change(tensors, config, separate)
    write_weights(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    if separate:
        (folder / "hf_quant_config.json").write_text(json.dumps(separate))
    return folder


def dequantised(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """float32 values of a weight of an FP8 Hugging Face folder."""
    assert tensors[name].dtype == FP8
    return tensors[name].astype(np.float32) * tensors[name.removesuffix("weight") + "weight_scale"].reshape(())


BF16 = ml_dtypes.bfloat16
