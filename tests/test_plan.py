"""The plans of the shipped profiles: the published numbers, the verdicts, the pictures, and the time it takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nemobuild.cli.plan import as_text
from nemobuild.config import load_profile, profile_names
from nemobuild.engine.tensorrt import engine_inputs
from nemobuild.errors import UsageError
from nemobuild.model.hf_config import load_spec
from nemobuild.places import config_file, load_plan, place
from nemobuild.plan import memory, picture, report
from nemobuild.plan.explain import notes
from nemobuild.plan.gpus import gpus, load_gpu
from nemobuild.plan.planner import Plan, plan
from nemobuild.plan.roofline import decode_ceiling, prefill_ceiling
from nemobuild.plan.toolchain import toolchains
from nemobuild.units import format_bytes

GOLDEN = Path(__file__).parent / "golden" / "plan"
GIB = 1 << 30
SUPER = "super-49b-v1.5-h100-fp8"
SHORT = {"limits__max_context_tokens": 2048, "limits__default_max_tokens": 512, "limits__thinking_tokens": 512}
GPU_PROFILES = [name for name in profile_names() if load_profile(name).machine is not None]


def changed(name: str, gpu: str | None = None, **fields: object) -> Plan:
    """The plan of a shipped profile with some fields (``section__field``) changed."""
    data = load_profile(name).model_dump()
    for field, value in fields.items():
        section, key = field.split("__")
        data[section][key] = value
    return plan(load_spec(config_file(name)), type(load_profile(name)).model_validate(data), name=name, gpu=gpu)


def lines(made: Plan, rank: int = 0) -> dict[str, int]:
    return {line.name: line.bytes for line in made.ranks[rank].lines}


@pytest.mark.parametrize(("name", "gib"), [(SUPER, 48.40), ("super-49b-v1.5-h200-bf16", 92.88)])
def test_weights_are_the_published_ones(name, gib):
    for made in (load_plan(name), load_plan(name.replace("v1.5", "v1"))):
        assert made.ranks[0].weight_bytes / GIB == pytest.approx(gib, rel=1e-3)
    assert changed(SUPER, checkpoint__format="trtllm").ranks[0].weight_bytes == 51_969_556_480 + 4 * 823
    assert load_plan("super-49b-v1.5-h100-fp8-llmapi").ranks[0].weight_bytes == 51_969_556_480 + 4 * 970


def test_the_published_load_figure_is_met():
    made = load_plan(SUPER)
    loaded = made.ranks[0].weight_bytes + lines(made)["RoPE table"] // 2  # that server holds the table in BF16
    assert f"{loaded / GIB:.2f}" == "48.43"


def test_kv_bytes_per_token_are_exact():
    assert load_plan(SUPER).ranks[0].kv_bytes_per_token == 100_352
    assert load_plan("super-49b-v1.5-h200-bf16").ranks[0].kv_bytes_per_token == 200_704
    assert load_plan("super-49b-v1.5-2xh100-bf16").ranks[1].kv_bytes_per_token == 100_352
    assert load_plan("ultra-253b-v1-8xh200-bf16").ranks[7].kv_bytes_per_token == 262_144 // 8
    assert load_plan("nano-8b-v1-h100-bf16").ranks[0].kv_bytes_per_token == 131_072


def test_the_worked_examples_of_the_formulas():
    fp8, hf = load_plan(SUPER), load_plan("super-49b-v1.5-h100-fp8-llmapi")
    first = fp8.spec.blocks[1]
    assert memory.attention_values(fp8.spec, first, 1) == 150_994_944
    assert memory.ffn_values(fp8.spec, first, 1) == 704_643_072
    assert memory.activation_bytes_per_token(fp8.spec, fp8.shapes[0]) == 184_320
    assert [memory.scale_count(p.spec, p.shapes[0]) for p in (fp8, hf)] == [823, 970]
    assert memory.rope_line(fp8.spec).bytes == 64 << 20
    assert memory.kv_line(32_768, 100_352).bytes / GIB == pytest.approx(3.06, abs=0.005)
    assert memory.rank_kv_heads(first, 16) == 1 and memory.rank_kv_heads(first, 4) == 2


@pytest.mark.parametrize("name", GPU_PROFILES)
def test_every_shipped_profile_fits_and_fills_its_cards(name):
    made = load_plan(name)
    assert made.fits and made.headroom_bytes > 0 and not made.remedies
    for rank in made.ranks:
        assert rank.total_bytes == rank.budget_bytes == made.gpu.memory_bytes
        assert rank.needed_bytes <= rank.budget_bytes - made.headroom_bytes
        reserve = {line.name: line.bytes for line in rank.lines}["reserve and unused"]
        assert reserve >= 0.02 * rank.budget_bytes
    longest = made.profile.limits.max_context_tokens
    assert made.concurrency[longest] == made.kv_cache_tokens // longest >= 1
    assert made.max_batch_size * made.profile.limits.request_tokens <= made.kv_cache_tokens + 32 * made.max_batch_size


def test_bf16_on_one_h100_falls_short_and_fp8_is_the_remedy():
    made = load_plan("super-49b-v1.5-h200-bf16", gpu="h100-sxm")
    assert not made.fits and made.concurrency == {}
    missing = made.ranks[0].needed_bytes - made.gpu.memory_bytes
    assert made.headroom_bytes == -missing and 20 * GIB < missing < 26 * GIB
    assert format_bytes(missing) in made.shortfalls[0]
    titles = [remedy.title for remedy in made.remedies]
    assert titles[:4] == ["FP8 weights", "FP8 weights and KV cache", "2 of these GPUs", "NVIDIA H200 141 GB"]
    assert [r.fits for r in made.remedies] == sorted((r.fits for r in made.remedies), reverse=True)
    for remedy in made.remedies:
        fields = dict(part.split(": ") for part in remedy.change.split(", "))
        values = {
            key.replace(".", "__"): json.loads(v) if v[0].isdigit() or v == "true" else v for key, v in fields.items()
        }
        again = changed("super-49b-v1.5-h200-bf16", gpu=values.pop("machine__gpu", "h100-sxm"), **values)
        assert (again.fits, again.headroom_bytes) == (remedy.fits, remedy.headroom_bytes), remedy
    assert load_plan(SUPER).fits


def test_what_helps_but_is_not_enough_comes_last_and_the_most_of_it_first():
    made = load_plan("super-49b-v1.5-h200-bf16", gpu="rtx-6000-ada")
    helps = [remedy for remedy in made.remedies if not remedy.fits]
    assert [r.title for r in helps] == ["FP8 weights and KV cache", "FP8 weights", "shorter context"]
    assert [r.headroom_bytes for r in helps] == sorted((r.headroom_bytes for r in helps), reverse=True)


def test_a_larger_card_of_an_older_kind_is_a_remedy():
    made = load_plan("super-49b-v1.5-h200-bf16", gpu="rtx-pro-6000")
    assert not made.fits and made.gpu.sm > load_gpu("h200").sm
    assert "NVIDIA H200 141 GB" in [remedy.title for remedy in made.remedies if remedy.fits]


def test_what_does_not_help_is_no_remedy():
    slow = changed("super-49b-v1.5-h200-bf16", limits__min_tokens_per_second=5000.0)
    assert not slow.fits and slow.headroom_bytes > 0
    titles = {remedy.title for remedy in slow.remedies}
    assert "no bound on speed" in titles and "weight streaming" not in titles  # it frees nothing here
    assert all(remedy.fits or remedy.headroom_bytes > slow.headroom_bytes for remedy in slow.remedies)


def test_a_promised_batch_size_is_a_need_and_fewer_requests_a_remedy():
    made = changed(SUPER, limits__max_batch_size=64)
    assert not made.fits
    fewer = next(remedy for remedy in made.remedies if remedy.title == "fewer requests at once")
    assert fewer.change == "limits.max_batch_size: 16" and fewer.fits
    assert changed(SUPER, limits__max_batch_size=16).max_batch_size == 16


def test_a_step_is_never_longer_than_all_requests_at_their_longest():
    made = changed(SUPER, limits__max_batch_size=1, **SHORT)
    assert made.fits and made.max_num_tokens == 2048 and engine_inputs(made, None, None)["max_num_tokens"] == 2048
    assert {e.name: e.why for e in made.limits_explained}["build.max_num_tokens"].startswith("max_batch_size requests")
    derived = changed(SUPER, **SHORT, limits__kv_cache_tokens=4096)
    assert derived.max_num_tokens == derived.max_batch_size * 2048 < 8192 and engine_inputs(derived, None, None)
    short = changed(SUPER, **SHORT, limits__max_batch_size=1, machine__memory_share=0.6)
    assert not short.fits and short.max_num_tokens == 1024


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (SUPER, {"build__workers": 4}, "build.workers"),
        (SUPER, {"build__max_num_tokens": 16}, "build.max_num_tokens"),
        (SUPER, {"build__max_num_tokens": 8192, "limits__max_batch_size": 1}, ""),
        ("super-49b-v1.5-h200-bf16", {"build__gemm_plugin": "fp8"}, "build.gemm_plugin"),
    ],
)
def test_what_build_would_refuse_is_no_plan(name, fields, words):
    if not words:
        assert changed(name, **fields).fits
        fields, words = fields | SHORT, "build.max_num_tokens"
    with pytest.raises(UsageError, match=words) as caught:
        changed(name, **fields)
    assert caught.value.code == "contradictory-limits" and words in caught.value.next


def test_weight_streaming_keeps_the_missing_bytes_on_the_host():
    fields = {"build__weight_streaming": True, "build__gemm_plugin": "disable"}
    made = changed("super-49b-v1.5-h200-bf16", gpu="h100-sxm", **fields)
    assert made.fits and 0.7 < made.weights_on_gpu < 0.8
    assert lines(made)["weights on the host"] < -20 * GIB
    assert made.ranks[0].total_bytes == made.gpu.memory_bytes
    assert changed(SUPER, **fields).weights_on_gpu == 1.0


def test_a_share_of_the_card_is_a_memory_cap():
    half = changed(SUPER, machine__memory_share=0.8)
    assert half.fits and half.ranks[0].budget_bytes == int(0.8 * half.gpu.memory_bytes)
    assert half.kv_cache_tokens < 0.5 * load_plan(SUPER).kv_cache_tokens
    assert not changed(SUPER, machine__memory_share=0.6).fits


def test_the_derived_fraction_gives_the_pool():
    for name in (SUPER, "super-49b-v1.5-2xl40s-fp8"):
        made = load_plan(name)
        ledger = lines(made)
        free_bytes = ledger["KV cache"] + ledger["reserve and unused"]
        share = made.profile.build.kv_cache_fraction
        assert 0 <= share * free_bytes - ledger["KV cache"] < 2e-4 * free_bytes
        again = changed(name, build__kv_cache_fraction=share)
        assert again.kv_cache_tokens == pytest.approx(made.kv_cache_tokens, rel=2e-4)


def test_a_slowest_stream_bounds_the_batch():
    free, bound = load_plan(SUPER), changed(SUPER, limits__min_tokens_per_second=55.0)
    assert 1 < bound.max_batch_size < free.max_batch_size
    speed = decode_ceiling(bound.spec, bound.shapes, bound.gpu, bound.max_batch_size, 10_240).tokens_per_s_per_request
    assert speed >= 55
    never = changed(SUPER, limits__min_tokens_per_second=500.0)
    assert not never.fits and "500" in never.shortfalls[0]
    assert any(r.change == "limits.min_tokens_per_second: null" and r.fits for r in never.remedies)


def test_an_even_cut_of_uneven_blocks_is_named():
    base = {"checkpoint__pipeline_parallel": 8, "machine__count": 8}
    even = changed("super-49b-v1.5-h100-fp8-llmapi", **base)
    notes = " ".join(even.notes)
    assert "Stage 6 (blocks 60 to 69) has no attention, and so no KV cache." in notes
    assert "set build.pipeline_split to balanced" in notes
    assert ["logits and sampling" in lines(even, rank) for rank in range(8)] == [False] * 7 + [True]
    assert lines(even, 6)["KV cache"] == 0 and even.ranks[6].kv_bytes_per_token == 0
    assert sum(rank.kv_bytes_per_token for rank in even.ranks) == 100_352
    balanced = changed("super-49b-v1.5-h100-fp8-llmapi", **base, build__pipeline_split="balanced")
    assert [len(blocks) for blocks in balanced.stages] == [9, 8, 7, 7, 7, 14, 23, 5]
    assert "pipeline_split" not in " ".join(balanced.notes)
    one = [decode_ceiling(p.spec, p.shapes, p.gpu, 1024, 4096).tokens_per_s for p in (even, balanced)]
    assert one[1] > 1.2 * one[0]
    two = changed(SUPER, checkpoint__pipeline_parallel=2, machine__count=2)
    decoder = [
        sum(v for k, v in lines(two, rank).items() if k in ("attention weights", "FFN weights")) for rank in (0, 1)
    ]
    assert decoder[0] > 2 * decoder[1]
    assert "trtllm-build cuts into equal counts only" in " ".join(two.notes)


def test_ceilings_are_those_of_bandwidth_and_arithmetic():
    made = load_plan(SUPER)
    for gpu, tokens_per_s in (("h100-sxm", 67), ("h200", 96)):
        ceiling = decode_ceiling(made.spec, made.shapes, load_gpu(gpu), 1, 0)
        assert ceiling.tokens_per_s == pytest.approx(tokens_per_s, rel=0.01) and ceiling.bound == "bandwidth"
    assert decode_ceiling(made.spec, made.shapes, made.gpu, 4096, 1).bound == "arithmetic"
    assert prefill_ceiling(made.spec, made.shapes, made.gpu, 100) == pytest.approx(20_700, rel=0.02)
    # published: 73 tokens/s for one user on a B200, 66.4 in BF16 on four H100: below the ceilings
    b200 = load_plan("super-49b-v1.5-b200-fp8")
    assert decode_ceiling(b200.spec, b200.shapes, b200.gpu, 1, 2560).tokens_per_s > 73
    four = changed("super-49b-v1.5-2xh100-bf16", checkpoint__tensor_parallel=4, machine__count=4)
    assert decode_ceiling(four.spec, four.shapes, four.gpu, 1, 5500).tokens_per_s > 66.4


def test_no_number_of_groups_in_a_pipeline_passes_the_ceiling():
    """Stages of very uneven work: two groups would read the slow stage's weights twice, one group is faster."""
    pair = changed("super-49b-v1.5-h100-fp8-llmapi", checkpoint__pipeline_parallel=2, machine__count=2)
    layers = len(pair.spec.blocks)
    uneven = [
        replace(pair.shapes[0], blocks=range(layers - 1)),
        replace(pair.shapes[1], blocks=range(layers - 1, layers)),
    ]
    one = sum(1 / decode_ceiling(pair.spec, [shape], pair.gpu, 8, 4096).tokens_per_s_per_request for shape in uneven)
    ceiling = decode_ceiling(pair.spec, uneven, pair.gpu, 8, 4096)
    assert ceiling.tokens_per_s >= 0.999 * 8 / one
    halves = [1 / decode_ceiling(pair.spec, [shape], pair.gpu, 4, 4096).tokens_per_s_per_request for shape in uneven]
    assert ceiling.tokens_per_s >= 0.999 * 8 / max(sum(halves), 2 * max(halves))


