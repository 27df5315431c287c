"""``migrate``: from another runtime to ``llmapi``, through a real Triton with the stand-in of ``tensorrt_llm``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemobuild.cli.migrate import migrate as command
from nemobuild.config import EngineConfig, load_profile
from nemobuild.errors import UsageError, VerificationFailed
from nemobuild.migrate import derive, migrate
from nemobuild.store import Store
from tests import templates
from tests.gpu_machine import h100, image, nvml, put_first
from tests.scripted import CLOSED, write_scripted
from tests.tiny import write_model
from tests.toolchains import H100, STANDINS, install_trtllm

pytestmark = pytest.mark.xdist_group("migrate")

TEMPLATE = templates.SUPER_V15.replace("tool_notes", "''")
REPORT = Path("build/old-llmapi/report/report.json")
SCRIPTS = {"\n": "<think>\nลองคิดดู 🤔\n</think>\n\nGrüße, नमस्ते!", CLOSED: "Sofort: ตอบทันที."}
PROMPTS = [
    {"name": "on", "language": "de", "reasoning": "on", "ask": "Hi", "any_of": ["Grüße"]},
    {"name": "off", "language": "th", "reasoning": "off", "ask": "Hi", "any_of": ["ตอบทันที"]},
]


def write_profile(folder: Path, source: Path, **changes: Any) -> str:
    """A cpu profile of the model in ``source``; ``changes`` replace sections."""
    data = {
        "description": "A tiny model.",
        "runtime": "cpu",
        "model": {"source": str(source)},
        "limits": {"max_batch_size": 4, "max_context_tokens": 400, "default_max_tokens": 100},
        "reasoning": {"policy": "nemotron-super-v1.5", "default": "on"},
        "gates": {"prompts": "prompts.yaml", "min_right": 1.0, "max_lost": 0, "rounds": 1, "tokens_per_text": 16},
    }
    (folder / "prompts.yaml").write_text(yaml.safe_dump(PROMPTS))
    (folder / "old.yaml").write_text(yaml.safe_dump(data | changes))
    return "old.yaml"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The vendor's container with one H100, and in it the working folder."""
    nvml(monkeypatch, h100())
    put_first(monkeypatch, image(monkeypatch, tmp_path / "image") / "bin")
    install_trtllm(tmp_path / "image")
    monkeypatch.setenv("STANDIN_CARDS", H100)
    monkeypatch.syspath_prepend(str(STANDINS / "site-packages"))
    monkeypatch.delenv("NEMOBUILD_STORE", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_other_runtime_keeps_the_contract(gpu: Path) -> None:
    source = write_scripted(gpu / "model", SCRIPTS, TEMPLATE)
    found = migrate(write_profile(gpu, source), gpu="h100-sxm")
    failed = [(gate.name, check) for gate in found.gates for check in gate.checks if check.passed is False]
    assert not failed
    assert [gate.name for gate in found.gates] == ["quality", "conformance", "prompts", "speed"]
    assert load_profile(str(found.profile)).runtime == "llmapi"
    published = Store().current("old-llmapi")
    assert published == found.publication and published is not None
    report = json.loads((found.report / "report.json").read_text())
    answers = {one["prompt"]: one for one in report["gates"][2]["details"]["answers"]}
    assert answers["on"]["text"] == "\n\nGrüße, नमस्ते!" and answers["on"]["reasoning"] == "\nลองคิดดู 🤔\n"
    assert report["gates"][0]["details"]["total"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert migrate("old.yaml", gpu="h100-sxm").publication == published  # the profile is there, and says the same


def test_another_contract_is_seen_and_nothing_is_published(gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stand-in's engine ends every answer at once, whatever it is asked: another contract than that of ``LLM``."""
    changes = {"runtime": "tensorrt", "machine": {"gpu": "h100-sxm"}, "build": {"max_num_tokens": 1024}}
    source = write_model(gpu / "model", template=TEMPLATE)
    old = write_profile(gpu, source, **changes)
    with pytest.raises(VerificationFailed) as caught:
        command(old)
    assert "not run" not in capsys.readouterr().out and "conformance" in caught.value.what
    gates = {gate["name"]: gate for gate in json.loads(REPORT.read_text())["gates"]}
    assert gates["quality"]["passed"] and not gates["conformance"]["passed"]
    wrong = {check["what"] for check in gates["conformance"]["checks"] if not check["passed"]}
    assert "streamed" in wrong and not any(name.startswith("refused") for name in wrong)
    assert Store().current("old-llmapi") is None
    assert "conformance" in json.loads(REPORT.read_text())["verdict"]


def profile(**changes: Any) -> EngineConfig:
    data = {
        "description": "Old.",
        "runtime": "tensorrt",
        "model": {"source": "a/b", "revision": "main"},
        "machine": {"gpu": "h100-sxm", "count": 2},
        "checkpoint": {"precision": "fp8", "kv_cache": "fp8", "kv_scales": "measured", "tensor_parallel": 2},
        "build": {"max_num_tokens": 4096, "gemm_plugin": "disable", "weight_streaming": True},
        "limits": {"max_context_tokens": 4096},
        "reasoning": {"policy": "nemotron-v1", "default": "on"},
        "quality": {"max_divergence": 0.01},
    }
    return EngineConfig.model_validate(data | changes)


def test_a_profile_keeps_all_that_the_other_runtime_knows() -> None:
    old = profile()
    data, left_out = derive(old, "old")
    new = EngineConfig.model_validate(data)
    assert left_out == ("build.gemm_plugin", "build.weight_streaming", "checkpoint.kv_scales")
    assert (new.runtime, new.checkpoint.format, new.build.max_num_tokens) == ("llmapi", "hf", 4096)
    same = ("model", "machine", "limits", "reasoning", "quality", "gates")
    assert all(getattr(new, section) == getattr(old, section) for section in same)
    assert (new.checkpoint.precision, new.checkpoint.kv_cache, new.checkpoint.ranks) == ("fp8", "fp8", 2)
    assert "gates" not in data  # only what was said is said again


@pytest.mark.parametrize(
    ("changes", "gpu", "code"),
    [
        (
            {"runtime": "llmapi", "checkpoint": {"format": "hf", "tensor_parallel": 2}, "build": {}},
            None,
            "already-there",
        ),
        ({}, "h100-sxm", "useless-option"),
        (
            {"runtime": "cpu", "machine": None, "checkpoint": {}, "build": {}}
            | {"limits": {"max_context_tokens": 4096, "max_batch_size": 1}},
            None,
            "no-gpu",
        ),
    ],
)
def test_what_cannot_be_migrated_is_said(changes: dict[str, Any], gpu: str | None, code: str) -> None:
    with pytest.raises(UsageError) as caught:
        derive(profile(**changes), "old", gpu)
    assert caught.value.code == code


def test_a_profile_that_says_something_else_is_not_replaced(gpu: Path) -> None:
    source = write_model(gpu / "model", template=TEMPLATE)
    Path("old-llmapi.yaml").write_text("mine")
    with pytest.raises(UsageError) as caught:
        migrate(write_profile(gpu, source), gpu="h100-sxm")
    assert caught.value.code == "file-exists" and Path("old-llmapi.yaml").read_text() == "mine"


def test_there_is_one_runtime_to_go_to() -> None:
    with pytest.raises(UsageError) as caught:
        command("smollm2-nas-cpu", to="tensorrt")
    assert caught.value.code == "unknown-runtime" and "llmapi" in caught.value.why
