"""FP8 checkpoints on the CPU: values, scales and cache as the reference library casts them, and every fault refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nemobuild.engine.cpu import checkpoint, fp8
from nemobuild.engine.cpu.checkpoint import open_checkpoint
from nemobuild.engine.cpu.fp8 import Fp8Matrix
from nemobuild.engine.cpu.panels import to_panels
from nemobuild.engine.cpu.runner import Runner
from nemobuild.errors import DoesNotFit, NemobuildError
from nemobuild.model import forward as fw
from nemobuild.model.hf_config import spec_from_config
from tests.checkpoints import FP8, Fp8Scales, cast, fp8_scales, write_fp8_checkpoint
from tests.test_cpu_checkpoint import edit_config, edit_tensors
from tests.test_cpu_engine import Client, greedy, prompt, start
from tests.tiny import llama_config, random_weights, tiny_config

NAS, LLAMA = tiny_config(), llama_config()
PROMPTS = [prompt(i, 24) for i in range(6)]
MODELS = {name: (config, random_weights(config)) for name, config in (("nas", NAS), ("llama", LLAMA))}
SCALES: dict[str, Fp8Scales] = {
    name: fp8_scales(config, weights, PROMPTS) for name, (config, weights) in MODELS.items()
}


def write(folder: Path, name: str = "nas", tp: int = 1, pp: int = 1, **options: Any) -> Path:
    config, weights = MODELS[name]
    return write_fp8_checkpoint(folder, config, weights, SCALES[name], tp, pp, **options)


def judge(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -448, 448).astype(FP8).astype(np.float32)


def test_every_code_and_every_bf16_value() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(fp8.decode(codes), codes.view(FP8).astype(np.float32))
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    with np.errstate(invalid="ignore"):  # some of these are signalling NaN
        np.testing.assert_array_equal(fp8.round_e4m3(every), judge(every))


@given(hnp.arrays(np.float32, 40, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_rounding_is_that_of_the_reference(values: np.ndarray) -> None:
    before = values.copy()
    np.testing.assert_array_equal(fp8.round_e4m3(values), judge(values))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("in_panels", [False, True])
@pytest.mark.parametrize("input_scale", [0.013, None])
def test_linear_rounds_its_input_by_its_scale(in_panels: bool, input_scale: float | None) -> None:
    """The scale 0.013 is too small for some inputs: they saturate."""
    rng = np.random.default_rng(0)
    values, x = judge(rng.standard_normal((70, 33), np.float32) * 99), rng.standard_normal((5, 33), np.float32) * 3
    scale = np.float32(input_scale or np.abs(x).max() / np.float32(448))
    if input_scale:
        assert (np.abs(x) > 448 * scale).any()
    found = fp8.linear("o", x, Fp8Matrix(to_panels(values) if in_panels else values, 0.5, input_scale))
    exact = judge(x / scale).astype(np.float64) @ values.T.astype(np.float64) * float(scale) * 0.5
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    assert np.isfinite(fp8.linear("o", np.zeros((2, 33), np.float32), Fp8Matrix(values, 0.5, input_scale))).all()


def test_cache_rows_hold_what_an_fp8_cache_gives_back() -> None:
    rng = np.random.default_rng(1)
    rows, values = fp8.Fp8Rows((2, 9, 4), 0.01), rng.standard_normal((2, 3, 4), np.float32) * 2
    rows[:, np.array([1, 5, 2])] = values
    np.testing.assert_array_equal(rows[:, [1, 5, 2]], judge(values / np.float32(0.01)) * np.float32(0.01))
    assert not rows[:, 6:9].any()


def dequantised(weights: dict[str, np.ndarray], scales: Fp8Scales, config: dict[str, Any]) -> list[fw.BlockWeights]:
    """The blocks that a checkpoint of ``weights`` stands for, by the reference library's cast."""
    spec, blocks = spec_from_config(config), []
    for i in range(len(spec.blocks)):
        block = fw.hf_block(spec, i, lambda name: weights[name].astype(np.float32))
        parts = {name: getattr(block, name) for name in ("attention_norm", "ffn_norm")}
        for group in ("qkv", "o", "attention_linear", "gate_up", "down", "ffn_linear"):
            if (whole := getattr(block, group)) is not None:
                scale = scales.weight[i, group]
                parts[group] = cast(whole, scale).astype(np.float32) * scale
        blocks.append(fw.BlockWeights(**parts))
    return blocks


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_any_sharding_gives_the_same_values(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    config, weights = MODELS[name]
    opened = open_checkpoint(write(tmp_path, name, tp, pp))
    for i, wanted in enumerate(dequantised(weights, SCALES[name], config)):
        found = opened.block(i)
        for group in ("qkv", "o", "attention_linear", "gate_up", "down", "ffn_linear"):
            a, b = getattr(wanted, group), getattr(found, group)
            assert (a is None) == (b is None), (i, group)
            if a is not None:
                assert b.input_scale == SCALES[name].input[i, group]
                np.testing.assert_array_equal(b.dequantised(), a, err_msg=f"block {i} {group}")
        assert opened.kv_scale(i) == SCALES[name].kv.get(i)


def reference_logits(tokens: list[int], *, kv: bool) -> np.ndarray:
    """Every linear written out: cast the input, multiply, scale. Keys and values cast where the cache is FP8."""
    config, weights = MODELS["nas"]
    spec, scales = spec_from_config(config), SCALES["nas"]
    ends = fw.hf_ends(spec, lambda name: weights[name].astype(np.float32))
    hidden = fw.embed(ends, np.asarray(tokens))
    step = fw.make_step(spec, [fw.Segment(0, 0, len(tokens))], hidden)

    class Rows:
        def __init__(self, like: np.ndarray, scale: np.float32) -> None:
            self.rows, self.scale = like, scale

        def __setitem__(self, where: Any, values: np.ndarray) -> None:
            self.rows[where] = judge(values / self.scale) * self.scale

        def __getitem__(self, where: Any) -> np.ndarray:
            return self.rows[where]

    for i, weights_of_block in enumerate(dequantised(weights, scales, config)):

        def linear(name: str, x: np.ndarray, weight: np.ndarray, i: int = i) -> np.ndarray:
            scale = scales.input[i, name]
            return (judge(x / scale) * scale) @ weight.T

        cache = fw.new_cache(spec, spec.blocks[i], len(tokens), hidden)
        if cache is not None and kv:
            cache = fw.KvCache(Rows(cache.keys, scales.kv[i]), Rows(cache.values, scales.kv[i]))
        hidden = fw.run_block(spec, spec.blocks[i], weights_of_block, hidden, step, cache, linear)
    return fw.head(spec, ends, hidden)


@pytest.mark.parametrize("layout", ["plain", "panels"])
@pytest.mark.parametrize("kv", [True, False])
def test_runner_multiplies_as_written_out(layout: Any, kv: bool, tmp_path: Path) -> None:
    """And differs from BF16 by what FP8 costs random weights: more than nothing, less than a third of the spread."""
    tokens = prompt(3, 20)
    runner = Runner(open_checkpoint(write(tmp_path, tp=2, pp=2, kv=kv)), 64, layout)
    assert runner.uses_panels == (layout == "panels")
    found = runner.step([fw.Segment(0, 0, 20)], tokens, range(20))
    wanted = reference_logits(tokens, kv=kv)
    # The order of a sum may move an input over a rounding boundary, so single values differ by more than the sums do.
    assert np.abs(found - wanted).mean() < 2e-2 * wanted.std()
    weights = {name: w.astype(np.float32) for name, w in MODELS["nas"][1].items()}
    spec = spec_from_config(NAS)
    (exact,) = fw.forward(
        spec, fw.hf_ends(spec, weights.__getitem__), fw.hf_blocks(spec, weights.__getitem__), [tokens]
    )
    cost = np.abs(found - exact).mean() / exact.std()
    assert 0.02 < cost < 0.33


def test_fp8_cache_costs_more_than_bf16_cache(tmp_path: Path) -> None:
    tokens = prompt(3, 20)
    with_kv, without = (
        Runner(open_checkpoint(write(tmp_path / str(kv), kv=kv)), 64, "plain").step(
            [fw.Segment(0, 0, 20)], tokens, range(20)
        )
        for kv in (True, False)
    )
    assert np.abs(with_kv - without).mean() > 1e-3 * without.std()


def test_chunked_prefill_and_decode_are_the_same_pass(tmp_path: Path) -> None:
    """Keys and values are read back from the cache in FP8 from the first token on, however the prompt is cut."""
    tokens = prompt(5, 18)
    opened = open_checkpoint(write(tmp_path))
    whole = Runner(opened, 32, "plain").step([fw.Segment(0, 0, 18)], tokens, [17])
    runner = Runner(opened, 32, "plain")
    runner.step([fw.Segment(0, 0, 11)], tokens[:11], [])
    for i in range(11, 18):
        last = runner.step([fw.Segment(0, i, 1)], tokens[i : i + 1], [0])
    assert np.abs(last - whole).mean() < 0.02 * whole.std()


@pytest.mark.parametrize("layout", ["plain", "panels"])
def test_engine_gives_the_likeliest_token(layout: str, tmp_path: Path) -> None:
    with closing(start(write(tmp_path, tp=2), layout=layout)) as engine:
        clients = [Client(engine, greedy(tokens, 1)) for tokens in PROMPTS]
        for client, tokens in zip(clients, PROMPTS, strict=True):
            logits = reference_logits(tokens, kv=True)[-1]
            (token,) = client.wait()
            assert logits[token] > logits.max() - 0.1


@pytest.mark.parametrize("layout", ["plain", "panels"])
def test_greedy_does_not_depend_on_the_batch(layout: str, tmp_path: Path) -> None:
    """Rounding to E4M3 would make a difference of the last bit visible."""
    with closing(start(write(tmp_path), layout=layout)) as engine:
        asked = [greedy(tokens, 12) for tokens in PROMPTS]
        alone = [Client(engine, g).wait() for g in asked]
        clients = [Client(engine, g) for g in asked]
        assert [c.wait() for c in clients] == alone
        assert len({tuple(tokens) for tokens in alone}) > 1


def test_int8_bytes_are_read(tmp_path: Path) -> None:
    """TensorRT-LLM views int8 weights of an FP8 module as E4M3."""
    folder = write(tmp_path)
    wanted = [block.qkv.dequantised() for block in open_checkpoint(folder).blocks() if block.qkv is not None]

    def as_integers(tensors: dict[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            if tensor.dtype == FP8:
                tensors[name] = tensor.view(np.int8)

    edit_tensors(0, as_integers)(folder)
    found = [block.qkv.dequantised() for block in open_checkpoint(folder).blocks() if block.qkv is not None]
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_unequal_gate_and_up_are_fused_with_the_larger_scale(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before = open_checkpoint(folder).block(0).gate_up
    gate = "transformer.layers.0.ffn.gate"

    def change(tensors: dict[str, np.ndarray]) -> None:
        for suffix, factor in ((".weights_scaling_factor", 1.375), (".activation_scaling_factor", 2.0)):
            tensors[gate + suffix] = tensors[gate + suffix] * np.float32(factor)

    edit_tensors(0, change)(folder)
    after = open_checkpoint(folder).block(0).gate_up
    scale = np.float32(before.weight_scale) * np.float32(1.375)
    assert (after.weight_scale, after.input_scale) == (scale, 2 * before.input_scale)
    np.testing.assert_array_equal(after.values[192:], before.values[192:], err_msg="up keeps its bytes")
    np.testing.assert_array_equal(after.values[:192], judge(before.dequantised()[:192] / scale))


def test_keys_and_values_may_have_scales_of_their_own(tmp_path: Path) -> None:
    """The larger one counts, also when ModelOpt writes all four scales."""
    folder = write(tmp_path)
    name = "transformer.layers.1.attention."
    scale = open_checkpoint(folder).kv_scale(1)
    pair = {f"{name}{x}_cache_scaling_factor": np.array([s], np.float32) for x, s in (("k", 0.5), ("v", 2.5))}
    reciprocal = {f"{name}kv_cache_rcp_scaling_factor": np.ones(1, np.float32)}
    edit_tensors(0, lambda t: t.update(reciprocal))(folder)
    assert open_checkpoint(folder).kv_scale(1) == scale
    edit_tensors(0, lambda t: t.update(pair))(folder)
    assert open_checkpoint(folder).kv_scale(1) == 2.5
    edit_tensors(0, lambda t: t.pop(f"{name}kv_cache_scaling_factor"))(folder)
    assert open_checkpoint(folder).kv_scale(1) == 2.5
    edit_tensors(0, lambda t: t.pop(f"{name}v_cache_scaling_factor"))(folder)
    with pytest.raises(NemobuildError, match=r"layers.1.attention.kv_cache_scaling_factor"):
        open_checkpoint(folder)


def test_excluded_linears_stay_bf16(tmp_path: Path) -> None:
    weights = MODELS["nas"][1]
    folder = write(tmp_path)
    modules = ("transformer.layers.0.attention.dense", "transformer.layers.4.ffn")

    def undo(tensors: dict[str, np.ndarray]) -> None:
        hf = ("model.layers.0.self_attn.o_proj.weight", "model.layers.4.mlp.linear_mlp.weight")
        for module, source in zip(modules, hf, strict=True):
            tensors[f"{module}.weight"] = weights[source]
            for scale in ("weights_scaling_factor", "activation_scaling_factor"):
                del tensors[f"{module}.{scale}"]

    edit_tensors(0, undo)(folder)
    edit_config(quantization__exclude_modules=["lm_head", "transformer.layers.0.attention.d*", modules[1]])(folder)
    opened = open_checkpoint(folder)
    o = weights["model.layers.0.self_attn.o_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(opened.block(0).o, o)
    assert isinstance(opened.block(0).qkv, Fp8Matrix)
    assert not isinstance(opened.block(4).ffn_linear, Fp8Matrix)
    logits = Runner(opened, 32, "panels").step([fw.Segment(0, 0, 4)], [1, 2, 3, 4], [3])
    assert np.isfinite(logits).all()


QKV, FC = "transformer.layers.0.attention.qkv", "transformer.layers.0.ffn.fc"


def put(name: str, value: float, rank: int = 0) -> Callable[[Path], None]:
    return edit_tensors(rank, lambda t: t.update({name: np.array([value], np.float32)}))


def half_bf16(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"].astype(ml_dtypes.bfloat16)


FAULTS: list[tuple[str, str, Callable[[Path], None]]] = [
    ("missing-tensor", f"{QKV}.weights_scaling", edit_tensors(0, lambda t: t.pop(f"{QKV}.weights_scaling_factor"))),
    ("missing-tensor", f"{FC}.activation", edit_tensors(1, lambda t: t.pop(f"{FC}.activation_scaling_factor"))),
    ("missing-tensor", "kv_cache", edit_tensors(0, lambda t: t.pop(f"{QKV[:-3]}kv_cache_scaling_factor"))),
    ("missing-tensor", "rank1.* has no .*k_cache", put(f"{QKV[:-3]}k_cache_scaling_factor", 1.0)),
    ("unsupported-dtype", "qkv.weight.*BF16", edit_tensors(0, half_bf16)),
    ("bad-scale", f"0.0 as '{FC}.weights", put(f"{FC}.weights_scaling_factor", 0.0)),
    ("bad-scale", "nan", put(f"{QKV}.activation_scaling_factor", float("nan"))),
    ("bad-scale", "inf", put(f"{QKV[:-3]}kv_cache_scaling_factor", float("inf"))),
    ("bad-scale", "-1.0", put(f"{QKV}.weights_scaling_factor", -1.0)),
    ("ranks-disagree", "rank1.*differs from rank0", put(f"{QKV}.weights_scaling_factor", 0.5, rank=1)),
    (
        "wrong-shape",
        "scaling",
        edit_tensors(0, lambda t: t.update({f"{QKV}.weights_scaling_factor": np.ones((), "f")})),
    ),
    ("unsupported-dtype", "F64", edit_tensors(0, lambda t: t.update({f"{QKV}.weights_scaling_factor": np.ones(1)}))),
    ("surplus-tensor", "kv_cache", edit_config(quantization__kv_cache_quant_algo=None)),
    ("surplus-tensor", "scaling", edit_config(quantization__quant_algo=None)),
    ("bad-checkpoint-config", "lm_head", edit_config(quantization__exclude_modules=["transformer.layers.99*"])),
    ("bad-checkpoint-config", "ffn.fc and", edit_config(quantization__exclude_modules=["lm_head", FC])),
    ("bad-checkpoint-config", "exclude_modules", edit_config(quantization__exclude_modules="lm_head")),
    ("bad-checkpoint-config", "has_zero_point", edit_config(quantization__has_zero_point=True)),
    ("unknown-config-key", "quant_algorithm", edit_config(quantization__quant_algorithm="FP8")),
]


@pytest.mark.parametrize(("code", "names", "damage"), FAULTS, ids=[f"{c}-{n}"[:44] for c, n, _ in FAULTS])
def test_faults(tmp_path: Path, code: str, names: str, damage: Callable[[Path], None]) -> None:
    folder = write(tmp_path, tp=2)
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(NemobuildError, match=names) as caught:
        open_checkpoint(folder)
    assert (caught.value.exit_status, caught.value.code) == (5, code)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    edit_tensors(0, lambda t: t[f"{QKV}.weight"].view(np.uint8).__setitem__((3, 5), 0x7F))(folder)
    with pytest.raises(NemobuildError, match=rf"NaN in '{QKV}.weight'"):
        open_checkpoint(folder).block(0)


def test_too_little_memory_is_refused_before_a_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 on the disk is float32 in memory: four times its size, and the refusal says so in bytes."""
    opened = open_checkpoint(write(tmp_path))
    read: list[str] = []
    monkeypatch.setattr(checkpoint, "read_array", lambda info: read.append(info.name))
    weight_bytes, kv_bytes = 4 * opened.spec.parameter_count, 4 * opened.spec.kv_bytes_per_token(1) * 10**12
    with pytest.raises(DoesNotFit, match=f"{weight_bytes + kv_bytes:,} bytes of memory"):
        Runner(opened, 10**12)
    assert read == []
