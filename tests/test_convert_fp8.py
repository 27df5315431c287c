"""FP8 checkpoints with given scales: every byte against the reference cast, both formats, resume, refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemobuild.convert import executor, modelopt_hf, trtllm, workers
from nemobuild.convert.executor import convert, prepare
from nemobuild.convert.fp8_map import with_fp8
from nemobuild.convert.scales import BlockScales, GroupScales, dump_scales
from nemobuild.convert.tensor_map import Piece, ScaleRef, Target, TensorMap, check
from nemobuild.convert.workers import Progress
from nemobuild.errors import IntegrityError, NemobuildError, UsageError
from nemobuild.model.hf_config import load_spec, spec_from_config
from nemobuild.weights.safetensors import layout
from nemobuild.weights.snapshot import Snapshot, open_snapshot
from tests.checkpoints import fp8_rank_tensors, load_tensors
from tests.fp8_models import BF16, as_checkpoint_scales, fp8_tensors, given_scales
from tests.tiny import llama_config, random_weights, tiny_config, write_model, write_weights

ROOT = Path(__file__).parents[1]
CONFIGS = {
    "nas": tiny_config(),
    "deci": llama_config(model_type="deci", tie_word_embeddings=False, num_key_value_heads_per_layer=[4, 1, 8]),
    "llama": llama_config(),
}


def same(made: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert made.keys() == expected.keys()
    for name, array in expected.items():
        assert (made[name].dtype, made[name].shape) == (array.dtype, array.shape), name
        assert made[name].tobytes() == array.tobytes(), name


def with_both_kv_scales(
    ranks: list[dict[str, np.ndarray]], blocks: list[BlockScales], pp: int
) -> list[dict[str, np.ndarray]]:
    """The independent writer gives the merged KV scale only; the converter writes those of keys and values too."""
    for rank, tensors in enumerate(ranks):
        layers = np.array_split(np.arange(len(blocks)), pp)[rank // (len(ranks) // pp)]
        for local, i in enumerate(layers):
            kv = blocks[i].kv
            if kv is not None:
                for x, value in (("k", kv.key), ("v", kv.value)):
                    name = f"transformer.layers.{local}.attention.{x}_cache_scaling_factor"
                    tensors[name] = np.array([max(value, 1.0)], np.float32)
    return ranks


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 700], ids=["whole", "chunked"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (8, 1), (1, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_byte_of_the_engine_form(
    name: str, tp: int, pp: int, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(workers, "JOB_BYTES", 5 * chunk_bytes)
    config = CONFIGS[name]
    weights = random_weights(config)
    blocks = given_scales(config, weights)
    snapshot = open_snapshot(write_model(tmp_path / "m", config))
    out = tmp_path / "out"
    convert(snapshot, out, precision="fp8", kv_cache="fp8", scales=blocks, tp=tp, pp=pp)
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    ranks = fp8_rank_tensors(snapshot.spec, weights, as_checkpoint_scales(blocks), tp, pp)
    for n, expected in enumerate(with_both_kv_scales(ranks, blocks, pp)):
        same(load_tensors(out / f"rank{n}.safetensors"), expected)
    assert not (tmp_path / ".out.partial").exists()


def test_config_of_the_engine_form(tmp_path: Path) -> None:
    spec = spec_from_config(tiny_config())
    fp8 = trtllm.checkpoint_config(spec, fp8=True, fp8_kv=True)
    assert fp8.pop("quantization") == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head"],
    }
    plain = trtllm.checkpoint_config(spec)
    assert plain.pop("quantization") == {"quant_algo": None, "kv_cache_quant_algo": None}
    assert fp8 == plain


def test_kv_scales_unclamped_or_absent(tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    snapshot = open_snapshot(write_model(tmp_path / "m", config))
    blocks = given_scales(config, random_weights(config))
    assert min(min(b.kv.key, b.kv.value) for b in blocks if b.kv) < 1
    convert(snapshot, tmp_path / "raw", precision="fp8", kv_cache="fp8", scales=blocks, clamp_kv=False)
    convert(snapshot, tmp_path / "none", precision="fp8", scales=blocks)
    raw, none = (load_tensors(tmp_path / f / "rank0.safetensors") for f in ("raw", "none"))
    for i, block in enumerate(blocks):
        assert block.kv is not None
        for name, value in (("k", block.kv.key), ("v", block.kv.value), ("kv", max(block.kv.key, block.kv.value))):
            assert raw[f"transformer.layers.{i}.attention.{name}_cache_scaling_factor"].tolist() == [value]
    assert raw.keys() - none.keys() == {n for n in raw if "_cache_scaling_factor" in n}
    assert prepare(snapshot, precision="fp8", clamp_kv=False).key != prepare(snapshot, precision="fp8").key


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_wider_sources(dtype: Any, tmp_path: Path) -> None:
    config = CONFIGS["nas"]
    folder = write_model(tmp_path / "m", config)
    rng = np.random.default_rng(3)
    weights = {n: (rng.standard_normal(w.shape) * 0.1).astype(dtype) for n, w in random_weights(config).items()}
    write_weights(folder, weights)
    blocks = given_scales(config, weights)
    out = tmp_path / "out"
    convert(open_snapshot(folder), out, precision="fp8", kv_cache="fp8", format="hf", scales=blocks)
    expected = fp8_tensors(config, weights, equal=True)
    expected = {n: a.astype(BF16) if a.dtype == dtype and not n.endswith("_scale") else a for n, a in expected.items()}
    same(load_tensors(out / "model.safetensors"), expected)


def test_scales_that_scale_while_running(tmp_path: Path) -> None:
    config = CONFIGS["nas"]
    snapshot = open_snapshot(write_model(tmp_path / "m", config))
    blocks = given_scales(config, random_weights(config), static=False)
    out = tmp_path / "out"
    convert(snapshot, out, precision="fp8", format="hf", scales=blocks, static=False)
    assert not any(n.endswith("input_scale") for n in load_tensors(out / "model.safetensors"))
    inline = json.loads((out / "config.json").read_text())["quantization_config"]
    assert inline["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    assert inline["config_groups"]["group_0"]["weights"]["dynamic"] is False
    again = open_snapshot(out, fp8=True)
    for static in (True, False):
        with pytest.raises(UsageError, match="without input scales") as caught:
            convert(again, tmp_path / "trt", precision="fp8", static=static)
        assert caught.value.code == "cannot-convert"


@pytest.mark.parametrize(
    ("form", "code", "word"),
    [
        ({"precision": "fp4"}, "bad-precision", "fp4"),
        ({"precision": "fp8", "format": "gguf"}, "bad-format", "gguf"),
        ({"precision": "fp8", "kv_cache": "int8"}, "bad-kv-cache", "int8"),
        ({"precision": "fp8", "format": "hf", "tp": 2}, "cannot-convert", "not split"),
        ({"format": "hf"}, "cannot-convert", "already"),
        ({"kv_cache": "fp8"}, "cannot-convert", "calibration"),
        ({"precision": "fp8", "static": False}, "cannot-convert", "fixed scale for the input"),
        ({"precision": "fp8", "format": "hf", "static": False, "kv_cache": "fp8"}, "cannot-convert", "KV scales"),
    ],
)
def test_forms_that_cannot_be(form: dict[str, Any], code: str, word: str, tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m", CONFIGS["llama"]))
    with pytest.raises(UsageError, match=word) as caught:
        prepare(snapshot, **form)
    assert caught.value.code == code


def test_scales_of_another_model(tmp_path: Path) -> None:
    config = CONFIGS["nas"]
    snapshot = open_snapshot(write_model(tmp_path / "m", config))
    blocks = given_scales(config, random_weights(config))
    broken = list(blocks)
    groups = dict(blocks[3].groups)
    groups["model.layers.3.down"] = GroupScales(groups["model.layers.3.down"].weight / 2, 1.0)
    broken[3] = BlockScales(groups, blocks[3].kv)
    for scales, code, word in (
        (broken, "scale-too-small", "model.layers.3.mlp.down_proj.weight"),
        (given_scales(config, random_weights(config), static=False), "bad-scales", "no input scale"),
        ([*blocks[:4], blocks[0], *blocks[5:]], "bad-scales", "block 4"),
    ):
        with pytest.raises(IntegrityError, match=word) as caught:
            convert(snapshot, tmp_path / "out", precision="fp8", scales=scales)
        assert caught.value.code == code
        assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_nan_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    config = CONFIGS["nas"]
    folder = write_model(tmp_path / "m", config)
    weights = random_weights(config)
    blocks = given_scales(config, weights)
    weights["model.layers.3.mlp.up_proj.weight"][17, 101] = np.nan
    write_weights(folder, weights)
    with pytest.raises(IntegrityError, match=r"model.layers.3.mlp.up_proj.weight.*\[17, 101\]") as caught:
        convert(open_snapshot(folder), tmp_path / "out", precision="fp8", scales=blocks)
    assert caught.value.code == "not-finite"
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def zeroed(tmp_path: Path) -> tuple[Snapshot, list[BlockScales]]:
    config = CONFIGS["nas"]
    weights = random_weights(config)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        weights[name][:] = 0
    weights["model.layers.1.self_attn.o_proj.weight"][:64] = 0
    write_weights(write_model(tmp_path / "m", config), weights)
    blocks = given_scales(config, weights)
    groups = dict(blocks[0].groups) | {"model.layers.0.down": GroupScales(1.0, 1.0)}
    return open_snapshot(tmp_path / "m"), [BlockScales(groups, blocks[0].kv), *blocks[1:]]


def test_tensors_of_zeros_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(workers, "JOB_BYTES", 1 << 13)
    snapshot, blocks = zeroed(tmp_path)
    report = convert(snapshot, tmp_path / "out", precision="fp8", scales=blocks)
    zeros = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight")
    assert report.zero_tensors == zeros
    assert json.loads((tmp_path / "out/manifest.json").read_text())["fp8"]["zero_tensors"] == list(zeros)
    made = load_tensors(tmp_path / "out/rank0.safetensors")
    assert made["transformer.layers.0.ffn.proj.weights_scaling_factor"].tolist() == [1.0]
    assert not made["transformer.layers.0.ffn.proj.weight"].view(np.uint8).any()


def interrupted(snapshot: Snapshot, output: Path, part: float, **form: Any) -> None:
    def stop(progress: Progress) -> None:
        if progress.done_bytes >= part * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(snapshot, output, workers=1, progress=stop, **form)


def test_resume_keeps_scales_and_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun ends with the scales it began with, and tensors of zeros are still known."""
    monkeypatch.setattr(executor, "SYNC_BYTES", 1)
    monkeypatch.setattr(workers, "PROGRESS_INTERVAL_S", 0)
    snapshot, blocks = zeroed(tmp_path)
    asked: list[int] = []

    def ask(block: int) -> BlockScales:
        asked.append(block)
        return blocks[block]

    form = {"precision": "fp8", "kv_cache": "fp8", "scales": ask, "calibration": {"text": "one"}}
    whole = convert(snapshot, tmp_path / "whole", workers=1, **form)
    assert asked == sorted(asked) and set(asked) == {i for i, b in enumerate(blocks) if b.groups}
    interrupted(snapshot, tmp_path / "out", 0.6, **form)
    before = max(asked[len(set(asked)) :])
    asked.clear()
    resumed = convert(snapshot, tmp_path / "out", workers=1, resume=True, **form)
    assert resumed.resumed_bytes > 0
    # The scales of what was begun come from the journal.
    assert asked and min(asked) > before >= 1
    assert resumed.zero_tensors == whole.zero_tensors != ()
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_scales_are_noted_again_when_the_rank_files_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "SYNC_BYTES", 1)
    snapshot, blocks = zeroed(tmp_path)
    interrupted(snapshot, tmp_path / "out", 0.6, precision="fp8", scales=blocks)
    (tmp_path / ".out.partial" / "rank0.safetensors").unlink()
    interrupted(snapshot, tmp_path / "out", 0.5, precision="fp8", scales=blocks, resume=True)
    noted = [
        json.loads(line)["block"]
        for line in (tmp_path / ".out.partial" / "journal").read_text().splitlines()[1:]
        if line.startswith("{")
    ]
    assert noted[:2] == [0, 1]


