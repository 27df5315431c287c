"""A snapshot is refused for every way in which its files can disagree, and read without touching weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nemobuild.errors import NemobuildError
from nemobuild.weights.snapshot import INDEX, SINGLE, fingerprint, open_snapshot
from tests.tiny import llama_config, random_weights, tiny_config, write_model, write_weights

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def change_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_weights(folder: Path, file: str, change: Callable[[dict[str, NDArray[Any]]], Any]) -> None:
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file)


def refusal(folder: Path) -> NemobuildError:
    with pytest.raises(NemobuildError) as caught:
        open_snapshot(folder)
    return caught.value


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("config", [tiny_config(), llama_config()], ids=["nas", "llama"])
def test_a_whole_snapshot(tmp_path: Path, shards: int, config: dict[str, Any]) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m", config, shards=shards))
    shapes = snapshot.spec.tensor_shapes()
    assert {name: info.shape for name, info in snapshot.tensors.items()} == shapes
    assert snapshot.weight_bytes == 2 * snapshot.spec.parameter_count
    assert snapshot.ignored == ()


def test_fingerprint_follows_every_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    snapshot = open_snapshot(folder)
    seen = {snapshot.fingerprint}
    assert open_snapshot(folder).fingerprint == snapshot.fingerprint == fingerprint(folder, [FIRST, SECOND])
    os.utime(folder / SECOND, ns=(1, 1))
    seen.add(open_snapshot(folder).fingerprint)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    seen.add(open_snapshot(folder).fingerprint)
    write_weights(folder, random_weights(tiny_config(), seed=1))
    seen.add(open_snapshot(folder).fingerprint)
    assert len(seen) == 4


def test_harmless_extras_are_listed_not_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", llama_config(), shards=1)

    def add(weights: dict[str, NDArray[Any]]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    change_weights(folder, SINGLE, add)
    snapshot = open_snapshot(folder)
    assert set(snapshot.ignored) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert "lm_head.weight" not in snapshot.tensors


def truncate(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def pointer(folder: Path) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")


def dangling(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(folder / "gone")


def wrong_shape(weights: dict[str, NDArray[Any]]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name][:-1].copy()


def wrong_dtype(weights: dict[str, NDArray[Any]]) -> None:
    weights["model.layers.0.self_attn.k_proj.weight"] = np.zeros((64, 128), np.int8)


def extra_tensor(folder: Path) -> None:
    change_weights(folder, FIRST, lambda w: w.update({"model.layers.99.bias": np.zeros(3, np.float32)}))
    change_index(folder, lambda m: m.update({"model.layers.99.bias": FIRST}))


def missing_tensor(folder: Path) -> None:
    change_weights(folder, FIRST, lambda w: w.pop("model.layers.0.input_layernorm.weight"))
    change_index(folder, lambda m: m.pop("model.layers.0.input_layernorm.weight"))


def only_pickles(folder: Path) -> None:
    for file in (FIRST, SECOND, INDEX):
        (folder / file).unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04N.")


def no_weights(folder: Path) -> None:
    for file in (FIRST, SECOND, INDEX):
        (folder / file).unlink()


# damage -> code, exit status, a word that the sentence must have
DAMAGE: dict[str, tuple[Callable[[Path], Any], str, int, str]] = {
    "truncated-shard": (truncate, "shard-truncated", 5, SECOND),
    "pointer-file": (pointer, "pointer-file", 5, SECOND),
    "missing-shard": (lambda f: (f / SECOND).unlink(), "shard-missing", 5, SECOND),
    "dangling-link": (dangling, "shard-missing", 5, SECOND),
    "shard-not-in-index": (
        lambda f: save_file({"x": np.zeros(1, np.float32)}, f / "other.safetensors"),
        "shard-not-in-index",
        5,
        "other.safetensors",
    ),
    "index-names-absent-tensor": (
        lambda f: change_index(f, lambda m: m.update({"ghost.weight": FIRST})),
        "index-names-absent-tensors",
        5,
        "ghost.weight",
    ),
    "index-names-wrong-file": (
        lambda f: change_index(f, lambda m: m.update({"lm_head.weight": FIRST})),
        "index-names-absent-tensors",
        5,
        "lm_head.weight",
    ),
    "tensor-not-in-index": (
        lambda f: change_index(f, lambda m: m.pop("lm_head.weight")),
        "tensor-not-in-index",
        5,
        "lm_head.weight",
    ),
    "tensor-in-two-shards": (
        lambda f: change_weights(f, FIRST, lambda w: w.update(load_file(f / SECOND))),
        "duplicate-tensor",
        5,
        SECOND,
    ),
    "path-in-index": (
        lambda f: change_index(f, lambda m: m.update({"lm_head.weight": "../x.safetensors"})),
        "unsafe-index",
        5,
        "../x",
    ),
    "absolute-path-in-index": (
        lambda f: change_index(f, lambda m: m.update({"lm_head.weight": "/etc/x.safetensors"})),
        "unsafe-index",
        5,
        "/etc",
    ),
    "number-in-index": (lambda f: change_index(f, lambda m: m.update({"lm_head.weight": 7})), "unsafe-index", 5, "7"),
    "index-without-map": (lambda f: (f / INDEX).write_text("{}"), "bad-index", 5, "weight_map"),
    "index-not-json": (lambda f: (f / INDEX).write_text("{"), "bad-json", 5, INDEX),
    "index-missing": (lambda f: (f / INDEX).unlink(), "index-missing", 5, INDEX),
    "config-missing": (lambda f: (f / "config.json").unlink(), "bad-path", 2, "config.json"),
    "wrong-shape": (lambda f: change_weights(f, FIRST, wrong_shape), "wrong-shape", 5, "(64, 128)"),
    "wrong-dtype": (lambda f: change_weights(f, FIRST, wrong_dtype), "unsupported-dtype", 5, "I8"),
    "extra-tensor": (extra_tensor, "unexpected-tensor", 5, "model.layers.99.bias"),
    "missing-tensor": (missing_tensor, "tensor-missing", 5, "model.layers.0.input_layernorm.weight"),
    "only-pickles": (only_pickles, "pickled-weights", 2, "pytorch_model-00001-of-00002.bin"),
    "no-weights": (no_weights, "weights-missing", 5, SINGLE),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_every_damage_has_its_own_message(name: str, tmp_path: Path) -> None:
    damage, code, status, word = DAMAGE[name]
    folder = write_model(tmp_path / "m")
    damage(folder)
    error = refusal(folder)
    assert (error.code, error.exit_status) == (code, status), str(error)
    assert word in error.what, str(error)


def test_other_problems_are_counted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    missing_tensor(folder)
    extra_tensor(folder)
    change_weights(folder, FIRST, wrong_shape)
    error = refusal(folder)
    assert error.code == "tensor-missing"
    assert "wrong-shape" in error.why
    assert "unexpected-tensor" in error.why


def test_single_file_beside_shards_without_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", shards=1)
    save_file({"x": np.zeros(1, np.float32)}, folder / FIRST)
    assert refusal(folder).code == "index-missing"


def test_path_must_be_a_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").code == "bad-path"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file").code == "bad-path"
