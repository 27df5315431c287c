"""What a profile must not say: unknown names, limits that contradict each other, what card or container cannot do."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from nemobuild.config import EngineConfig, load_profile
from nemobuild.convert import calibrate, planning
from nemobuild.errors import ToolchainError, UsageError
from nemobuild.model import parallel
from nemobuild.model.hf_config import load_spec
from nemobuild.places import config_file, load_plan
from nemobuild.plan import memory
from nemobuild.plan.gpus import load_gpu
from nemobuild.plan.host import calibration_bytes
from nemobuild.plan.planner import plan
from nemobuild.plan.toolchain import load_toolchain
from nemobuild.weights.snapshot import open_snapshot
from tests.tiny import write_model

SUPER = "super-49b-v1.5-h100-fp8"


def write(tmp_path, name: str = SUPER, **fields: object) -> str:
    """A profile file like the shipped one with ``section__field`` set; a field of None is left out."""
    data = load_profile(name).model_dump(exclude_none=True)
    for field, value in fields.items():
        *sections, key = field.split("__")
        part = data
        for section in sections:
            part = part.setdefault(section, {})
        if value is None:
            part.pop(key, None)
        else:
            part[key] = value
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump(data))
    return str(file)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"machine__gpus": 2}, r"machine\.gpus .* unknown\. Did you mean 'gpu'"),
        ({"build__max_num_token": 2}, r"build\.max_num_token .*Did you mean 'max_num_tokens'"),
        ({"machne": {}}, r"machne .*Did you mean 'machine'"),
        ({"limits__thinking": 5}, r"Did you mean 'thinking_tokens'"),
        ({"runtime": "vllm"}, "runtime .*'vllm'"),
        ({"build__gemm_plugin": "fp16"}, r"build\.gemm_plugin .*'fp16'"),
        ({"build__kv_cache_fraction": 1.5}, r"build\.kv_cache_fraction .*1\.5"),
        ({"machine__memory_share": 0.0}, r"machine\.memory_share"),
        ({"machine__count": "two"}, r"machine\.count .*'two'"),
        ({"limits__max_batch_size": 0}, r"limits\.max_batch_size"),
        ({"build__timeout_s": 0}, r"build\.timeout_s"),
        ({"machine__count": 2}, r"machine\.count must be"),
        ({"machine": None}, "need the section machine"),
        ({"checkpoint__format": "hf"}, r"checkpoint\.format must be hf for the runtime llmapi"),
        ({"checkpoint__precision": "bf16"}, "kv_cache fp8 needs precision fp8"),
        ({"build__pipeline_split": "balanced"}, "pipeline_split must be even for tensorrt"),
        ({"build__weight_streaming": True}, "weight_streaming needs gemm_plugin disable"),
        ({"limits__max_batch_size": 64, "build__max_num_tokens": 32}, "max_num_tokens must be at least max_batch_size"),
        ({"limits__thinking_tokens": 30000}, "thinking_tokens and default_max_tokens together"),
        ({"limits__max_prompt_tokens": 32768}, "max_prompt_tokens must be less"),
        ({"limits__kv_cache_tokens": 1000}, "kv_cache_tokens must hold"),
        (
            {"limits__thinking_tokens": None, "limits__default_max_tokens": 32768},
            "default_max_tokens must be less than max_context_tokens; default_max_tokens is 32768",
        ),
        ({"limits__min_tokens_per_second": float("inf")}, r"limits\.min_tokens_per_second .*finite"),
        ({"quality__max_divergence": float("inf")}, r"quality\.max_divergence .*finite"),
        ({"reasoning__policy": "nemotron-v2"}, r"reasoning\.policy .*Did you mean 'nemotron-v1'\? Correct"),
        ({"model__known": "super-49b-v15"}, r"model\.known .*Did you mean 'super-49b-v1\.5'"),
        ({"model__known": "../../../../../../etc/passwd"}, r"model\.known .*Known: nano-8b-v1, "),
    ],
)
def test_a_profile_that_contradicts_itself_is_refused_by_name(tmp_path, fields, words):
    with pytest.raises(UsageError, match=words):
        load_plan(write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("smollm2-cpu", {"machine__gpu": "h100-sxm"}, "cpu must not have it"),
        ("smollm2-cpu", {"build__max_num_tokens": 64}, "section build is not for the runtime cpu"),
        ("smollm2-cpu", {"limits__max_batch_size": None}, "max_batch_size is needed"),
        ("smollm2-cpu", {"limits__min_tokens_per_second": 5.0}, "min_tokens_per_second needs a GPU"),
        ("super-49b-v1.5-h100-fp8-llmapi", {"build__gemm_plugin": "fp8", "build__workers": 2}, "gemm_plugin, workers"),
        ("super-49b-v1.5-h100-fp8-llmapi", {"checkpoint__format": "trtllm"}, "format must be hf"),
    ],
)
def test_what_is_for_another_runtime_is_refused(tmp_path, name, fields, words):
    with pytest.raises(UsageError, match=words):
        load_plan(write(tmp_path, name, **fields))


def test_llmapi_serves_bf16_weights_as_they_are(tmp_path):
    fields = {"checkpoint__precision": "bf16", "checkpoint__kv_cache": "bf16", "machine__gpu": "h200"}
    made = load_plan(write(tmp_path, "super-49b-v1.5-h100-fp8-llmapi", **fields))
    assert made.fits and [need.stage for need in made.host] == ["fetch", "serve"]


@pytest.mark.parametrize(
    ("fields", "kind", "code", "words"),
    [
        ({"machine__gpu": "h100-smx"}, UsageError, "unknown-gpu", "'h100-sxm'"),
        ({"machine__gpu": "a100-80gb"}, ToolchainError, "no-fp8-on-gpu", r"8\.0; FP8 needs 8\.9"),
        ({"machine__container": "24.01"}, ToolchainError, "unknown-container", "toolchain matrix"),
        ({"limits__max_context_tokens": 131_073}, UsageError, "context-too-long", "131072 tokens"),
        (
            {"checkpoint__tensor_parallel": 3, "machine__count": 3},
            UsageError,
            "cannot-split",
            "does not divide the 64 query heads",
        ),
    ],
)
def test_what_model_card_or_container_cannot_do(tmp_path, fields, kind, code, words):
    with pytest.raises(kind, match=words) as caught:
        load_plan(write(tmp_path, **fields))
    assert caught.value.code == code and caught.value.next


def test_a_container_before_the_uneven_split_refuses_it(tmp_path):
    fields = {"checkpoint__pipeline_parallel": 2, "machine__count": 2, "build__pipeline_split": "balanced"}
    profile = "super-49b-v1.5-h100-fp8-llmapi"
    assert load_plan(write(tmp_path, profile, **fields)).fits
    with pytest.raises(ToolchainError, match=r"1\.1\.0 cuts evenly only"):
        load_plan(write(tmp_path, profile, **fields, machine__container="26.02"))


def test_a_container_without_the_runtime_refuses_it(tmp_path, monkeypatch):
    from nemobuild.plan import planner

    monkeypatch.setattr(
        planner, "load_toolchain", lambda tag: type(load_toolchain(tag))(tag, "i", "1.3.0", "", "13.1", "", ("llmapi",))
    )
    with pytest.raises(ToolchainError, match="does not carry the runtime tensorrt"):
        load_plan(SUPER)


def test_the_command_says_it_with_the_right_status(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemobuild", "plan", *arguments, "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for part in ("tag", "source"):
        (tmp_path / part).mkdir()
    for arguments, status, code in (
        ((SUPER, "--gpu", "a100-80gb"), 4, "no-fp8-on-gpu"),
        ((SUPER, "--gpu", "h1000"), 2, "unknown-gpu"),
        ((SUPER[:-1],), 2, "unknown-profile"),
        (("smollm2-cpu", "--gpu", "h200"), 2, "no-gpu-needed"),
        ((write(tmp_path / "tag", machine__container="25.01"),), 4, "unknown-container"),
        ((write(tmp_path / "source", model__known=None, model__source="org/none"),), 2, "not-fetched"),
    ):
        done = run(*arguments)
        assert (done.returncode, json.loads(done.stderr)["error"]["code"]) == (status, code), done.stderr
        assert done.stdout == ""


def test_the_host_need_covers_what_the_converter_states(tmp_path):
    folder = write_model(tmp_path / "hf")
    data = load_profile("smollm2-cpu").model_dump()
    data["limits"] |= {"max_context_tokens": 256, "default_max_tokens": 32, "kv_cache_tokens": None}
    made = plan(load_spec(folder), EngineConfig.model_validate(data), name="tiny")
    stated = planning.prepare(open_snapshot(folder), workers=8)
    need = next(need for need in made.host if need.stage == "checkpoint")
    assert stated.peak_memory_bytes <= need.memory_bytes <= 4 * stated.peak_memory_bytes
    assert stated.target_bytes == need.disk_bytes


@pytest.mark.parametrize("model", ["super-49b-v1.5", "ultra-253b-v1", "nano-8b-v1", "smollm2-nas"])
def test_the_host_need_covers_what_the_calibration_states(model, monkeypatch):
    spec = load_spec(config_file(model))
    sizes = [2 * (memory.attention_values(spec, b, 1) + memory.ffn_values(spec, b, 1)) for b in spec.blocks]
    monkeypatch.setattr(calibrate, "available_cpus", lambda: 64)
    monkeypatch.setattr(calibrate, "_block_bytes", lambda _, index: sizes[index])
    stated = calibrate.plan_calibration(SimpleNamespace(spec=spec), [512] * 134).memory_bytes
    assert stated <= calibration_bytes(spec, 512) <= 1.2 * stated


def test_names_propose_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'l40s'"):
        load_gpu("l40")
    with pytest.raises(ToolchainError, match=r"Did you mean '26\.07'"):
        load_toolchain("26.7")


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(parallel).failed == 0