def test_the_beginning_of_a_name_is_understood_first():
    with pytest.raises(UsageError) as caught:
        load_gpu("h100")
    assert "'h100-sxm'" in caught.value.why and "h200" not in caught.value.why
    with pytest.raises(UsageError, match="'h200'"):
        load_gpu("h20O")


def test_scales_that_the_runtime_leaves_aside_are_named():
    words = "measured scales are not used"
    assert words in " ".join(load_plan("super-49b-v1.5-h100-fp8-llmapi").notes)
    for other in (SUPER, "super-49b-v1.5-h200-bf16"):
        assert words not in " ".join(load_plan(other).notes)
    made = load_plan("super-49b-v1.5-h100-fp8-llmapi")
    newer = replace(made.toolchain, trtllm="1.3.0")
    assert words not in " ".join(notes(made.spec, made.profile, made.gpu, newer, made.stages))


def test_explain_shows_every_limit_with_its_origin():
    made = load_plan(SUPER)
    found = {e.name: e for e in made.limits_explained}
    settable = {f"limits.{f}" for f in type(made.profile.limits).model_fields}
    assert settable - set(found) == {"limits.min_tokens_per_second"}
    assert found["limits.max_context_tokens"].origin == "profile"
    assert found["limits.max_queue_size"].origin == "default"
    assert found["limits.max_batch_size"].origin == found["build.max_num_tokens"].origin == "derived"
    assert all(e.why for e in made.limits_explained)
    assert made.profile.limits.max_batch_size == made.max_batch_size
    assert made.kv_cache_bound is None and changed(SUPER, limits__kv_cache_tokens=65536).kv_cache_bound == 65536


