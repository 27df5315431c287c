"""E4M3: every value against the reference library; scales, tables, maxima and their rules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemobuild.convert import fp8
from nemobuild.convert.bf16 import Buffers
from nemobuild.convert.fp8_map import scale_value
from nemobuild.convert.scales import (
    BlockScales,
    GroupScales,
    KvScales,
    block_of,
    check_scales,
    dump_scales,
    group_of,
    load_scales,
    quant_groups,
)
from nemobuild.convert.tensor_map import ScaleRef
from nemobuild.errors import IntegrityError
from nemobuild.model.e4m3 import DECODE, decode, encode
from nemobuild.model.hf_config import spec_from_config
from nemobuild.weights.safetensors import TensorInfo
from tests.fp8_models import given_scales
from tests.tiny import llama_config, random_weights, tiny_config

FP8 = ml_dtypes.float8_e4m3fn
NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F8_E4M3": FP8}
scales_st = st.floats(2.0**-126, 2.0**100, width=32)


def reference(values: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Codes by ml_dtypes, which makes NaN of what is too large; we saturate."""
    with np.errstate(all="ignore"):
        return np.clip(values.astype(np.float32) / np.float32(scale), -448, 448).astype(FP8).view(np.uint8)


def agree(codes: np.ndarray, expected: np.ndarray) -> None:
    nan = (expected & 0x7F) == 0x7F
    np.testing.assert_array_equal(codes[~nan], expected[~nan])
    assert ((codes[nan] & 0x7F) == 0x7F).all()


def test_the_256_values() -> None:
    np.testing.assert_array_equal(DECODE, np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32))
    assert DECODE[0x7E] == 448
    with pytest.raises(ValueError, match="read-only"):
        DECODE[0] = 1


def test_every_value_decodes_and_encodes_to_itself() -> None:
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    np.testing.assert_array_equal(encode(decode(codes)), codes)
    np.testing.assert_array_equal(encode(decode(codes, 0.37), 0.37), codes)


def test_encoding_of_all_exponents_ties_and_neighbours() -> None:
    """Every float32 whose low 10 bits are zero, and the neighbours of all ties between two codes."""
    coarse = (np.arange(1 << 22, dtype=np.uint32) << 10).view(np.float32)
    finite = np.sort(DECODE[np.isfinite(DECODE)]).astype(np.float64)
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(ties, np.float32(x)) for x in (-np.inf, np.inf)]
    values = np.concatenate([coarse, ties, *near])
    agree(encode(values), reference(values))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40), scales_st)
def test_encoding_with_a_scale(values: list[float], scale: float) -> None:
    array = np.array(values, np.float32)
    agree(encode(array, scale), reference(array, scale))


def test_saturation_and_nan() -> None:
    values = np.array([448, 463.9, 464, 480, 1e38, np.inf, -np.inf, np.nan], np.float32)
    assert encode(values).tolist() == [0x7E] * 6 + [0xFE, 0x7F]
    assert encode(values[:6], 1e-30).tolist() == [0x7E] * 6


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("scale", [1.0, 0.0123, 3.4e-38, 700.0])
def test_a_table_is_the_cast_of_every_bit_pattern(dtype: str, scale: float) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    agree(fp8.cast_table(dtype, scale), reference(bits.view(NUMPY[dtype]), scale))


def test_a_table_from_one_scale_to_another() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(fp8.cast_table("F8_E4M3", 0.25, 0.25), codes)
    values = codes.view(FP8).astype(np.float32) * np.float32(0.011)
    agree(fp8.cast_table("F8_E4M3", 0.013, 0.011), reference(values, 0.013))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
@pytest.mark.parametrize("rows", [1, 700])
def test_codes_of_a_chunk(dtype: str, rows: int) -> None:
    """More items than one look-up takes, and a scale that is not a power of two."""
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((rows, 96)) * 3).astype(NUMPY[dtype])
    amax = float(np.abs(values.astype(np.float32)).max())
    source_scale = 0.7 if dtype == "F8_E4M3" else 1.0
    scale = fp8.scale_of(amax) * 1.3
    info = TensorInfo("t", dtype, values.shape, Path("x"), 0, values.nbytes)
    raw = values.view(np.uint8).reshape(-1)
    codes, zeros = fp8.fp8_codes(raw, info, 0, scale, source_scale, Buffers())
    agree(codes, reference(values.astype(np.float32) * np.float32(source_scale), scale).reshape(-1))
    assert not zeros
    nothing, zeros = fp8.fp8_codes(np.zeros_like(raw), info, 0, scale, source_scale, Buffers())
    assert zeros and not nothing.any()


