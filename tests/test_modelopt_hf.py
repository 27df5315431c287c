"""FP8 Hugging Face folders in ModelOpt's form: every byte, both descriptions, and what is carried along."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from nemobuild.convert import modelopt_hf
from nemobuild.convert.executor import convert, prepare
from nemobuild.convert.modelopt_hf import carried_files
from nemobuild.errors import IntegrityError
from nemobuild.weights.snapshot import open_snapshot
from tests.checkpoints import load_tensors
from tests.fp8_models import fp8_tensors, given_scales
from tests.test_convert_fp8 import CONFIGS, same
from tests.tiny import random_weights, write_model


@pytest.mark.parametrize("shard_bytes", [1 << 40, 100_000], ids=["one", "sharded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_byte_of_the_hugging_face_form(
    name: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelopt_hf, "SHARD_BYTES", shard_bytes)
    config = CONFIGS[name]
    weights = random_weights(config)
    snapshot, out = open_snapshot(write_model(tmp_path / "m", config)), tmp_path / "out"
    blocks = given_scales(config, weights)
    report = convert(snapshot, out, precision="fp8", format="hf", kv_cache="fp8", scales=blocks)
    made: dict[str, np.ndarray] = {}
    files = {file: load_tensors(out / file) for file in report.files}
    for tensors in files.values():
        made |= tensors
    # Given scales are those of the seed, equal for the layers of a group.
    same(made, fp8_tensors(config, weights, equal=True))
    index = out / "model.safetensors.index.json"
    if shard_bytes > 1 << 20:
        assert list(files) == ["model.safetensors"] and not index.exists()
    else:
        assert len(files) > 3
        assert next(iter(files)) == f"model-00001-of-{len(files):05d}.safetensors"
        value = json.loads(index.read_text())
        assert value["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert value["metadata"]["total_size"] == sum(a.nbytes for a in made.values())
        largest = max(a.nbytes for a in made.values())
        for tensors in files.values():
            assert sum(a.nbytes for a in tensors.values()) <= max(shard_bytes, largest) + 100
    again = open_snapshot(out, fp8=True)
    assert again.quantization is not None and again.spec == snapshot.spec


@pytest.mark.parametrize("value", ["\ud800", float("nan")])
def test_a_config_that_cannot_be_written_is_told_before_the_work(value: object, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["nas"] | {"_x": value})
    with pytest.raises(IntegrityError, match="cannot be written again") as caught:
        prepare(open_snapshot(folder), precision="fp8", format="hf")
    assert caught.value.code == "bad-config"


def test_files_that_are_no_texts_are_not_carried(tmp_path: Path) -> None:
    file = write_model(tmp_path / "m", CONFIGS["nas"]) / "big.json"
    for size in (256 << 20, (256 << 20) + 1):
        file.touch()
        os.truncate(file, size)
        if size == 256 << 20:
            assert "big.json" in carried_files(file.parent, ())
    with pytest.raises(IntegrityError, match=r"big\.json has 268,435,457 bytes") as caught:
        carried_files(file.parent, ())
    assert caught.value.code == "file-too-large"


def test_both_descriptions_of_the_quantisation(tmp_path: Path) -> None:
    config = CONFIGS["nas"]
    snapshot = open_snapshot(write_model(tmp_path / "m", config | {"torch_dtype": "float32"}))
    blocks = given_scales(config, random_weights(config))
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    producer = {"name": "modelopt", "version": "0.47.0"}
    for kv in ("fp8", "bf16"):
        out = tmp_path / kv
        convert(snapshot, out, precision="fp8", format="hf", kv_cache=kv, scales=blocks)
        written = json.loads((out / "config.json").read_text())
        inline = written.pop("quantization_config")
        assert written == config | {"torch_dtype": "bfloat16"}
        assert inline.pop("kv_cache_scheme", None) == (scheme if kv == "fp8" else None)
        assert inline == {
            "config_groups": {"group_0": {"input_activations": scheme, "weights": scheme, "targets": ["Linear"]}},
            "ignore": ["lm_head", "model.embed_tokens"],
            "quant_algo": "FP8",
            "producer": producer,
            "quant_method": "modelopt",
        }
        assert json.loads((out / "hf_quant_config.json").read_text()) == {
            "producer": producer,
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8" if kv == "fp8" else None,
                "exclude_modules": ["lm_head", "model.embed_tokens"],
            },
        }
        names = load_tensors(out / "model.safetensors").keys()
        assert any(name.endswith("k_scale") for name in names) == (kv == "fp8")


def carried_model(folder: Path) -> dict[str, bytes]:
    write_model(folder, CONFIGS["llama"], template="{{ messages }}")
    files = {
        "LICENSE": b"all of it",
        "USE_POLICY.md": b"policy",
        "configuration_decilm.py": b"raise SystemExit('ran')\n",
        "modules/__init__.py": b"raise SystemExit('ran')\n",
        "generation_config.json": b'{"temperature": 0.6}\r\n',
        "chat_template.jinja": b"{{ bos_token }}",
        "tokenizer.model": bytes(range(256)),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    kept = ("tokenizer.json", "tokenizer_config.json")
    files |= {name: (folder / name).read_bytes() for name in kept}
    for name in (".gitattributes", "pytorch_model.bin", "optimizer.pt", ".cache/x.json", "model.gguf", "manifest.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not this")
    return files


def test_what_is_not_weights_is_carried_along(tmp_path: Path) -> None:
    files = carried_model(tmp_path / "m")
    snapshot, blocks = open_snapshot(tmp_path / "m"), given_scales(CONFIGS["llama"], random_weights(CONFIGS["llama"]))
    out = tmp_path / "out"
    report = convert(snapshot, out, precision="fp8", format="hf", scales=blocks)
    found = {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    ours = {"config.json", "hf_quant_config.json", "manifest.json", "model.safetensors"}
    assert {n: c for n, c in found.items() if n not in ours} == files
    manifest = json.loads(found["manifest.json"])
    assert manifest["files"] == {n: len(c) for n, c in found.items() if n != "manifest.json"}
    assert report.key == manifest["key"]
    # Another tokenizer is another result.
    (tmp_path / "m/tokenizer.model").write_bytes(b"x")
    assert prepare(snapshot, precision="fp8", format="hf").key != report.key


def test_links_as_in_the_cache_of_the_hub_are_followed_and_others_refused(tmp_path: Path) -> None:
    home = tmp_path / "models--x"
    folder = home / "snapshots" / "abc"
    write_model(folder, CONFIGS["llama"])
    (home / "blobs").mkdir()
    (folder / "tokenizer.json").rename(home / "blobs" / "0123")
    (folder / "tokenizer.json").symlink_to("../../blobs/0123")
    assert carried_files(folder, ())["tokenizer.json"].read_bytes() == (home / "blobs/0123").read_bytes()
    (folder / "dangling.json").symlink_to("nowhere")
    assert "dangling.json" not in carried_files(folder, ())
    (tmp_path / "private.txt").write_text("secret")
    (folder / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(IntegrityError) as caught:
        prepare(open_snapshot(folder), precision="fp8", format="hf")
    assert caught.value.code == "unsafe-link"
    assert "private.txt" in caught.value.what