def test_resume_with_another_calibration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "SYNC_BYTES", 1)
    snapshot, blocks = zeroed(tmp_path)
    interrupted(snapshot, tmp_path / "out", 0.5, precision="fp8", scales=blocks)
    other = [*blocks[:9], BlockScales({g: GroupScales(s.weight, 2.0) for g, s in blocks[9].groups.items()}, None)]
    for form, word in (
        ({"scales": other}, "calibration"),
        ({"scales": blocks, "format": "hf"}, "format"),
    ):
        with pytest.raises(UsageError, match=word) as caught:
            convert(snapshot, tmp_path / "out", precision="fp8", resume=True, **form)
        assert caught.value.code == "resume-mismatch"


CHILD = """
import sys, time
from pathlib import Path
from nemobuild.convert import executor, workers
from nemobuild.convert.scales import load_scales
from nemobuild.weights.snapshot import open_snapshot
executor.SYNC_BYTES = 1
workers.CHUNK_BYTES = 4096
def slow(progress):
    print(progress.done_bytes, flush=True)
    time.sleep(0.01)
blocks = load_scales(Path(sys.argv[4]).read_text())
executor.convert(open_snapshot(Path(sys.argv[1])), Path(sys.argv[2]), precision="fp8", format="hf", kv_cache="fp8",
                 scales=blocks, workers=2, progress=slow, resume=sys.argv[3] == "resume")
"""


