"""``config.json`` -> ``ModelSpec``: exact counts for the known models, refusals by name for the rest."""

from __future__ import annotations

import json

import pytest

from nemobuild.errors import IntegrityError, UsageError
from nemobuild.model import picture
from nemobuild.model.hf_config import load_spec, mlp_width, spec_from_config
from nemobuild.model.spec import Attention, Block, Linear, Mlp, NoOp
from nemobuild.resources import data_folder
from tests.tiny import llama_config, tiny_config

MODELS = data_folder("engine_configs") / "models"


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "attention", "kv_bf16"),
    [
        ("super-49b-v1.5", 49_867_145_216, 568, 49, 200_704),
        ("super-49b-v1", 49_867_145_216, 568, 49, 200_704),
        ("ultra-253b-v1", 253_401_268_224, 647, 64, 262_144),
    ],
)
def test_known_models(name, parameters, tensors, attention, kv_bf16):
    spec = load_spec(MODELS / f"{name}.json")
    assert spec.parameter_count == parameters
    assert len(spec.tensor_shapes()) == tensors
    assert len(spec.attention_blocks) == attention
    assert spec.kv_bytes_per_token(2) == kv_bf16 == 2 * spec.kv_bytes_per_token(1)


def test_the_49b_block_by_block():
    spec = load_spec(MODELS / "super-49b-v1.5.json")
    without = {6, 7, 11, *range(42, 52), *range(53, 71)}
    assert {i for i, b in enumerate(spec.blocks) if isinstance(b.attention, NoOp)} == without
    assert spec.blocks[0] == Block(Attention(8), Mlp(14336))
    widths = [b.ffn.width for b in spec.blocks if isinstance(b.ffn, Mlp)]
    assert {w: widths.count(w) for w in widths} == {28672: 49, 17920: 1, 14336: 6, 7168: 10, 5632: 8, 2816: 6}
    assert spec.rope.scaling is not None and spec.rope.scaling.factor == 16.0
    assert load_spec(MODELS / "super-49b-v1.json").rope.scaling.factor == 8.0
    assert spec.end_token_ids == (128001, 128008, 128009)


@pytest.mark.parametrize(("mult", "width"), [(5.25, 28672), (1.0, 5632), (0.5, 2816), (3.28125, 17920)])
def test_width_rule(mult, width):
    assert mlp_width(mult, 8192) == width


def test_every_kind_of_block():
    spec = spec_from_config(tiny_config())
    kinds = {(type(b.attention), type(b.ffn)) for b in spec.blocks}
    assert {(Attention, Mlp), (Linear, Mlp), (NoOp, Mlp), (Attention, Linear), (Attention, NoOp)} <= kinds
    assert {(NoOp, NoOp), (NoOp, Linear), (Linear, NoOp)} <= kinds
    assert spec.kv_heads_per_block == (4, 2, 0, 0, 8, 1, 0, 0, 0, 2)
    assert not any(name.startswith("model.layers.6.") for name in spec.tensor_shapes())


def test_deci_and_llama_dialects():
    llama = spec_from_config(llama_config())
    assert llama.blocks == (Block(Attention(4), Mlp(192)),) * 3 and "lm_head.weight" not in llama.tensor_shapes()
    deci = spec_from_config(llama_config(model_type="deci", num_key_value_heads_per_layer=[8, 2, 1]))
    assert deci.kv_heads_per_block == (8, 2, 1)
    plain = spec_from_config(llama_config(num_key_value_heads=None, rope_scaling=None, eos_token_id=2, head_dim=64))
    assert plain.kv_heads_per_block == (8, 8, 8) and plain.rope.scaling is None and plain.query_width == 512


def test_rope_parameters_of_newer_transformers():
    config = llama_config()
    parameters = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    assert spec_from_config(config | {"rope_parameters": parameters}).rope == spec_from_config(llama_config()).rope


def block(**attention_or_ffn):
    config = tiny_config()
    for part, change in attention_or_ffn.items():
        config["block_configs"][0][part] |= change
    return config


def rope(**changes):
    return tiny_config(rope_scaling=tiny_config()["rope_scaling"] | changes)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (tiny_config(model_type="mixtral"), "model_type"),
        (tiny_config(num_hidden_layers=9), "block_configs"),
        (tiny_config(block_configs=None), "block_configs"),
        (tiny_config(block_configs=[{}] * 10), "block_configs[0]"),
        (tiny_config(hidden_size="wide"), "hidden_size"),
        (tiny_config(hidden_size=True), "hidden_size"),
        (tiny_config(hidden_size=130), "hidden_size"),
        (tiny_config(vocab_size=-1), "vocab_size"),
        (tiny_config(hidden_act="gelu"), "hidden_act"),
        (tiny_config(attention_bias=True), "attention_bias"),
        (tiny_config(rope_scaling={"rope_type": "yarn"}), "rope_scaling.rope_type"),
        (tiny_config(rope_scaling={"rope_type": "llama3"}), "rope_scaling.factor"),
        (tiny_config(rope_theta=-1.0), "rope_theta"),
        (rope(factor=0), "rope_scaling.factor"),
        (rope(factor=float("nan")), "rope_scaling.factor"),
        (rope(low_freq_factor=4.0), "rope_scaling.high_freq_factor"),
        (rope(attention_factor=1.0), "rope_scaling.attention_factor"),
        (tiny_config(tie_word_embeddings="false"), "tie_word_embeddings"),
        (llama_config(num_hidden_layers=100_000_000), "num_hidden_layers"),
        (tiny_config(num_experts=8), "num_experts"),
        (tiny_config(eos_token_id=265), "eos_token_id"),
        (tiny_config(torch_dtype="int8"), "torch_dtype"),
        (block(attention={"n_heads_in_group": 3}), "block_configs[0].attention.n_heads_in_group"),
        (block(attention={"n_heads_in_group": None}), "block_configs[0].attention.n_heads_in_group"),
        (block(attention={"window_length": 64}), "block_configs[0].attention.window_length"),
        (block(attention={"no_op": "yes"}), "block_configs[0].attention.no_op"),
        (block(ffn={"intermediate_size": None}), "block_configs[0].ffn.ffn_mult"),
        (block(ffn={"intermediate_size": 0}), "block_configs[0].ffn.intermediate_size"),
        (block(ffn={"experts": 4}), "block_configs[0].ffn.experts"),
        (llama_config(intermediate_size=None), "intermediate_size"),
        (llama_config(num_key_value_heads=3), "num_key_value_heads"),
        (llama_config(model_type="deci", num_key_value_heads_per_layer=[1]), "num_key_value_heads_per_layer"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(config, field):
    with pytest.raises(UsageError) as refused:
        spec_from_config(config, "there/config.json")
    assert refused.value.what.startswith(field) and "there/config.json" in refused.value.what


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UsageError, match="rope_theta"):
        spec_from_config(tiny_config(rope_thetta=1.0))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff\xfe"])
def test_damaged_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        load_spec(tmp_path)


def test_missing_config(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json"):
        load_spec(tmp_path)


def test_pictures_show_every_block():
    spec = spec_from_config(tiny_config())
    rows = picture.terminal_picture(spec, 80).splitlines()
    assert rows[1].split(maxsplit=1)[1] == "██─·██··─█"
    assert rows[2][12:].rstrip() == "▆█▂▃─  ─ ▄"
    svg = picture.svg_picture(spec, "a <b>")
    assert svg.count("<g>") == len(spec.blocks) and "a &lt;b&gt;" in svg
    json.dumps(picture.as_json(spec))