@pytest.mark.parametrize("name", profile_names())
def test_a_resolved_profile_is_a_profile(name):
    """It is written into manifests, and planning it again changes nothing that users see."""
    made = load_plan(name)
    again = type(made.profile).model_validate(made.profile.model_dump())
    assert again == made.profile
    second = plan(made.spec, again, name=name)
    assert (second.fits, second.kv_cache_tokens, second.max_batch_size) == (
        made.fits,
        made.kv_cache_tokens,
        made.max_batch_size,
    )


def test_a_cpu_plan_is_memory_of_this_machine():
    made = load_plan("smollm2-nas-cpu")
    assert made.fits and made.gpu is None
    assert lines(made)["model weights"] == 4 * made.spec.parameter_count
    assert made.kv_cache_tokens == 16384 and made.max_batch_size == 32


@pytest.mark.parametrize("name", [name for name in GPU_PROFILES if "v1.5" in name])
def test_v1_has_the_same_ledger(name):
    newer, older = load_plan(name), load_plan(name.replace("v1.5", "v1"))
    assert (newer.ranks, newer.headroom_bytes, newer.max_batch_size) == (
        older.ranks,
        older.headroom_bytes,
        older.max_batch_size,
    )
    assert newer.spec.rope.scaling.factor == 2 * older.spec.rope.scaling.factor


