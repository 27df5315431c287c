"""NVIDIA ModelOpt as the judge of blocks of every kind: linear stand-ins, absent parts, other numbers of KV heads.

No model class of transformers has such blocks. Here they are put together of its Llama parts and plain ``nn.Linear``,
which is all that ModelOpt looks for; none of the published model's own code runs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemobuild.convert.scales import quant_groups
from nemobuild.model import forward as fw
from nemobuild.model.hf_config import load_spec
from nemobuild.model.spec import Attention, Linear, Mlp, ModelSpec
from tests.tiny import random_weights, tiny_config, write_model

pytest.importorskip("modelopt")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP  # noqa: E402

from tests.peers.modelopt_reference import quantize, read_amax  # noqa: E402
from tests.peers.test_modelopt import EXACT, assert_close, our_scales, statistics  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class StandIn(torch.nn.Module):  # type: ignore[misc]
    """One linear map, or zeros, in the place of attention (``parts`` 2) or of the FFN."""

    def __init__(self, name: str, width: int, parts: int) -> None:
        super().__init__()
        self.linear = name
        self.parts = parts
        if name:
            setattr(self, name, torch.nn.Linear(width, width, bias=False))

    def forward(self, hidden_states: Any, **_: Any) -> Any:
        out = getattr(self, self.linear)(hidden_states) if self.linear else torch.zeros_like(hidden_states)
        return (out, None) if self.parts == 2 else out


def nas_model(spec: ModelSpec, weights: dict[str, np.ndarray]) -> Any:
    """The model of ``spec`` in float32, its modules named as in the files."""
    scaling = spec.rope.scaling
    assert scaling is not None
    config = transformers.LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=1,
        num_hidden_layers=len(spec.blocks),
        num_attention_heads=spec.query_heads,
        head_dim=spec.head_size,
        vocab_size=spec.vocab_size,
        rms_norm_eps=spec.norm_epsilon,
        max_position_embeddings=spec.max_context_tokens,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": spec.rope.theta,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for i, (layer, block) in enumerate(zip(model.model.layers, spec.blocks, strict=True)):
        own = copy.deepcopy(config)
        if isinstance(block.attention, Attention):
            own.num_key_value_heads = block.attention.kv_heads
            layer.self_attn = LlamaAttention(own, i)
        else:
            linear = "linear_attn" if isinstance(block.attention, Linear) else ""
            layer.self_attn = StandIn(linear, spec.hidden_size, 2)
            layer.input_layernorm = layer.input_layernorm if linear else torch.nn.Identity()
        if isinstance(block.ffn, Mlp):
            own.intermediate_size = block.ffn.width
            layer.mlp = LlamaMLP(own)
        else:
            linear = "linear_mlp" if isinstance(block.ffn, Linear) else ""
            layer.mlp = StandIn(linear, spec.hidden_size, 1)
            layer.post_attention_layernorm = layer.post_attention_layernorm if linear else torch.nn.Identity()
    model.load_state_dict({name: torch.from_numpy(w.astype(np.float32)) for name, w in weights.items()})
    return model


def test_scales_of_every_kind_of_block(tmp_path: Path) -> None:
    source, weights = write_model(tmp_path / "m"), random_weights(tiny_config())
    spec = load_spec(source)
    model = nas_model(spec, weights)
    rng = np.random.default_rng(5)
    texts = [[int(t) for t in rng.integers(0, spec.vocab_size, n)] for n in (9, 64, 200)]

    read = {name: w.astype(np.float32) for name, w in weights.items()}.__getitem__
    ours = fw.forward(spec, fw.hf_ends(spec, read), fw.hf_blocks(spec, read), texts)
    with torch.no_grad():
        for logits, ids in zip(ours, texts, strict=True):
            assert np.abs(logits - model(torch.tensor([ids])).logits[0].numpy()).max() < 1e-3, "the same model"

    quantize(model, texts, 1, kv_fp8=True)
    amax, scales = read_amax(model), our_scales(source, texts, tmp_path / "state")
    found, weight_scales = {}, {}
    for i in range(len(spec.blocks)):
        for group, names in quant_groups(spec, i).items():
            modules = [amax[name.removesuffix(".weight")] for name in names]
            found[group] = max(m["input"] for m in modules) / 448
            weight_scales[group] = max(m["weight"] for m in modules) / 448
        if i in spec.attention_blocks:
            kv = amax[f"model.layers.{i}.self_attn"]
            found |= {f"model.layers.{i} keys": kv["key"] / 448, f"model.layers.{i} values": kv["value"] / 448}
    assert {"model.layers.2.attention_linear", "model.layers.4.ffn_linear", "model.layers.5 keys"} <= found.keys()
    assert_close(statistics(scales), found, EXACT)
    # A quotient in float32 against one in float64.
    assert_close({g: pair.weight for b in scales for g, pair in b.groups.items()}, weight_scales, 1e-6)
