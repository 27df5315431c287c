"""``nemobuild verify`` of FP8: what it shows, what it refuses, and that it never passes without measuring."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.fp8_models import write_fp8_folder
from tests.test_cli import run
from tests.test_cpu_checkpoint import edit_tensors
from tests.test_quality import CONFIG, QKV, write_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_all(tmp_path_factory.mktemp("verify"))


def test_command_line(made: dict[str, Any], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": "The capital of France is Paris.", "language": "en"}, {"text": "Guten Tag!", "language": "de"}]
    texts.write_text("\n".join(map(json.dumps, lines)))
    bare = ["verify", str(made["trtllm"]), "--against", str(made["source"])]
    command = [*bare, "--texts", str(texts)]
    svg = tmp_path / "errors.svg"
    done = run(*command, "--svg", str(svg), "--json")
    value = json.loads(done.stdout)
    assert done.returncode == 7, "random weights lose more than the default thresholds allow"
    assert json.loads(done.stderr)["error"]["code"] == "below-thresholds"
    assert {q["language"] for q in value["quality"]["languages"]} == {"en", "de"}
    assert value["weights"][0]["error"] >= value["weights"][-1]["error"]
    assert ET.parse(svg).getroot().tag.endswith("svg")
    done = run(*bare, "--weights-only")
    assert done.returncode == 0 and "FP8 of its source" in done.stdout
    shown = run(*command).stdout
    for words in ("finding", "worst weights", "worst activations", "KL divergence", "same greedy token"):
        assert words in shown


def test_texts_that_are_too_short_are_no_reason_to_pass(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "Two or more."}\n{"text": "a"}\n')
    command = ["verify", str(made["trtllm"]), "--against", str(made["source"]), "--texts", str(tmp_path / "t.jsonl")]
    done = run(*command)
    assert done.returncode == 2 and f"Line 2 of {tmp_path / 't.jsonl'} is 1 token" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("checkpoint", "options", "named"),
    [
        ("trtllm", ("--weights-only", "--texts", "t"), "--texts"),
        ("trtllm", ("--weights-only", "--tokens-per-text", "128"), "--tokens-per-text"),
        ("hf", ("--weights-only", "--svg", "x.svg"), "--svg"),
        ("hf", ("--prompt", "Hello"), "--prompt"),
        ("source", ("--texts", "t"), "--texts"),
        ("source", ("--tokens-per-text", "9"), "--tokens-per-text"),
        ("source", ("--svg", "x.svg"), "--svg"),
        ("source", ("--bounds", "smollm2-cpu"), "--bounds"),
        ("source", ("--weights-only",), "--weights-only"),
    ],
)
def test_options_that_would_do_nothing(
    checkpoint: str, options: tuple[str, ...], named: str, made: dict[str, Any], tmp_path: Path
) -> None:
    done = run("verify", str(made[checkpoint]), "--against", str(made["source"]), *options, cwd=tmp_path)
    assert done.returncode == 2 and f"{named} would do nothing" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_one_description_is_measured_as_fp8(made: dict[str, Any], tmp_path: Path) -> None:
    folder = write_fp8_folder(tmp_path / "m", CONFIG, change=lambda t, c, s: c.pop("quantization_config") and None)
    done = run("verify", str(folder), "--against", str(made["source"]), "--json")
    assert json.loads(done.stdout)["quality"]["total"]["tokens"] > 0


def test_a_picture_that_cannot_be_written(made: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "The capital of France is Paris."}\n')
    command = ["verify", "--against", str(made["source"]), "--texts", str(tmp_path / "t.jsonl"), "--svg"]
    done = run(*command, str(tmp_path / "nowhere/x.svg"), str(made["trtllm"]))
    assert done.returncode == 2 and "nowhere/x.svg" in done.stderr and done.stdout == "", "said before the measurement"
    # A device that can be opened and not written to: the verdict comes first.
    done = run(*command, "/dev/full", str(made["trtllm"]))
    assert done.returncode == 7 and "is not good enough" in done.stderr and "/dev/full" in done.stderr
    # Nothing can be measured of a checkpoint that differs in a shape or a tensor.
    shutil.copytree(made["trtllm"], tmp_path / "copy")
    edit_tensors(0, lambda t: t.pop(f"{QKV}.weight"))(tmp_path / "copy")
    done = run(*command, str(tmp_path / "x.svg"), str(tmp_path / "copy"))
    assert done.returncode == 7 and "x.svg is not written" in done.stderr
    assert not (tmp_path / "x.svg").exists()
