"""``model.yaml`` by TensorRT-LLM version, and what the ``llmapi`` runtime takes as weights."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from nemobuild.convert.executor import convert
from nemobuild.engine.llmapi import ARGUMENTS, known_arguments, model_yaml, parse_version
from nemobuild.errors import IntegrityError, ToolchainError
from nemobuild.model.hf_config import spec_from_config
from nemobuild.places import load_plan
from nemobuild.triton.repository import plan_repository
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.fp8_models import given_scales
from tests.plans import planned
from tests.tiny import llama_config, random_weights, tiny_config, write_model

SITE = Path(__file__).parent / "standins" / "site-packages"
VERSIONS = ("1.0.0", "1.0.3", "1.1.0", "1.2.0", "1.2.1", "1.3.0rc26", "1.3.0rc29", "1.3.0", "1.4.0rc1")


def pinned(version, plan=None, **changes):
    plan = plan or planned("llmapi", **changes)
    return dataclasses.replace(plan, toolchain=dataclasses.replace(plan.toolchain, trtllm=version))


@pytest.fixture
def judge(monkeypatch):
    """The stand-in's own tables of arguments, for a version."""
    monkeypatch.syspath_prepend(str(SITE))

    def load(version):
        monkeypatch.setenv("STANDIN_TRTLLM_VERSION", version)
        sys.modules.pop("tensorrt_llm", None)
        return importlib.import_module("tensorrt_llm")

    yield load
    sys.modules.pop("tensorrt_llm", None)


@pytest.mark.parametrize("version", [v for v in VERSIONS if v != "1.4.0rc1"])
def test_every_version_gets_only_what_it_knows(version, judge):
    arguments = model_yaml(pinned(version), "checkpoint")
    ours = arguments.pop("triton_config")
    assert ours["decoupled"] is True
    module = judge(version)
    line = tuple(int(part) for part in version.split(".")[:2])
    taken = module._ARGS[line].model_validate(arguments)  # refuses what it does not know
    assert taken.max_batch_size == 4 and taken.max_seq_len == 256
    known = known_arguments(parse_version(version))
    flat = {
        f"{k}.{p}" if isinstance(v, dict) else k
        for k, v in arguments.items()
        for p in (v if isinstance(v, dict) else [0])
    }
    assert flat <= known


@pytest.mark.parametrize("version", VERSIONS)
def test_the_tables_agree(version):
    """What is written for a version stands in the list of what that version knows, nested parts too."""
    known = known_arguments(parse_version(version))
    for argument in ARGUMENTS:
        if argument.since <= parse_version(version) < argument.before:
            assert argument.name in known, argument.name
    assert ("enable_trtllm_sampler" in known) == version.startswith("1.0")
    assert ("sampler_type" in known) == version.startswith(("1.1", "1.2", "1.3"))


def test_no_field_of_a_request_is_dropped_in_silence():
    """The sampler that knows penalties and bad words is named where it is not the default."""
    assert model_yaml(pinned("1.0.3"), "c")["enable_trtllm_sampler"] is True
    assert model_yaml(pinned("1.2.1"), "c")["sampler_type"] == "TRTLLMSampler"
    newer = model_yaml(pinned("1.3.0rc29"), "c")
    assert "sampler_type" not in newer and "backend" not in newer
    assert [model_yaml(pinned(v), "c")["triton_config"]["logprobs"] for v in ("1.2.1", "1.3.0rc26")] == [1, 0]
    with pytest.raises(ToolchainError, match=r"1\.3\.0rc21"):
        model_yaml(pinned("1.3.0rc21"), "c")


def test_the_limits_come_from_the_plan():
    plan = planned("llmapi", limits={"max_context_tokens": 256, "default_max_tokens": 16, "max_queue_size": 9})
    arguments = model_yaml(plan, "checkpoint")
    assert arguments["max_batch_size"] == plan.max_batch_size == arguments["cuda_graph_config"]["max_batch_size"]
    assert arguments["max_num_tokens"] == plan.max_num_tokens and arguments["max_seq_len"] == 256
    assert arguments["kv_cache_config"]["free_gpu_memory_fraction"] == plan.profile.build.kv_cache_fraction
    assert "max_tokens" not in arguments["kv_cache_config"]  # derived: the fraction says it
    assert arguments["triton_config"]["max_queue_size"] == 9
    bounded = {"max_context_tokens": 256, "default_max_tokens": 16, "kv_cache_tokens": 4096}
    assert model_yaml(planned("llmapi", limits=bounded), "c")["kv_cache_config"]["max_tokens"] == 4096


def test_ranks_and_their_blocks():
    shared = {"format": "hf", "tensor_parallel": 1, "pipeline_parallel": 2}
    two = {"checkpoint": shared, "machine": {"gpu": "h100-sxm", "count": 2}}
    even = model_yaml(planned("llmapi", **two), "c")
    assert (even["tensor_parallel_size"], even["pipeline_parallel_size"]) == (1, 2) and "pp_partition" not in even
    balanced = model_yaml(planned("llmapi", **two, build={"pipeline_split": "balanced"}), "c")
    assert len(balanced["pp_partition"]) == 2 and sum(balanced["pp_partition"]) == len(tiny_config()["block_configs"])
    assert "pp_partition" not in known_arguments(parse_version("1.1.0"))


