"""Checkpoint folders read back: every way to shard gives the same weights, every fault has one clear refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemobuild.engine.cpu.checkpoint import open_checkpoint
from nemobuild.errors import IntegrityError, NemobuildError, UsageError
from nemobuild.model import forward as fw
from nemobuild.model.forward import BlockWeights
from nemobuild.model.hf_config import spec_from_config
from tests.checkpoints import checkpoint_config, load_tensors, write_checkpoint
from tests.tiny import llama_config, random_weights, tiny_config

NAS, LLAMA = tiny_config(), llama_config()


def assert_same_model(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    spec, opened = spec_from_config(config), open_checkpoint(folder)
    for name in ("hidden_size", "vocab_size", "query_heads", "head_size", "blocks", "rope", "norm_epsilon"):
        assert getattr(opened.spec, name) == getattr(spec, name), name

    def read(name: str) -> np.ndarray:
        return weights[name].astype(np.float32)

    for index in range(len(spec.blocks)):
        expected, found = fw.hf_block(spec, index, read), opened.block(index)
        for field in fields(BlockWeights):
            a, b = getattr(expected, field.name), getattr(found, field.name)
            assert (a is None) == (b is None), (index, field.name)
            if a is not None:
                assert b.dtype == np.float32
                np.testing.assert_array_equal(a, b, err_msg=f"block {index} {field.name}")
    ends, expected_ends = opened.ends(), fw.hf_ends(spec, read)
    for field_name in ("embedding", "norm", "head"):
        np.testing.assert_array_equal(getattr(ends, field_name), getattr(expected_ends, field_name))


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 3), (1, 10)])
def test_any_sharding_gives_the_same_weights(tmp_path: Path, tp: int, pp: int) -> None:
    """tp 8 has one to eight ranks per KV head; 265 rows of vocabulary are padded to 266, 268, 272."""
    weights = random_weights(NAS)
    assert_same_model(write_checkpoint(tmp_path, NAS, weights, tp, pp), NAS, weights)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2), (8, 1)])
def test_llama_without_lm_head_is_tied(tmp_path: Path, tp: int, pp: int) -> None:
    weights = random_weights(LLAMA)
    folder = write_checkpoint(tmp_path, LLAMA, weights, tp, pp)
    assert_same_model(folder, LLAMA, weights)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.tied_embeddings
    ends = checkpoint.ends()
    assert ends.head is ends.embedding


def test_a_head_equal_to_the_embedding_is_held_once(tmp_path: Path) -> None:
    weights = random_weights(NAS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    ends = open_checkpoint(write_checkpoint(tmp_path, NAS, weights, 2)).ends()
    assert ends.head is ends.embedding


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_float_types(tmp_path: Path, dtype: Any) -> None:
    weights = {name: w.astype(dtype) for name, w in random_weights(NAS).items()}
    assert_same_model(write_checkpoint(tmp_path, NAS, weights, 2), NAS, weights)


def test_mlp_spelling_of_deci(tmp_path: Path) -> None:
    weights = random_weights(NAS)
    folder = write_checkpoint(tmp_path, NAS, weights, 2, ffn="mlp")
    assert any(".mlp.fc." in name for name in load_file(folder / "rank0.safetensors"))
    assert_same_model(folder, NAS, weights)


def test_modelopt_spelling_of_linear_parts(tmp_path: Path) -> None:
    weights = random_weights(NAS)
    folder = write_checkpoint(tmp_path, NAS, weights)
    tensors = load_file(folder / "rank0.safetensors")
    renamed = {
        "transformer.layers.2.attention.weight": "transformer.layers.2.attn_replacing_linear.weight",
        "transformer.layers.4.ffn.weight": "transformer.layers.4.mlp_replacing_linear.weight",
    }
    save_file({renamed.get(n, n): t for n, t in tensors.items()}, folder / "rank0.safetensors")
    assert_same_model(folder, NAS, weights)


@pytest.mark.parametrize("dim", [0, 1])
def test_split_embedding(tmp_path: Path, dim: int) -> None:
    """``use_parallel_embedding``, as ModelOpt writes for tp > 1."""
    weights = random_weights(NAS)
    folder = write_checkpoint(tmp_path, NAS, weights, 2, use_parallel_embedding=True, embedding_sharding_dim=dim)
    whole = weights["model.embed_tokens.weight"]
    padded = np.concatenate([whole, np.zeros((1, 128), whole.dtype)]) if dim == 0 else whole
    for rank, part in enumerate(np.split(padded, 2, dim)):
        file = folder / f"rank{rank}.safetensors"
        save_file(load_file(file) | {"transformer.vocab_embedding.weight": np.ascontiguousarray(part)}, file)
    assert_same_model(folder, NAS, weights)


def test_constants_saved_along_are_ignored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, NAS, random_weights(NAS))
    file = folder / "rank0.safetensors"
    table = {"transformer.layers.0.attention.rotary_inv_freq": np.ones(8, np.float32)}
    save_file(load_file(file) | table, file)
    assert len(open_checkpoint(folder).ranks[0]) == len(load_file(file)) - 1


def test_defaults_are_those_of_tensorrt_llm(tmp_path: Path) -> None:
    """A config without ``rotary_base`` means 10000 there, whatever the source model had."""
    folder = write_checkpoint(tmp_path, LLAMA, random_weights(LLAMA))
    config = json.loads((folder / "config.json").read_text())
    for key in ("rotary_base", "rotary_scaling", "norm_epsilon", "head_size", "mapping", "quantization"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    spec = open_checkpoint(folder).spec
    assert (spec.rope.theta, spec.rope.scaling, spec.norm_epsilon, spec.head_size) == (10000, None, 1e-5, 16)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        for path, value in changes.items():
            target, *_, key = (config, *path.split("__"))
            for part in path.split("__")[:-1]:
                target = target[int(part) if part.isdigit() else part]
            target[key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(rank: int, change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_tensors(folder / f"rank{rank}.safetensors")
        change(tensors)
        save_file(tensors, folder / f"rank{rank}.safetensors")

    return edit


def as_bytes(tensors: dict[str, np.ndarray]) -> None:
    tensors["transformer.ln_f.weight"] = np.zeros(128, np.int8)


QKV = "transformer.layers.0.attention.qkv.weight"
FAULTS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("missing-rank-file", "rank1.safetensors", lambda f: (f / "rank1.safetensors").unlink()),
    ("shard-truncated", "rank0.safetensors", lambda f: (f / "rank0.safetensors").write_bytes(b"\xff" * 99)),
    ("missing-tensor", QKV, edit_tensors(0, lambda t: t.pop(QKV))),
    ("missing-tensor", "ln_f", edit_tensors(1, lambda t: t.pop("transformer.ln_f.weight"))),
    ("surplus-tensor", "layers.99", edit_tensors(0, lambda t: t.update({"transformer.layers.99.x": np.ones(1)}))),
    (
        "surplus-tensor",
        "scaling",
        edit_tensors(1, lambda t: t.update({QKV[:-6] + "weights_scaling_factor": np.ones(1)})),
    ),
    ("wrong-shape", QKV, edit_tensors(1, lambda t: t.update({QKV: np.ascontiguousarray(t[QKV][:-1])}))),
    ("wrong-shape", QKV, edit_config(layer_configs__0__attention__num_key_value_heads=2)),
    ("unsupported-dtype", "I8", edit_tensors(0, as_bytes)),
    (
        "duplicate-tensor",
        "ffn.fc",
        edit_tensors(0, lambda t: t.update({"transformer.layers.0.mlp.fc.weight": np.ones(1)})),
    ),
    ("bad-checkpoint-config", "architecture", edit_config(architecture="GPTForCausalLM")),
    ("unknown-config-key", "rotary_bass", edit_config(rotary_bass=5)),
    ("unknown-config-key", "mapping.tp", edit_config(mapping={"tp": 2})),
    ("unknown-config-key", "ffn.moe", edit_config(layer_configs__0__ffn__moe=1)),
    ("bad-checkpoint-config", "hidden_act", edit_config(hidden_act="gelu")),
    ("bad-checkpoint-config", "quant_algo.*W8A16", edit_config(quantization__quant_algo="W8A16")),
    ("missing-tensor", "qkv.weights_scaling_factor", edit_config(quantization__quant_algo="FP8")),
    ("bad-checkpoint-config", "kv_cache_quant_algo", edit_config(quantization__kv_cache_quant_algo="INT8")),
    ("bad-checkpoint-config", "world_size", edit_config(mapping__world_size=3)),
    ("bad-checkpoint-config", "tp_size", edit_config(mapping={"world_size": 3, "tp_size": 3, "pp_size": 1})),
    ("bad-checkpoint-config", "impl", edit_config(layer_configs__0__attention__impl="mamba")),
    ("bad-checkpoint-config", "layer_configs", edit_config(num_hidden_layers=11)),
    ("bad-checkpoint-config", "block_configs", edit_config(block_configs=[])),
    ("bad-checkpoint-config", "rope_type", edit_config(rotary_scaling={"rope_type": "yarn", "factor": 2.0})),
    ("bad-checkpoint-config", "high_freq_factor", edit_config(rotary_scaling__high_freq_factor=None)),
    ("bad-checkpoint-config", "qk_layernorm", edit_config(qk_layernorm=True)),
    ("bad-json", "config.json", lambda f: (f / "config.json").write_text("{")),
    ("bad-json", "config.json", lambda f: (f / "config.json").write_text("[]")),
]


@pytest.mark.parametrize(("code", "names", "damage"), FAULTS, ids=[f"{c}-{n}"[:44] for c, n, _ in FAULTS])
def test_faults(tmp_path: Path, code: str, names: str, damage: Callable[[Path], None]) -> None:
    folder = write_checkpoint(tmp_path, NAS, random_weights(NAS), 2)
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(IntegrityError, match=names) as caught:
        open_checkpoint(folder)
    assert caught.value.code == code


def test_missing_folder_is_a_bad_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(("name", "row"), [(QKV, -1), ("transformer.layers.0.input_layernorm.weight", 0)])
def test_ranks_that_disagree(tmp_path: Path, name: str, row: int) -> None:
    """Block 0 has 4 KV heads; of 8 ranks two and two hold the same. Rank 1 gets another copy."""
    folder = write_checkpoint(tmp_path, NAS, random_weights(NAS), 8)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][row] += 1

    edit_tensors(1, change)(folder)
    with pytest.raises(NemobuildError, match=r"rank1.*differs from rank0") as caught:
        open_checkpoint(folder).block(0)
    assert caught.value.code == "ranks-disagree"


def test_a_swap_of_gate_and_up_changes_the_logits(tmp_path: Path) -> None:
    """The reader takes the file at its word, so a fault of a converter shows in the output."""
    weights = random_weights(NAS)
    folder = write_checkpoint(tmp_path, NAS, weights)
    opened = open_checkpoint(folder)
    (right,) = fw.forward(opened.spec, opened.ends(), opened.blocks(), [[1, 2, 3]])

    def swap(tensors: dict[str, np.ndarray]) -> None:
        fc, gate = (f"transformer.layers.0.ffn.{n}.weight" for n in ("fc", "gate"))
        tensors[fc], tensors[gate] = tensors[gate], tensors[fc]

    edit_tensors(0, swap)(folder)
    (wrong,) = fw.forward(opened.spec, opened.ends(), open_checkpoint(folder).blocks(), [[1, 2, 3]])
    assert np.abs(right - wrong).max() > 0.01


def test_config_helper_is_the_contract() -> None:
    """The converter's own test compares with the contract; this one only guards the helper used above."""
    assert checkpoint_config(NAS, 2, 3)["mapping"] == {"world_size": 6, "tp_size": 2, "pp_size": 3}