@pytest.mark.parametrize("name", [name for name in GPU_PROFILES if name.startswith("super-49b-v1.5")])
def test_plans_are_the_golden_ones(name):
    made = load_plan(name)
    assert as_text(made, explain=True) + "\n" == (GOLDEN / f"{name}.txt").read_text()
    assert json.loads(json.dumps(report.as_json(made))) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_the_command(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemobuild", "plan", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = run(SUPER, "--svg", "plan.svg", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["fits"] is True and done.stderr == ""
    assert ElementTree.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")
    done = run("super-49b-v1.5-h200-bf16", "--gpu", "h100-sxm", "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["remedies"]
    assert json.loads(done.stderr)["error"]["code"] == "does-not-fit"
    done = run("super-49b-v1.5-h200-bf16", "--gpu", "h100-sxm")
    assert "22.93 GiB are missing" in done.stdout and "checkpoint.precision: fp8" in done.stderr
    done = run(SUPER, "--svg", "nowhere/plan.svg")
    assert done.returncode == 2 and "nowhere" in done.stderr


def test_a_plan_is_cold_in_half_a_second_and_loads_nothing_heavy():
    code = (
        "import sys\n"
        "def no_network(event, _):\n"
        "    assert not event.startswith(('socket.connect', 'socket.getaddrinfo')), event\n"
        "sys.addaudithook(no_network)\n"
        "from nemobuild.__main__ import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'tritonclient', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    times_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, "plan", SUPER], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of the processor, not of the wall: what else the machine does must not count.
        times_s.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    assert min(times_s) < 0.5, times_s


def test_pictures_show_the_ledger_and_where_the_card_ends():
    fits, short = load_plan(SUPER), load_plan("super-49b-v1.5-h200-bf16", gpu="h100-sxm")
    bar = picture.terminal_picture(fits).splitlines()[0].split()[-1]
    assert (
        len(bar) == 60
        and bar.count("█") == round(60 * 48.40 / 79.65)
        and "ends here" not in picture.terminal_picture(fits)
    )
    assert "ends here, 79.65 GiB" in picture.terminal_picture(short)
    drawn = picture.svg_picture(fits)
    widths = [
        float(rect.attrib["width"])
        for rect in ElementTree.fromstring(drawn).iter()
        if "x" in rect.attrib and rect.attrib.get("height") == "30"
    ]
    assert sum(widths) == pytest.approx(860, abs=0.5)
    assert "polyline" in drawn and "polyline" not in picture.svg_picture(short)
    assert "ends here" in picture.svg_picture(short)


def test_the_tables_are_whole():
    assert len(gpus()) == 11 and [g.memory_bytes for g in gpus()] == sorted(g.memory_bytes for g in gpus())
    for gpu in gpus():
        assert gpu.fp8 == (gpu.fp8_flops is not None) == (gpu.sm >= (8, 9))
        assert gpu.source and gpu.bf16_flops > 1e14 and 8e11 < gpu.bandwidth_bytes_per_s < 9e12
    for tag, chain in toolchains().items():
        assert chain.image.endswith(f":{tag}-trtllm-python-py3") and chain.line >= (1, 0)
        assert set(chain.runtimes) <= {"tensorrt", "llmapi"}


def test_profiles_of_one_model_have_places_of_their_own():
    assert len({place(name, "engine") for name in profile_names()}) == len(profile_names())
    assert place("x/my.profile.yaml", "engine").parts[1] == "my.profile"