def test_a_chunk_of_negative_zeros_is_zero() -> None:
    values = np.array([-0.0, 0.0], ml_dtypes.bfloat16)
    info = TensorInfo("t", "BF16", (2,), Path("x"), 0, 4)
    codes, zeros = fp8.fp8_codes(values.view(np.uint8), info, 0, 1.0, 1.0, Buffers())
    assert zeros and codes.tolist() == [0x80, 0]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
def test_what_a_chunk_must_not_hold(dtype: str) -> None:
    values = np.ones((4, 5), NUMPY[dtype])
    info = TensorInfo("some.weight", dtype, (40, 5), Path("x"), 0, 0)
    values[2, 3] = -np.nan
    with pytest.raises(IntegrityError, match=r"'some.weight'.*NaN or Inf at \[12, 3\]"):
        fp8.fp8_codes(values.view(np.uint8).reshape(-1), info, 50, 1.0, 1.0, Buffers())
    values[2, 3] = 3
    raw = values.view(np.uint8).reshape(-1)
    fp8.fp8_codes(raw, info, 0, fp8.scale_of(3.0), 1.0, Buffers())
    with pytest.raises(IntegrityError, match=r"'some.weight'.* reaches 3, but its scale only 2\.9") as caught:
        fp8.fp8_codes(raw, info, 0, fp8.scale_of(2.99), 1.0, Buffers())
    assert caught.value.code == "scale-too-small"


@settings(deadline=None)
@given(st.lists(st.floats(width=16), min_size=1, max_size=30), st.sampled_from(sorted(NUMPY)))
def test_amax_is_that_of_the_values(values: list[float], dtype: str) -> None:
    with np.errstate(all="ignore"):
        array = np.array(values, np.float32).astype(NUMPY[dtype])
    wide = np.abs(array.astype(np.float32))
    raw = array.view({1: np.uint8, 2: np.uint16, 4: np.float32}[array.itemsize])
    found = fp8.amax_of(raw, dtype)
    assert math.isnan(found) if np.isnan(wide).any() else found == wide.max()


def test_amax_of_nothing() -> None:
    assert fp8.amax_of(np.zeros(0, np.uint16), "BF16") == 0


def test_scale_rules() -> None:
    assert fp8.scale_of(0.0) == 1.0
    assert fp8.scale_of(3.25) == float(np.float32(3.25) / np.float32(448))
    assert fp8.scale_of(1e-38) == 2.0**-126
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    assert encode(np.array([largest], np.float32), fp8.scale_of(largest)).tolist() == [0x7E]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 0x7F7F))
def test_no_bf16_tensor_saturates_under_its_own_scale(bits: int) -> None:
    amax = float(np.array([bits], np.uint16).view(ml_dtypes.bfloat16)[0])
    quotient = np.float32(amax) / np.float32(fp8.scale_of(amax))
    assert quotient <= np.float32(448) * np.float32(fp8._ROUNDING)


def test_requantisation_error_is_measured() -> None:
    rng = np.random.default_rng(2)
    codes = encode(rng.standard_normal(5000).astype(np.float32), 0.01)
    counts = np.zeros(256, np.int64)
    fp8.count_codes(codes[:2000], counts)
    fp8.count_codes(codes[2000:], counts)
    before = codes.view(FP8).astype(np.float64) * 0.01
    after = reference(before.astype(np.float32), 0.013).view(FP8).astype(np.float64) * 0.013
    expected = np.sqrt(np.sum((after - before) ** 2) / np.sum(before**2))
    assert fp8.requantization_error(counts, 0.01, 0.013) == pytest.approx(expected, rel=1e-5)
    assert 0.005 < expected < 0.05
    # Twice the scale moves exponents only: nothing but subnormals is lost.
    assert fp8.requantization_error(counts, 0.01, 0.02) < 1e-3
    assert fp8.requantization_error(np.zeros(256, np.int64), 0.01, 0.013) == 0


