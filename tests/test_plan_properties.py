"""What must hold for every plan, for random block lists, cards and limits; the converter judges the weights."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, pairwise

from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from nemobuild.config import EngineConfig
from nemobuild.convert import modelopt_hf, trtllm
from nemobuild.convert.fp8_map import with_fp8
from nemobuild.engine.tensorrt import engine_inputs
from nemobuild.errors import UsageError
from nemobuild.model.parallel import balanced_ranges, pipeline_ranges
from nemobuild.model.spec import Attention, Block, Linear, Mlp, ModelSpec, NoOp, Rope
from nemobuild.plan.gpus import Gpu, gpus
from nemobuild.plan.planner import Plan, plan
from nemobuild.plan.roofline import decode_ceiling, prefill_ceiling
from nemobuild.weights.safetensors import ITEM_BYTES

CARDS = gpus()
FP8_CARDS = [gpu for gpu in CARDS if gpu.fp8]


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    attention = st.one_of(
        st.sampled_from([1, 2, 4, 8, 16]).map(Attention), st.just(Linear()), st.just(NoOp()), st.just(NoOp())
    )
    ffn = st.one_of(st.integers(1, 200).map(lambda n: Mlp(256 * n)), st.just(Linear()), st.just(NoOp()))
    return ModelSpec(
        model_type="nemotron-nas",
        hidden_size=128 * draw(st.sampled_from([8, 16, 32, 64, 128])),
        vocab_size=draw(st.integers(1000, 200_000)),
        query_heads=16,
        head_size=draw(st.sampled_from([64, 128])),
        blocks=tuple(draw(st.lists(st.builds(Block, attention, ffn), min_size=8, max_size=40))),
        rope=Rope(500_000.0),
        norm_epsilon=1e-5,
        max_context_tokens=131_072,
        tied_embeddings=draw(st.booleans()),
    )


@st.composite
def profiles(draw: st.DrawFn, *runtimes: str) -> EngineConfig:
    runtime = draw(st.sampled_from(runtimes or ("tensorrt", "llmapi")))
    fp8 = draw(st.booleans())
    tp, pp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 3, 8]))
    limits = {
        "max_context_tokens": draw(st.integers(1024, 131_072)),
        "max_batch_size": draw(st.none() | st.integers(1, 64)),
        "default_max_tokens": draw(st.integers(1, 500)),
        "thinking_tokens": draw(st.none() | st.integers(1, 500)),
        "expected_prompt_tokens": draw(st.integers(1, 4000)),
    }
    return EngineConfig.model_validate(
        {
            "description": "random",
            "runtime": runtime,
            "model": {"source": "x"},
            "machine": {"gpu": "h100-sxm", "count": tp * pp},
            "checkpoint": {
                "precision": "fp8" if fp8 else "bf16",
                "kv_cache": draw(st.sampled_from(["bf16", "fp8"])) if fp8 else "bf16",
                "format": "hf" if runtime == "llmapi" else "trtllm",
                "tensor_parallel": tp,
                "pipeline_parallel": pp,
            },
            "build": {
                "max_num_tokens": draw(st.none() | st.integers(64, 16384)),
                "kv_cache_fraction": draw(st.none() | st.floats(0.1, 0.95)),
                "pipeline_split": draw(st.sampled_from(["even", "balanced"])) if runtime == "llmapi" else "even",
            },
            "limits": limits,
            "reasoning": {"policy": "none"},
        }
    )


def changed(profile: EngineConfig, section: str, **fields: object) -> EngineConfig:
    return profile.model_copy(update={section: getattr(profile, section).model_copy(update=fields)})


def made(spec: ModelSpec, profile: EngineConfig, card: Gpu) -> Plan:
    try:
        return plan(spec, profile, name="random", gpu=card)
    except UsageError as error:  # only what the profile itself sets can contradict
        assert error.code == "contradictory-limits" and profile.runtime == "tensorrt"
        assert profile.build.max_num_tokens is not None
        reject()


@settings(max_examples=60, deadline=None)
@given(specs(), profiles(), st.sampled_from(FP8_CARDS))
def test_weights_are_the_bytes_of_the_checkpoint(spec, profile, card):
    checkpoint = profile.checkpoint
    fp8, fp8_kv = checkpoint.precision == "fp8", checkpoint.kv_cache == "fp8"
    profile = changed(profile, "build", pipeline_split="even")
    if checkpoint.format == "hf":  # the folder is the same for any split; one rank has all of it
        profile = changed(profile, "checkpoint", tensor_parallel=1, pipeline_parallel=1)
        spec = replace(spec, tied_embeddings=False)
        tensors = modelopt_hf.tensor_map(spec)
        names = modelopt_hf.SCALES
    else:
        tensors = trtllm.tensor_map(spec, checkpoint.tensor_parallel, checkpoint.pipeline_parallel)
        names = trtllm.SCALES
    if fp8:
        tensors = with_fp8(tensors, spec, names, kv=fp8_kv, static=True)
    expected = [sum(math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in rank) for rank in tensors.ranks]
    assert [rank.weight_bytes for rank in made(spec, profile, card).ranks] == expected


@settings(max_examples=60, deadline=None)
@given(specs(), profiles(), st.sampled_from(FP8_CARDS))
def test_the_ledger_adds_up(spec, profile, card):
    p = made(spec, profile, card)
    assert len(p.ranks) == profile.checkpoint.ranks
    assert [i for blocks in p.stages for i in blocks] == list(range(len(spec.blocks)))
    assert p.headroom_bytes == min(rank.budget_bytes - rank.needed_bytes for rank in p.ranks)
    assert p.fits == (p.headroom_bytes >= 0)
    for rank in p.ranks:
        ledger = {line.name: line.bytes for line in rank.lines}
        assert all(size >= 0 for name, size in ledger.items() if name != "reserve and unused" or p.fits)
        assert ledger["KV cache"] == p.kv_cache_tokens * rank.kv_bytes_per_token
        if p.fits:
            assert rank.total_bytes == rank.budget_bytes
        elif profile.build.kv_cache_fraction is None:
            assert rank.total_bytes == rank.needed_bytes
    if profile.checkpoint.tensor_parallel == 1:
        size = 1 if profile.checkpoint.kv_cache == "fp8" else 2
        assert sum(rank.kv_bytes_per_token for rank in p.ranks) == spec.kv_bytes_per_token(size)


@settings(max_examples=150, deadline=None)
@given(specs(), profiles("tensorrt"), st.sampled_from(FP8_CARDS), st.integers(64, 4096), st.booleans())
def test_what_fits_is_what_build_accepts(spec, profile, card, context, streaming):
    profile = changed(profile, "limits", max_context_tokens=context)
    if streaming:
        profile = changed(profile, "build", weight_streaming=True, gemm_plugin="disable")
    p = made(spec, profile, card)
    if p.fits:
        engine_inputs(p, None, None)


@settings(max_examples=60, deadline=None)
@given(specs(), profiles(), st.sampled_from(FP8_CARDS), st.integers(1, 300))
def test_more_memory_never_turns_yes_into_no(spec, profile, card, more_gib):
    small, large = (
        made(spec, profile, card),
        made(spec, profile, replace(card, name="larger", memory_bytes=card.memory_bytes + (more_gib << 30))),
    )
    assert large.headroom_bytes > small.headroom_bytes
    assert large.fits or not small.fits
    shared = made(spec, changed(profile, "machine", memory_share=0.7), card)
    assert shared.headroom_bytes <= small.headroom_bytes
    if small.fits:
        assert large.max_batch_size >= 1 and large.kv_cache_tokens * 1.02 >= small.kv_cache_tokens


@settings(max_examples=60, deadline=None)
@given(specs(), profiles(), st.sampled_from(FP8_CARDS), st.integers(1, 131_072))
def test_more_context_never_needs_less(spec, profile, card, context):
    assume(context > profile.limits.max_context_tokens)
    short, long = made(spec, profile, card), made(spec, changed(profile, "limits", max_context_tokens=context), card)
    assert all(b.needed_bytes >= a.needed_bytes for a, b in zip(short.ranks, long.ranks, strict=True))
    assert short.fits or not long.fits


@settings(max_examples=60, deadline=None)
@given(specs(), profiles(), st.sampled_from(FP8_CARDS))
def test_limits_are_set_and_hold(spec, profile, card):
    p = made(spec, profile, card)
    limits, build = p.profile.limits, p.profile.build
    assert limits.max_batch_size >= 1 and build.max_num_tokens >= 1 and limits.kv_cache_tokens % 32 == 0
    assert build.max_num_tokens >= limits.max_batch_size or profile.build.max_num_tokens is not None
    assert 0 < build.kv_cache_fraction < 1
    for name in ("max_batch_size", "max_context_tokens"):
        set_by_user = getattr(profile.limits, name)
        assert set_by_user is None or getattr(limits, name) == set_by_user
    if p.fits:
        assert limits.kv_cache_tokens >= limits.max_context_tokens
        assert p.concurrency[limits.max_context_tokens] >= 1
        counts = [count for _, count in sorted(p.concurrency.items())]
        assert counts == sorted(counts, reverse=True)


@settings(max_examples=40, deadline=None)
@given(specs(), profiles(), st.sampled_from(FP8_CARDS), st.integers(1, 512), st.integers(1, 512))
def test_ceilings_move_the_right_way(spec, profile, card, few, more):
    assume(few < more and any(not isinstance(part, NoOp) for b in spec.blocks for part in (b.attention, b.ffn)))
    p = made(spec, profile, card)
    a, b = (decode_ceiling(spec, p.shapes, card, n, 4096) for n in (few, more))
    assert b.tokens_per_s >= a.tokens_per_s * 0.999
    assert b.tokens_per_s_per_request <= a.tokens_per_s_per_request * 1.001
    faster = replace(card, bandwidth_bytes_per_s=2 * card.bandwidth_bytes_per_s)
    assert decode_ceiling(spec, p.shapes, faster, few, 4096).tokens_per_s >= a.tokens_per_s
    assert prefill_ceiling(spec, p.shapes, faster, 1024) == prefill_ceiling(spec, p.shapes, card, 1024)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=9), st.integers(1, 3))
def test_the_balanced_cut_is_the_best_one(work, pp):
    cut = balanced_ranges(work, pp)
    assert [i for blocks in cut for i in blocks] == list(range(len(work))) and all(cut)

    def worst(starts):
        edges = [0, *starts, len(work)]
        return max(sum(work[a:b]) for a, b in pairwise(edges))

    best = min(worst(starts) for starts in combinations(range(1, len(work)), pp - 1))
    assert max(sum(work[i] for i in blocks) for blocks in cut) == best
    assert max(sum(work[i] for i in blocks) for blocks in pipeline_ranges(len(work), pp)) >= best
