"""verify of FP8 folders in the Hugging Face form: both descriptions are held against each other and the tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from nemobuild.convert.verify import verify
from nemobuild.weights.snapshot import Snapshot
from tests.checkpoints import load_tensors
from tests.fp8_models import SCHEME, quantization_config, write_fp8_folder
from tests.test_quality import CONFIG, LOOSE, TEXTS, write_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_all(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def snapshot(made: dict[str, Any]) -> Snapshot:
    found: Snapshot = made["snapshot"]
    return found


def edit_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        for path, change in changes.items():
            target = value
            *parts, key = path.split("__")
            for part in parts:
                target = target[part]
            target[key] = change
        (folder / file).write_text(json.dumps(value))

    return edit


def edit_hf(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_tensors(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_excluded(value: Any) -> Callable[[Path], None]:
    """The same in both descriptions."""

    def edit(folder: Path) -> None:
        edit_json("hf_quant_config.json", quantization__exclude_modules=value)(folder)
        edit_json("config.json", quantization_config__ignore=value)(folder)

    return edit


def groups(**inputs: Any) -> dict[str, Any]:
    return {"g": {"weights": SCHEME, "input_activations": SCHEME | inputs}}


Q = "model.layers.0.self_attn.q_proj"
HF_FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "no-separate-config": (
        lambda f: (f / "hf_quant_config.json").unlink(),
        "config",
        "hf_quant_config.json is missing",
    ),
    "no-inline-config": (edit_json("config.json", quantization_config=None), "config", "quantization_config in config"),
    "kv-differs": (edit_json("hf_quant_config.json", quantization__kv_cache_quant_algo=None), "config", "kv_cache"),
    "algo": (edit_json("hf_quant_config.json", quantization__quant_algo="NVFP4"), "config", "NVFP4"),
    "excluded": (edit_json("config.json", quantization_config__ignore=["lm_head"]), "config", "exclude_modules"),
    "unequal": (
        edit_hf(lambda t: t.update({f"{Q}.weight_scale": np.array(t[f"{Q}.weight_scale"] * 2, "f")})),
        "scale",
        Q,
    ),
    "kv-is-a-list": (edit_json("config.json", quantization_config__kv_cache_scheme=[1]), "config", "kv_cache_scheme"),
    "kv-is-a-number": (edit_json("config.json", quantization_config__kv_cache_scheme=5), "config", "kv_cache_scheme"),
    "excluded-is-a-number": (edit_excluded(5), "config", "no list of names"),
    "excluded-is-a-name": (edit_excluded("lm_head"), "config", "no list of names"),
    "excluded-are-no-names": (edit_excluded([1, "a"]), "config", "no list of names"),
    "excluded-is-null": (edit_excluded([None]), "config", "no list of names"),
    "four-bits": (
        edit_json("config.json", quantization_config__config_groups=groups(num_bits=4)),
        "config",
        "num_bits=4",
    ),
    "says-dynamic": (
        edit_json("config.json", quantization_config__config_groups=groups(dynamic=True)),
        "config",
        "input_activations.dynamic in its config_groups is true",
    ),
    "says-static": (
        lambda f: (
            edit_json("config.json", quantization_config__config_groups=groups(dynamic=False))(f),
            edit_hf(lambda t: [t.pop(n) for n in list(t) if n.endswith("input_scale")])(f),
        ),
        "config",
        "there is no input_scale",
    ),
    "another-form": (
        lambda f: (
            (f / "hf_quant_config.json").unlink(),
            edit_json("config.json", quantization_config=quantization_config("compressed-tensors"))(f),
        ),
        "config",
        "in the form of compressed-tensors",
    ),
    "no-input-scale": (edit_hf(lambda t: t.pop(f"{Q}.input_scale")), "scale", f"{Q}.input_scale"),
    "no-k-scale": (edit_hf(lambda t: t.pop("model.layers.1.self_attn.k_proj.k_scale")), "scale", "k_scale"),
    "flipped": (edit_hf(lambda t: t[f"{Q}.weight"].view(np.uint8).__setitem__((3, 4), 0x7E)), "bytes", Q),
    "surplus": (edit_hf(lambda t: t.update({"lm_head.weight_scale": np.array(1, "f")})), "unexpected", "lm_head"),
}


@pytest.mark.parametrize("name", HF_FAULTS)
def test_faults_of_the_hf_form(name: str, made: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    damage, kind, words = HF_FAULTS[name]
    folder = tmp_path / "copy"
    shutil.copytree(made["hf"], folder)
    damage(folder)
    report = verify(folder, snapshot)
    found = [f"{f.where} {f.what}" for f in report.findings if f.kind == kind]
    assert any(words in text for text in found), report.findings


def test_a_folder_that_others_wrote(snapshot: Snapshot, tmp_path: Path) -> None:
    """ModelOpt leaves scales of linears of one input unequal, and old versions write one description only."""
    folder = write_fp8_folder(tmp_path / "m", CONFIG)
    assert verify(folder, snapshot, texts=TEXTS, thresholds=LOOSE).findings == ()
    (folder / "manifest.json").write_text('["of something else"]')
    edit_json("config.json", quantization_config=None)(folder)
    report = verify(folder, snapshot)
    assert report.findings == () and report.precision == "fp8"
    (folder / "manifest.json").write_text('{"inputs": {"tools": {"nemobuild": "0.1.0"}}}')
    assert "missing" in verify(folder, snapshot).findings[0].what
    edit_json("config.json", quantization_config=quantization_config("modelopt"))(folder)
    assert {(f.kind, "must be equal" in f.what) for f in verify(folder, snapshot).findings} == {("scale", True)}


def test_an_unreadable_file_is_not_a_contradiction(made: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    shutil.copytree(made["hf"], tmp_path / "copy")
    edit_json("config.json", quantization_config__config_groups=groups())(tmp_path / "copy")
    (tmp_path / "copy/model.safetensors").write_bytes(b"cut")
    assert {f.kind for f in verify(tmp_path / "copy", snapshot).findings} == {"file"}
