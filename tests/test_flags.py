"""The command line of ``trtllm-build``: our table against the stand-in's parser, and every rule once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemobuild.config import load_profile, profile_names
from nemobuild.engine.flags import FLAGS, Target, check_flags, parse, version
from nemobuild.engine.tensorrt import build_command, engine_inputs, target_of
from nemobuild.errors import ToolchainError, UsageError
from nemobuild.places import load_plan
from nemobuild.plan import build_rules
from nemobuild.plan.build_rules import FIELDS, RULES, Rule, check_profile
from tests.toolchains import STANDINS

FP8 = Target(fp8=True, fp8_kv=True, ranks=1, sm=(9, 0), trtllm="1.2.1")
BF16 = Target(fp8=False, fp8_kv=False, ranks=1, sm=(9, 0), trtllm="1.2.1")
MIXED = Target(fp8=True, fp8_kv=False, ranks=1, sm=(9, 0), trtllm="1.2.1")
ONLY_KV = Target(fp8=False, fp8_kv=True, ranks=1, sm=(9, 0), trtllm="1.2.1")
A100 = Target(fp8=True, fp8_kv=True, ranks=1, sm=(8, 0), trtllm="1.2.1")
B200 = Target(fp8=True, fp8_kv=True, ranks=1, sm=(10, 0), trtllm="1.2.1")
GOOD = "trtllm-build --max_batch_size 8 --max_num_tokens 1024 --max_seq_len 512"
NO_FP8_FMHA = "--use_fp8_context_fmha disable"


def test_the_table_has_the_flags_of_the_tool_and_no_others():
    told = subprocess.run(
        [sys.executable, STANDINS / "trtllm_build.py", "--help"], capture_output=True, text=True, check=True
    ).stdout
    known = {word.strip("[],").removeprefix("--") for word in told.split() if word.strip("[,").startswith("--")}
    assert set(FLAGS) == known - {"help", "max_decoder_seq_len", "max_multimodal_len"}


@pytest.mark.parametrize("name", [n for n in profile_names() if load_profile(n).runtime == "tensorrt"])
def test_the_command_of_every_shipped_profile_is_accepted(name):
    plan = load_plan(name)
    argv = build_command(plan, Path("checkpoint"), Path("engine"))
    values = check_flags(argv, target_of(plan))
    assert values["max_batch_size"] == plan.max_batch_size and values["max_num_tokens"] == plan.max_num_tokens
    assert values["max_seq_len"] == plan.profile.limits.max_context_tokens
    inputs = engine_inputs(plan, "key", None)
    assert inputs["checkpoint"] == "key" and inputs["max_batch_size"] == plan.max_batch_size
    assert not any("/" in str(value) for value in inputs.values()), "a path makes no engine another one"


@pytest.mark.parametrize(
    ("more", "target", "flag"),
    [
        ("", BF16, "use_fp8_context_fmha"),
        ("", MIXED, "use_fp8_context_fmha"),
        (NO_FP8_FMHA, FP8, "use_fp8_context_fmha"),
        ("", A100, "use_fp8_context_fmha"),
        (NO_FP8_FMHA, ONLY_KV, "use_paged_context_fmha"),
        ("--context_fmha disable", FP8, "use_paged_context_fmha"),
        (f"{NO_FP8_FMHA} --gemm_plugin fp8", BF16, "gemm_plugin"),
        ("--gemm_plugin nvfp4", FP8, "gemm_plugin"),
        ("--gemm_plugin auto --weight_streaming", FP8, "gemm_plugin"),
        ("--gemm_swiglu_plugin fp8", B200, "gemm_swiglu_plugin"),
        ("--low_latency_gemm_plugin fp8", B200, "low_latency_gemm_plugin"),
        ("--fp8_rowwise_gemm_plugin auto", B200, "fp8_rowwise_gemm_plugin"),
        ("--opt_num_tokens 8 --multiple_profiles enable", FP8, "opt_num_tokens"),
        ("--opt_num_tokens 2048", FP8, "opt_num_tokens"),
        ("--remove_input_padding disable", FP8, "remove_input_padding"),
        ("--kv_cache_type continuous", FP8, "kv_cache_type"),
        ("--reduce_fusion enable", FP8, "reduce_fusion"),
        ("--streamingllm enable", FP8, "streamingllm"),
        ("--pp_reduce_scatter enable", FP8, "pp_reduce_scatter"),
        ("--workers 2", FP8, "workers"),
        ("--max_draft_len 3", FP8, "max_draft_len"),
        ("--lora_target_modules attn_q", FP8, "lora_target_modules"),
        ("--max_beam_width 200", FP8, "max_num_tokens"),
        ("--tokens_per_block 2048", FP8, "max_num_tokens"),
    ],
)
def test_what_the_tool_would_change_or_refuse_is_refused_by_name(more, target, flag):
    with pytest.raises(UsageError, match=f"--{flag} ") as caught:
        check_flags([*GOOD.split(), *more.split()], target)
    error = caught.value
    assert error.code == "contradictory-limits" and error.next
    assert error.why.endswith(".") and any(error.why == rule.why for rule in RULES if rule.flag == flag)
    if flag in FIELDS:  # users write profiles, not flags
        assert error.what.startswith(FIELDS[flag]) and FIELDS[flag] in error.next


def test_reasons_are_sentences_that_keep_their_names():
    whys = [rule.why for rule in RULES]
    assert "The weights are not FP8." in whys and "trtllm-build cuts it to max_num_tokens." in whys
    assert all(why[0].isupper() or why.startswith(("trtllm-build", *FLAGS)) for why in whys)


def test_a_plan_judges_the_values_that_the_command_gets(monkeypatch):
    """The planner sees the profile's fields; ``build`` the command that is made of them."""
    plan = load_plan("super-49b-v1.5-2xl40s-fp8")
    values = parse(build_command(plan, Path("checkpoint"), Path("engine")))
    seen = {}
    monkeypatch.setattr(build_rules, "RULES", (Rule("workers", lambda v, t: bool(seen.update(v)), ""),))
    check_profile(plan.profile, target_of(plan))
    assert set(FIELDS) <= set(seen) and seen.items() <= values.items()


