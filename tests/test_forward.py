"""The forward pass against a naive float64 one written here, and against itself cut into steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nemobuild.model import forward as fw
from nemobuild.model.forward import Segment
from nemobuild.model.hf_config import spec_from_config
from nemobuild.model.spec import Attention, Linear, Llama3Scaling, Mlp, ModelSpec, Rope
from tests.tiny import llama_config, random_weights, tiny_config

PROMPT = [int(t) for t in np.random.default_rng(7).integers(0, 265, 23)]


def float_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    return {name: w.astype(np.float32) for name, w in random_weights(config, seed).items()}


def reference_logits(spec: ModelSpec, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Position by position, head by head, float64, straight from the papers' formulas."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    half, rope = spec.head_size // 2, spec.rope

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / math.sqrt(float(np.mean(x**2)) + spec.norm_epsilon) * w[name]

    def frequency(pair: int) -> float:
        value = rope.theta ** (-2.0 * pair / spec.head_size)
        if rope.scaling is None:
            return value
        s, wavelength = rope.scaling, 2 * math.pi / value
        if wavelength < s.original_max_position_embeddings / s.high_freq_factor:
            return value
        if wavelength > s.original_max_position_embeddings / s.low_freq_factor:
            return value / s.factor
        smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / (
            s.high_freq_factor - s.low_freq_factor
        )
        return (1 - smooth) * value / s.factor + smooth * value

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        out = np.empty_like(x)
        for pair in range(half):
            angle = position * frequency(pair)
            a, b = x[pair], x[pair + half]
            out[pair] = a * math.cos(angle) - b * math.sin(angle)
            out[pair + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    stream = [w["model.embed_tokens.weight"][t] for t in tokens]
    for i, block in enumerate(spec.blocks):
        p = f"model.layers.{i}"
        if isinstance(block.attention, Attention):
            group, keys, values = spec.query_heads // block.attention.kv_heads, [], []
            for position, x in enumerate(stream):
                x = norm(x, f"{p}.input_layernorm.weight")
                q, k, v = ((w[f"{p}.self_attn.{n}_proj.weight"] @ x).reshape(-1, spec.head_size) for n in "qkv")
                keys.append([rotate(head, position) for head in k])
                values.append(list(v))
                context = []
                for h, head in enumerate(q):
                    head = rotate(head, position)
                    scores = np.array([head @ past[h // group] for past in keys]) / math.sqrt(spec.head_size)
                    chances = np.exp(scores - scores.max())
                    chances /= chances.sum()
                    context.append(sum(c * past[h // group] for c, past in zip(chances, values, strict=True)))
                stream[position] = stream[position] + w[f"{p}.self_attn.o_proj.weight"] @ np.concatenate(context)
        elif isinstance(block.attention, Linear):
            name = f"{p}.self_attn.linear_attn.weight"
            stream = [x + w[name] @ norm(x, f"{p}.input_layernorm.weight") for x in stream]
        ffn_norm = f"{p}.post_attention_layernorm.weight"
        if isinstance(block.ffn, Mlp):
            gate, up, down = (w[f"{p}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
            for position, x in enumerate(stream):
                n = norm(x, ffn_norm)
                g = gate @ n
                stream[position] = x + down @ (g / (1 + np.exp(-g)) * (up @ n))
        elif isinstance(block.ffn, Linear):
            stream = [x + w[f"{p}.mlp.linear_mlp.weight"] @ norm(x, ffn_norm) for x in stream]
    head = w["model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"]
    return np.stack([head @ norm(x, "model.norm.weight") for x in stream])


def load(config: dict[str, Any]) -> tuple[ModelSpec, fw.EndWeights, list[fw.BlockWeights], dict[str, np.ndarray]]:
    spec, weights = spec_from_config(config), float_weights(config)
    return spec, fw.hf_ends(spec, weights.__getitem__), list(fw.hf_blocks(spec, weights.__getitem__)), weights


@pytest.mark.parametrize("config", [tiny_config(), llama_config(), tiny_config(rope_scaling=None)])
def test_equals_the_naive_float64_pass(config: dict[str, Any]) -> None:
    spec, ends, blocks, weights = load(config)
    (logits,) = fw.forward(spec, ends, blocks, [PROMPT])
    expected = reference_logits(spec, weights, PROMPT)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize("index", range(10))
def test_each_kind_of_block_changes_the_stream(index: int) -> None:
    """The comparison above would pass with blocks that do nothing only if they did nothing in both."""
    spec, ends, blocks, _ = load(tiny_config())
    hidden = fw.embed(ends, np.array(PROMPT))
    step = fw.make_step(spec, [Segment(0, 0, len(PROMPT))], hidden)
    cache = fw.new_cache(spec, spec.blocks[index], len(PROMPT), hidden)
    after = fw.run_block(spec, spec.blocks[index], blocks[index], hidden, step, cache)
    empty = index == 6  # neither attention nor FFN
    assert (np.abs(after - hidden).max() == 0) == empty


class Stepper:
    """Runs packed segments against caches that live on."""

    def __init__(self, config: dict[str, Any], rows: int) -> None:
        self.spec, self.ends, self.blocks, _ = load(config)
        self.caches = [fw.new_cache(self.spec, b, rows, self.ends.norm) for b in self.spec.blocks]
        for cache in self.caches:
            if cache is not None:  # stale rows of an earlier owner must not matter
                cache.keys[:] = np.nan
                cache.values[:] = np.nan

    def __call__(self, segments: list[Segment], tokens: list[int]) -> np.ndarray:
        hidden = fw.embed(self.ends, np.array(tokens))
        step = fw.make_step(self.spec, segments, hidden)
        for block, weights, cache in zip(self.spec.blocks, self.blocks, self.caches, strict=True):
            hidden = fw.run_block(self.spec, block, weights, hidden, step, cache)
        logits: np.ndarray = fw.head(self.spec, self.ends, hidden)
        return logits


@pytest.mark.parametrize("cut", [1, 2, 5, 22])
def test_chunked_prefill_and_decode_equal_the_whole(cut: int) -> None:
    run = Stepper(tiny_config(), 64)
    (whole,) = fw.forward(run.spec, run.ends, run.blocks, [PROMPT])
    parts = [
        run([Segment(11, start, len(PROMPT[start : start + cut]))], PROMPT[start : start + cut])
        for start in range(0, len(PROMPT), cut)
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-4)


def test_long_prompts_are_cut_into_spans() -> None:
    config = tiny_config()
    spec, ends, blocks, _ = load(config)
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 265, 2 * fw._QUERIES_PER_SPAN + 1)]
    (whole,) = fw.forward(spec, ends, blocks, [tokens])
    (start,) = fw.forward(spec, ends, blocks, [tokens[:40]])
    np.testing.assert_allclose(whole[:40], start, atol=1e-4)
    run = Stepper(config, len(tokens))
    run([Segment(0, 0, len(tokens) - 1)], tokens[:-1])
    last = run([Segment(0, len(tokens) - 1, 1)], tokens[-1:])
    np.testing.assert_allclose(last[0], whole[-1], atol=1e-4)


def test_sequences_at_different_positions_share_a_step() -> None:
    """Two decodes at other positions and a prefill chunk, packed, equal each alone."""
    run = Stepper(tiny_config(), 100)
    rng = np.random.default_rng(3)
    a, b, c = ([int(t) for t in rng.integers(0, 265, n)] for n in (9, 17, 12))
    whole = fw.forward(run.spec, run.ends, run.blocks, [a, b, c])
    run([Segment(0, 0, 8), Segment(30, 0, 16), Segment(60, 0, 5)], a[:8] + b[:16] + c[:5])
    packed = run([Segment(0, 8, 1), Segment(60, 5, 7), Segment(30, 16, 1)], a[8:] + c[5:] + b[16:])
    np.testing.assert_allclose(packed[0], whole[0][8], atol=1e-4)
    np.testing.assert_allclose(packed[1:8], whole[2][5:], atol=1e-4)
    np.testing.assert_allclose(packed[8], whole[1][16], atol=1e-4)


def test_llama3_frequencies_by_formula() -> None:
    """Llama 3.1 8B: theta 500000, head 128, factor 8, low 1, high 4, original 8192."""
    scaling = Llama3Scaling(8.0, 1.0, 4.0, 8192)
    plain = fw.rope_frequencies(Rope(500000.0), 128)
    scaled = fw.rope_frequencies(Rope(500000.0, scaling), 128)
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 2048, wavelengths > 8192
    assert short.sum() == 29  # 2 pi theta ** (i / 64) < 2048 for i < 28.2
    assert long.sum() == 29  # ... > 8192 for i > 34.98
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-15)
    # Pair 32: wavelength 2 pi sqrt(500000) = 4442.88, 8192 / 4442.88 = 1.84385 turns, 0.281283 of the way from 1 to 4.
    assert scaled[32] == pytest.approx(plain[32] * (0.281283 + (1 - 0.281283) / 8), rel=1e-5)
    assert plain[1] == pytest.approx(500000 ** (-1 / 64))


def test_rotation_by_hand() -> None:
    """Head size 2 is one pair: at position p with frequency 1 the vector turns by p radians."""
    cos, sin = fw.rope_tables(Rope(10000.0), 2, [0, 1, 3])
    turned = fw._rotate(np.array([[[1.0, 0.0]]] * 3), cos[:, None], sin[:, None])
    np.testing.assert_allclose(
        turned[:, 0], [[1, 0], [math.cos(1), math.sin(1)], [math.cos(3), math.sin(3)]], rtol=1e-6
    )


def test_a_caller_sees_the_input_of_every_linear() -> None:
    spec, ends, blocks, weights = load(tiny_config())
    seen: list[tuple[str, tuple[int, ...]]] = []

    def observe(name: str, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        seen.append((name, x.shape))
        assert x.shape[1] == weight.shape[1]
        return fw.linear(name, x, weight)  # type: ignore[no-any-return]

    fw.forward(spec, ends, blocks, [PROMPT], observe)
    assert [n for n, _ in seen[:4]] == ["qkv", "o", "gate_up", "down"]
    assert {n for n, _ in seen} == {"qkv", "o", "attention_linear", "gate_up", "down", "ffn_linear", "head"}
    matrices = sum(w.ndim == 2 for w in weights.values())
    fused = 2 * len(spec.attention_blocks) + sum(isinstance(b.ffn, Mlp) for b in spec.blocks)
    assert len(seen) == matrices - fused - 1  # all but the embedding


def test_silu_does_not_overflow() -> None:
    with np.errstate(all="raise", under="ignore"):
        values = fw._silu(np.array([-1e4, -100, 0, 100, 1e4], np.float32))
    np.testing.assert_allclose(values, [0, 0, 0, 100, 1e4])
