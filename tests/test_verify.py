"""verify passes what was converted, and finds every fault that a converter or a disk can make."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nemobuild.convert import verify as module
from nemobuild.convert import verify_tensors
from nemobuild.convert.executor import convert
from nemobuild.convert.verify import KINDS, VerifyReport, default_prompts, verify
from nemobuild.convert.workers import Progress
from nemobuild.errors import UsageError
from nemobuild.weights.snapshot import Snapshot, open_snapshot
from tests.tiny import llama_config, random_weights, tiny_config, write_model, write_weights

DECI = llama_config(model_type="deci", tie_word_embeddings=False, num_key_value_heads_per_layer=[4, 1, 8])
CONFIGS = {"nas": tiny_config(), "deci": DECI, "llama": llama_config()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Snapshot, Path]:
    """A snapshot with every kind of block and its checkpoint at tp 2, pp 2."""
    folder = tmp_path_factory.mktemp("verify")
    snapshot = open_snapshot(write_model(folder / "m"))
    convert(snapshot, folder / "out", tp=2, pp=2)
    return snapshot, folder / "out"


@pytest.fixture
def copy(made: tuple[Snapshot, Path], tmp_path: Path) -> tuple[Snapshot, Path]:
    shutil.copytree(made[1], tmp_path / "copy")
    return made[0], tmp_path / "copy"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_converted_passes(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m", CONFIGS[name]))
    report = convert(snapshot, tmp_path / "out", tp=tp, pp=pp)
    seen: list[Progress] = []
    result = verify(tmp_path / "out", snapshot, progress=seen.append)
    assert result.findings == ()
    assert result.passed
    assert result.max_logit_error == 0
    assert result.compared_bytes == report.target_bytes
    assert result.prompt_tokens == 17
    assert seen[-1].done_bytes == snapshot.weight_bytes


def test_small_row_blocks_see_the_same(made: tuple[Snapshot, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_tensors, "ROW_BLOCK_BYTES", 700)
    assert verify(made[1], made[0], []).passed


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_wider_sources_pass_after_rounding(dtype: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", llama_config())
    rng = np.random.default_rng(3)
    weights = {
        name: (array.astype(np.float32) * rng.uniform(0.99, 1.01, array.shape)).astype(dtype)
        for name, array in random_weights(llama_config()).items()
    }
    write_weights(folder, weights)
    snapshot = open_snapshot(folder)
    convert(snapshot, tmp_path / "out", tp=2)
    result = verify(tmp_path / "out", snapshot)
    assert result.findings == ()
    assert result.max_logit_error == 0


def change(folder: Path, rank: int, how: Callable[[dict[str, NDArray[Any]]], Any]) -> None:
    path = folder / f"rank{rank}.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def change_config(folder: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    how(config)
    (folder / "config.json").write_text(json.dumps(config))


def swap_gate_and_up(folder: Path) -> None:
    def swap(tensors: dict[str, NDArray[Any]]) -> None:
        fc, gate = "transformer.layers.0.ffn.fc.weight", "transformer.layers.0.ffn.gate.weight"
        tensors[fc], tensors[gate] = tensors[gate], tensors[fc]

    for rank in (0, 1):
        change(folder, rank, swap)


def swap_ranks(folder: Path) -> None:
    (folder / "rank0.safetensors").rename(folder / "x")
    (folder / "rank1.safetensors").rename(folder / "rank0.safetensors")
    (folder / "x").rename(folder / "rank1.safetensors")


def flip_one_bit(folder: Path) -> None:
    path = folder / "rank3.safetensors"
    with path.open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1000, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


def swap_k_and_v(folder: Path) -> None:
    def swap(tensors: dict[str, NDArray[Any]]) -> None:
        qkv = tensors["transformer.layers.0.attention.qkv.weight"]
        kv = (len(qkv) - 64) // 2
        tensors["transformer.layers.0.attention.qkv.weight"] = np.concatenate(
            [qkv[:64], qkv[64 + kv :], qkv[64 : 64 + kv]]
        )

    for rank in (0, 1):
        change(folder, rank, swap)


def dirty_padding(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["lm_head.weight"][-1, 5] = 1


def poison(tensors: dict[str, NDArray[Any]]) -> None:
    tensors["transformer.vocab_embedding.weight"][:] = np.nan


NORM = "transformer.layers.3.input_layernorm.weight"
# damage -> kind of the worst finding, words in where it is or what it says
FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "gate-and-up-swapped": (swap_gate_and_up, "bytes", "ffn.fc"),
    "k-and-v-swapped": (swap_k_and_v, "bytes", "attention.qkv"),
    "ranks-swapped": (swap_ranks, "bytes", "rank0"),
    "one-bit": (flip_one_bit, "bytes", "1 of"),
    "missing-tensor": (
        lambda f: change(f, 1, lambda t: t.pop("transformer.layers.1.ffn.fc.weight")),
        "missing",
        "rank1: transformer.layers.1.ffn.fc.weight",
    ),
    "norm-of-a-no-op": (
        lambda f: change(f, 0, lambda t: t.update({NORM: np.ones(128, ml_dtypes.bfloat16)})),
        "unexpected",
        NORM,
    ),
    "rope-scale": (lambda f: change_config(f, lambda c: c["rotary_scaling"].update(factor=8.0)), "config", "rope"),
    "rope-base-left-out": (lambda f: change_config(f, lambda c: c.update(rotary_base=20000.0)), "config", "rope"),
    "norm-epsilon": (lambda f: change_config(f, lambda c: c.update(norm_epsilon=1e-6)), "config", "norm_epsilon"),
    "activation": (lambda f: change_config(f, lambda c: c.pop("hidden_act")), "config", "hidden_act"),
    "kv-heads": (
        lambda f: change_config(f, lambda c: c["layer_configs"][1]["attention"].update(num_key_value_heads=4)),
        "config",
        "blocks[1]",
    ),
    "config-gone": (lambda f: (f / "config.json").unlink(), "config", "config.json"),
    "dtype-in-config": (lambda f: change_config(f, lambda c: c.update(dtype="float16")), "config", "float16"),
    "mapping": (
        lambda f: change_config(f, lambda c: c.update(mapping={"world_size": 2, "tp_size": 2, "pp_size": 1})),
        "file",
        "rank2",
    ),
    "wrong-dtype": (
        lambda f: change(
            f,
            0,
            lambda t: t.update(
                {
                    "transformer.layers.0.post_layernorm.weight": t[
                        "transformer.layers.0.post_layernorm.weight"
                    ].astype(np.float16)
                }
            ),
        ),
        "dtype",
        "F16",
    ),
    "wrong-shape": (
        lambda f: change(
            f,
            2,
            lambda t: t.update(
                {
                    "transformer.layers.0.attention.qkv.weight": t["transformer.layers.0.attention.qkv.weight"][
                        :-1
                    ].copy()
                }
            ),
        ),
        "shape",
        "attention.qkv",
    ),
    "truncated-file": (lambda f: os.truncate(f / "rank2.safetensors", 5000), "file", "rank2.safetensors"),
    "file-gone": (lambda f: (f / "rank2.safetensors").unlink(), "file", "rank2.safetensors"),
    "file-too-many": (
        lambda f: shutil.copy(f / "rank0.safetensors", f / "rank4.safetensors"),
        "file",
        "rank4.safetensors",
    ),
    "dirty-padding": (lambda f: change(f, 3, dirty_padding), "bytes", "beyond the vocabulary"),
    "nan": (lambda f: change(f, 0, poison), "bytes", "vocab_embedding"),
}


def worst(report: VerifyReport) -> tuple[str, str]:
    assert not report.passed
    order = [KINDS.index(f.kind) for f in report.findings]
    assert order == sorted(order)
    return report.findings[0].kind, f"{report.findings[0].where} {report.findings[0].what}"


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, copy: tuple[Snapshot, Path]) -> None:
    damage, kind, word = FAULTS[name]
    snapshot, folder = copy
    damage(folder)
    report = verify(folder, snapshot)
    found, text = worst(report)
    assert found == kind, report.findings
    assert any(word in f"{f.where} {f.what}" for f in report.findings if f.kind == kind), text


@pytest.mark.parametrize("name", ["gate-and-up-swapped", "k-and-v-swapped", "nan"])
def test_logits_find_it_too(name: str, copy: tuple[Snapshot, Path]) -> None:
    snapshot, folder = copy
    FAULTS[name][0](folder)
    report = verify(folder, snapshot)
    assert "logits" in {f.kind for f in report.findings}
    assert report.max_logit_error is not None
    assert not report.max_logit_error <= module.LOGIT_TOLERANCE


def test_one_bit_is_placed(copy: tuple[Snapshot, Path]) -> None:
    snapshot, folder = copy
    before = load_file(folder / "rank3.safetensors")
    flip_one_bit(folder)
    after = load_file(folder / "rank3.safetensors")
    name, array = next((n, a) for n, a in before.items() if (a.view(np.uint16) != after[n].view(np.uint16)).any())
    where = ", ".join(str(i) for i in np.argwhere(array.view(np.uint16) != after[name].view(np.uint16))[0])
    finding = verify(folder, snapshot, []).findings[0]
    assert finding.where == f"rank3: {name}"
    assert f"[{where}]" in finding.what


def test_another_model_of_the_same_shape(made: tuple[Snapshot, Path], tmp_path: Path) -> None:
    other = open_snapshot(write_model(tmp_path / "m", seed=1))
    report = verify(made[1], other)
    assert worst(report)[0] == "bytes"
    assert len({f.where for f in report.findings}) > 50


def test_tied_head_may_be_left_out(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m", llama_config()))
    convert(snapshot, tmp_path / "out")
    change(tmp_path / "out", 0, lambda t: t.pop("lm_head.weight"))
    assert verify(tmp_path / "out", snapshot).passed


def test_prompts(made: tuple[Snapshot, Path], tmp_path: Path) -> None:
    snapshot, folder = made
    assert verify(folder, snapshot, []).max_logit_error is None
    assert verify(folder, snapshot, [[1, 2, 3], [264]]).prompt_tokens == 4
    assert default_prompts(snapshot.spec) == default_prompts(snapshot.spec)
    bad: list[list[list[int]]] = [[[]], [[265]], [[-1]]]
    for prompts in bad:
        with pytest.raises(UsageError):
            verify(folder, snapshot, prompts)
    with pytest.raises(UsageError):
        verify(tmp_path / "nowhere", snapshot)