def test_contradictory_limits():
    for argv in (
        "trtllm-build --max_batch_size 64 --max_num_tokens 32 --max_seq_len 512",
        "trtllm-build --max_batch_size 8 --max_num_tokens 8192 --max_seq_len 512",
        "trtllm-build --max_batch_size 8 --max_num_tokens 1024",
    ):
        with pytest.raises(UsageError, match=r"max_num_tokens|max_seq_len"):
            check_flags(argv.split(), FP8)


def test_every_rule_is_broken_by_some_test_above():
    marks = test_what_the_tool_would_change_or_refuse_is_refused_by_name.pytestmark[0].args[1]
    named = {flag for _, _, flag in marks} | {"max_seq_len", "max_num_tokens", "low_latency_gemm_swiglu_plugin"}
    assert {rule.flag for rule in RULES} <= named


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trtllm-build --max_batchsize 8", "max_batch_size"),
        ("trtllm-build --max_batch 8", "no flag '--max_batch'"),
        ("trtllm-build max_batch_size 8", "no flag"),
        ("trtllm-build --max_batch_size", "needs a value"),
        ("trtllm-build --max_batch_size --workers 1", "needs a value"),
        ("trtllm-build --max_batch_size many", "whole number"),
        ("trtllm-build --max_batch_size -3", "whole number"),
        ("trtllm-build --context_fmha --workers 1", "needs a value"),
        ("trtllm-build --context_fmha true", "cannot be 'true'"),
        ("trtllm-build --gemm_plugin fp16", "float16"),
        ("trtllm-build --workers 1 --workers 1", "twice"),
    ],
)
def test_wrong_flags_are_refused(argv, words):
    with pytest.raises(UsageError, match=words):
        parse(argv.split())


def test_a_version_without_engines_is_refused():
    for text in ("1.3.0rc21", "1.3.0", "2.0"):
        with pytest.raises(ToolchainError, match="does not build engines"):
            check_flags(GOOD.split(), Target(True, True, 1, (9, 0), text))
    assert check_flags(GOOD.split(), Target(True, True, 1, (9, 0), "1.0.3"))["max_seq_len"] == 512


def test_versions():
    assert version("1.2.1") == (1, 2, 1) == version("1.2.1rc3") == version("1.2.1.post1")
    assert version("nonsense") == ()