def test_the_models_own_code_is_trusted_only_where_it_is_needed():
    assert model_yaml(planned("llmapi"), "c")["trust_remote_code"] is True
    assert model_yaml(planned("llmapi", config=llama_config()), "c")["trust_remote_code"] is False


def test_the_shipped_profile():
    plan = load_plan("super-49b-v1.5-h100-fp8-llmapi")
    arguments = model_yaml(plan, "checkpoint")
    assert arguments["max_seq_len"] == plan.profile.limits.max_context_tokens
    assert arguments["triton_config"]["vocab_size"] == 128256


@pytest.mark.parametrize("text", ["", "1", "1.x", "1.3.0-rc1", "1.2.1; import os"])
def test_a_version_that_is_none(text):
    with pytest.raises(ToolchainError, match="version"):
        parse_version(text)


def test_versions_are_ordered_as_they_were_released():
    texts = ["1.0.0rc3", "1.0.0", "1.0.3", "1.2.1", "1.3.0rc3", "1.3.0rc24", "1.3.0", "1.3.1rc0"]
    assert [parse_version(t) for t in texts] == sorted(map(parse_version, texts))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_model(
        tmp_path_factory.mktemp("hf") / "tiny", template=templates.SUPER_V15.replace("tool_notes", "''")
    )
    (folder / "modeling_decilm.py").write_text("import torch\n")
    (folder / "notes.bin").write_bytes(b"not for the server")
    return folder


@pytest.fixture(scope="module")
def fp8(source, tmp_path_factory):
    scales = given_scales(tiny_config(), random_weights(tiny_config()))
    target = tmp_path_factory.mktemp("fp8") / "hf"
    return convert(open_snapshot(source), target, format="hf", precision="fp8", scales=scales).output


FP8 = {"checkpoint": {"format": "hf", "precision": "fp8"}}


def served(files):
    prefix = "tensorrt_llm/1/"
    return {name.removeprefix(prefix): c for name, c in files.items() if name.startswith(prefix)}


def test_the_folder_is_carried_whole_and_nothing_else(source, fp8):
    bf16 = served(plan_repository(planned("llmapi"), source, source).files)
    assert {"model.py", "engine_model.py", "model.yaml", "lib/engine/request.py", "lib/runtime/wire.py"} <= set(bf16)
    carried = {name.removeprefix("checkpoint/") for name in bf16 if name.startswith("checkpoint/")}
    assert {"config.json", "modeling_decilm.py", "tokenizer.json", "model.safetensors.index.json"} <= carried
    assert "notes.bin" not in carried and not any("cpu" in name for name in bf16)
    assert yaml.safe_load(bf16["model.yaml"])["model"] == "checkpoint"
    quantised = served(plan_repository(planned("llmapi", **FP8), source, fp8).files)
    assert quantised.keys() == served(plan_repository(planned("llmapi", **FP8), fp8, fp8).files).keys()
    assert "checkpoint/hf_quant_config.json" in quantised and "checkpoint/manifest.json" not in quantised


def test_weights_of_another_precision_or_model_are_refused(source, fp8, tmp_path):
    with pytest.raises(IntegrityError, match="FP8"):
        plan_repository(planned("llmapi"), source, fp8)
    with pytest.raises(IntegrityError, match="FP8"):
        plan_repository(planned("llmapi", **FP8), source, source)
    half_said = shutil.copytree(fp8, tmp_path / "half")
    (half_said / "hf_quant_config.json").unlink()
    with pytest.raises(IntegrityError, match="hf_quant_config"):
        plan_repository(planned("llmapi", **FP8), source, half_said)
    other = write_model(tmp_path / "other", tiny_config(rope_theta=20000.0))
    with pytest.raises(IntegrityError, match="rope"):
        plan_repository(planned("llmapi"), source, other)
    torn = shutil.copytree(source, tmp_path / "torn")
    next(torn.glob("*.safetensors")).unlink()
    with pytest.raises(IntegrityError, match="lacks"):
        plan_repository(planned("llmapi"), source, torn)


def test_the_manifest_says_what_it_was_made_from(source, fp8):
    plan = planned("llmapi", **FP8)
    manifest = json.loads(plan_repository(plan, source, fp8, inputs={"a": 1}).files["manifest.json"])
    assert manifest["inputs"] == {"a": 1} and manifest["trtllm"] == plan.toolchain.trtllm
    assert manifest["engine"]["key"] == json.loads((fp8 / "manifest.json").read_text())["key"]
    assert manifest["profile"]["limits"]["max_batch_size"] == plan.max_batch_size
    assert spec_from_config(tiny_config()) == plan.spec