@pytest.mark.parametrize("seed", range(2))
def test_kill_and_resume_give_the_same_bytes(seed: int, tmp_path: Path) -> None:
    snapshot, blocks = zeroed(tmp_path)
    (tmp_path / "scales.json").write_text(dump_scales(blocks))
    rng = random.Random(seed)
    for number, point in enumerate(sorted(rng.uniform(0.05, 0.9) for _ in range(2))):
        command = [sys.executable, "-c", CHILD, str(tmp_path / "m"), str(tmp_path / "out")]
        command += ["resume" if number else "fresh", str(tmp_path / "scales.json")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= point * snapshot.weight_bytes:
                time.sleep(rng.uniform(0, 0.02))
                child.kill()
                break
        assert child.wait(timeout=30) == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    form: dict[str, Any] = {"precision": "fp8", "format": "hf", "kv_cache": "fp8", "scales": blocks}
    report = convert(snapshot, tmp_path / "out", resume=True, **form)
    assert 0 < report.resumed_bytes < snapshot.weight_bytes
    convert(snapshot, tmp_path / "whole", **form)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_a_worker_that_waits_for_scales_is_woken_when_another_fails(tmp_path: Path) -> None:
    """Block 0 can be done; then both workers wait for a calibration that never answers, until one of them fails."""
    config = CONFIGS["nas"]
    snapshot = open_snapshot(write_model(tmp_path / "m", config))
    blocks = given_scales(config, random_weights(config))
    stopped, waiting = threading.Event(), threading.Semaphore(0)
    calls: list[int] = []

    def ask(block: int) -> BlockScales:
        if block < 1:
            return blocks[block]
        calls.append(block)
        if len(calls) == 2:
            raise IntegrityError("calibration-failed", "No scales.")
        waiting.release()
        if not stopped.wait(20):
            raise AssertionError("never told to stop")
        raise RuntimeError("woken")

    started_s = time.monotonic()
    with pytest.raises(NemobuildError) as caught:
        convert(
            snapshot,
            tmp_path / "out",
            precision="fp8",
            scales=ask,
            calibration={},
            on_stop=stopped.set,
            workers=2,
        )
    assert caught.value.code == "calibration-failed"
    assert stopped.is_set() and len(calls) == 2 and time.monotonic() - started_s < 10
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    config = CONFIGS["nas"]
    snapshot = open_snapshot(write_model(tmp_path / "m", config))
    blocks = given_scales(config, random_weights(config))
    for count in (1, 5):
        convert(snapshot, tmp_path / f"out{count}", precision="fp8", kv_cache="fp8", scales=blocks, workers=count)
    for file in (tmp_path / "out1").iterdir():
        assert file.read_bytes() == (tmp_path / "out5" / file.name).read_bytes()


@pytest.mark.parametrize("model", ["super-49b-v1.5", "ultra-253b-v1"])
def test_real_models_add_up(model: str) -> None:
    spec = load_spec(ROOT / "engine_configs" / "models" / f"{model}.json")
    sources = layout(Path("x"), [(n, "BF16", s) for n, s in spec.tensor_shapes().items()])[1]
    for tp, pp in ((1, 1), (8, 1), (2, 4)):
        fp8 = with_fp8(trtllm.tensor_map(spec, tp, pp), spec, trtllm.SCALES, kv=True, static=True)
        check(fp8, sources)
        if model.startswith("super") and tp * pp == 1:
            kinds = [t.scale.kind for t in fp8.ranks[0] if t.scale is not None]
            # 338 linear layers (qkv fused), 49 blocks with attention.
            assert [kinds.count(k) for k in ("weight", "input", "kv", "key", "value")] == [338, 338, 49, 49, 49]
    hf = with_fp8(modelopt_hf.tensor_map(spec), spec, modelopt_hf.SCALES, kv=True, static=True)
    check(hf, sources)
    sharded = modelopt_hf.sharded(hf)
    check(sharded, sources)
    if model.startswith("super"):
        assert len(hf.ranks[0]) == 568 + 872 + 98
        assert len(sharded.ranks) == 11


WHOLE = Piece("a", (0, 4), (0, 6), 0)
SOURCES = layout(Path("x"), [("a", "BF16", (4, 6))])[1]


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        ([Target("t", "F8_E4M3", (4, 6), (WHOLE,))], "no such conversion"),
        ([Target("t", "BF16", (4, 6), (Piece("a", (0, 4), (0, 6), 0, "g"),))], "no such conversion"),
        ([Target("t", "BF16", (4, 6), (WHOLE,)), Target("u", "F32", (2,), (), ScaleRef(0, "kv"))], "not one float32"),
        ([Target("t", "BF16", (4, 6), (WHOLE,)), Target("u", "BF16", (1,), (), ScaleRef(0, "kv"))], "not one float32"),
        (
            [
                Target("t", "F8_E4M3", (2, 6), (Piece("a", (0, 2), (0, 6), 0, "g"),)),
                Target("u", "F8_E4M3", (2, 6), (Piece("a", (2, 4), (0, 6), 0, "h"),)),
            ],
            "cast in two ways",
        ),
    ],
)
def test_maps_that_do_not_add_up(targets: list[Target], word: str) -> None:
    check(TensorMap(((Target("t", "F8_E4M3", (4, 6), (Piece("a", (0, 4), (0, 6), 0, "g"),)),),), {}), SOURCES)
    with pytest.raises(IntegrityError, match=word):
        check(TensorMap((tuple(targets),), {}), SOURCES)