@pytest.mark.parametrize("config", [tiny_config(), llama_config()])
def test_groups_are_the_matrices_of_the_blocks(config: dict[str, Any]) -> None:
    spec = spec_from_config(config)
    matrices = [n for n, s in spec.tensor_shapes().items() if n.startswith("model.layers.") and len(s) == 2]
    assert sorted(group_of(spec)) == sorted(matrices)
    for i in range(len(spec.blocks)):
        assert all(block_of(group) == i for group in quant_groups(spec, i))


def test_groups_share_an_input() -> None:
    spec = spec_from_config(llama_config())
    assert quant_groups(spec, 2) == {
        "model.layers.2.qkv": tuple(f"model.layers.2.self_attn.{x}_proj.weight" for x in "qkv"),
        "model.layers.2.o": ("model.layers.2.self_attn.o_proj.weight",),
        "model.layers.2.gate_up": ("model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"),
        "model.layers.2.down": ("model.layers.2.mlp.down_proj.weight",),
    }


@settings(deadline=None)
@given(st.lists(st.tuples(scales_st, st.none() | scales_st, scales_st), max_size=5))
def test_scales_survive_json_exactly(numbers: list[tuple[float, float | None, float]]) -> None:
    blocks = [
        BlockScales({f"model.layers.{i}.o": GroupScales(w, x)}, KvScales(k, w) if x else None)
        for i, (w, x, k) in enumerate(numbers)
    ]
    assert load_scales(dump_scales(blocks)) == blocks


@pytest.mark.parametrize(
    "text", ["", "{}x", "[1]", '[{"groups": {}}]', '[{"groups": {"a": {"weight": 0.1, "input": "b"}}}]']
)
def test_scales_that_are_not(text: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        load_scales(text, "my.json")
    assert caught.value.code == "bad-scales"
    assert "my.json" in caught.value.what


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda g, kv: (g | {"model.layers.0.o": GroupScales(0.0, 1.0)}, kv),
            "weight scale of 'model.layers.0.o' is 0",
        ),
        (lambda g, kv: (g | {"model.layers.0.o": GroupScales(-1.0, 1.0)}, kv), "weight scale of 'model.layers.0.o'"),
        (lambda g, kv: (g | {"model.layers.0.o": GroupScales(0.1, 1.0)}, kv), "0.1, not a positive float32"),
        (lambda g, kv: (g | {"model.layers.0.qkv": GroupScales(1.0, math.inf)}, kv), "input scale of .*qkv"),
        (lambda g, kv: (g | {"model.layers.0.qkv": GroupScales(1.0, math.nan)}, kv), "input scale of .*qkv"),
        (lambda g, kv: (g | {"model.layers.0.qkv": GroupScales(1.0, None)}, kv), "qkv' has no input scale"),
        (lambda g, kv: (g | {"model.layers.1.o": GroupScales(1.0, 1.0)}, kv), "'model.layers.1.o'"),
        (lambda g, kv: ({k: v for k, v in g.items() if not k.endswith("down")}, kv), "'model.layers.0.down'"),
        (lambda g, kv: (g, None), "block 0 has no KV scales"),
        (lambda g, kv: (g, KvScales(0.0, 1.0)), "key scale of block 0"),
        (lambda g, kv: (g, KvScales(1.0, math.nan)), "value scale of block 0"),
    ],
)
def test_scales_that_cannot_be_used(change: Any, word: str) -> None:
    config = llama_config()
    spec, block = spec_from_config(config), given_scales(config, random_weights(config))[0]
    check_scales(block, spec, 0, static=True, kv=True)
    broken = BlockScales(*change(dict(block.groups), block.kv))
    with pytest.raises(IntegrityError, match=word) as caught:
        check_scales(broken, spec, 0, static=True, kv=True)
    assert caught.value.code == "bad-scales"


def test_kv_scales_are_clamped_on_demand() -> None:
    scales = BlockScales({}, KvScales(0.25, 3.0))
    values = {
        clamp: [scale_value(ScaleRef(0, kind), scales, clamp_kv=clamp) for kind in ("key", "value", "kv")]
        for clamp in (True, False)
    }
    assert values == {True: [1.0, 3.0, 3.0], False: [0.25, 3.0, 3.0]}
