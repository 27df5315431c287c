"""FP8 from end to end: kills, refusals and what is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemobuild.convert import calibrate, planning
from nemobuild.convert import quantize as module
from nemobuild.convert.quantize import QuantizePlan, calibration_folder, check_room, prepare, quantize
from nemobuild.convert.workers import Progress
from nemobuild.errors import DoesNotFit, IntegrityError, ToolchainError, UsageError
from nemobuild.weights.safetensors import read_array, read_header
from nemobuild.weights.snapshot import Snapshot, open_snapshot
from tests.tiny import random_weights, tiny_config, write_model, write_weights

ROOT = Path(__file__).parents[1]

# Slow in both halves, and flushed after every job, so that a kill finds it anywhere.
CHILD = r"""
import os, sys, time
from pathlib import Path
from nemobuild.convert import calibrate, executor, workers
from nemobuild.convert.quantize import prepare, quantize
from nemobuild.errors import NemobuildError
from nemobuild.weights.snapshot import open_snapshot
executor.SYNC_BYTES = 1
workers.CHUNK_BYTES = 4096
run_pack = calibrate._run_pack
def slow_pack(device, index, *rest):
    os.write(1, b"calibrate %d\n" % index)  # one write, since threads would mix their prints
    time.sleep(0.02)
    return run_pack(device, index, *rest)
calibrate._run_pack = slow_pack
def slow(progress):
    os.write(1, b"write %d\n" % progress.done_bytes)
    time.sleep(0.004)
try:
    plan = prepare(open_snapshot(Path(sys.argv[1])), kv_cache="fp8", tp=2, calibration=Path(sys.argv[3]))
    quantize(plan, Path(sys.argv[2]), progress=slow, resume=sys.argv[4] == "resume")
except KeyboardInterrupt:
    sys.exit(130)
except NemobuildError as error:
    print(error.code)
    sys.exit(error.exit_status)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("quantize") / "m")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "t.jsonl"
    rng = random.Random(5)
    words = [
        " ".join(rng.choice(["sea", "wind", "salt", "rope", "oar"]) for _ in range(rng.randint(1, 60)))
        for _ in range(12)
    ]
    file.write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    return file


@pytest.fixture
def snapshot(source: Path) -> Snapshot:
    return open_snapshot(source)


def start(source: Path, output: Path, texts: Path, how: str = "fresh") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(output), str(texts), how]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


@pytest.mark.parametrize("seed", range(2))
def test_kill_and_resume_give_the_same_bytes(
    seed: int, source: Path, snapshot: Snapshot, texts: Path, tmp_path: Path
) -> None:
    plan = prepare(snapshot, kv_cache="fp8", tp=2, calibration=texts)
    quantize(plan, tmp_path / "whole")
    rng = random.Random(seed)
    output, how = tmp_path / "out", "fresh"
    for kind, share in (("calibrate", rng.uniform(0.1, 0.5)), ("write", rng.uniform(0.5, 0.9))):
        child = start(source, output, texts, how)
        assert child.stdout is not None
        for line in child.stdout:
            word, number = line.split()
            whole = len(snapshot.spec.blocks) if word == "calibrate" else snapshot.weight_bytes
            if word == kind and int(number) >= share * whole:
                time.sleep(rng.uniform(0, 0.03))
                child.kill()
                break
        assert child.wait(timeout=60) == -signal.SIGKILL
        assert not output.exists() and calibration_folder(output).is_dir()
        how = "resume"
    report = quantize(plan, output, resume=True)
    assert report.resumed_bytes > 0
    assert read_folder(output) == read_folder(tmp_path / "whole")
    assert names(tmp_path) == ["out", "whole"]


def test_ctrl_c_stops_soon_and_keeps_the_work(source: Path, texts: Path, tmp_path: Path) -> None:
    child = start(source, tmp_path / "out", texts)
    assert child.stdout is not None
    for line in child.stdout:
        if line.split() == ["calibrate", "3"]:
            child.send_signal(signal.SIGINT)
            break
    begin_s = time.monotonic()
    child.stdout.read()
    assert child.wait(timeout=30) == 130 and time.monotonic() - begin_s < 5
    assert names(tmp_path) == [".out.calibration", ".out.partial"]


def test_the_scales_in_the_checkpoint_are_those_of_the_calibration(
    snapshot: Snapshot, texts: Path, tmp_path: Path
) -> None:
    for form, suffix in (("trtllm", "activation_scaling_factor"), ("hf", "input_scale")):
        plan = prepare(snapshot, format=form, calibration=texts)
        quantize(plan, tmp_path / form)
        found = [
            float(read_array(info).reshape(-1)[0])
            for file in sorted((tmp_path / form).glob("*.safetensors"))
            for name, info in read_header(file).items()
            if name.endswith(suffix)
        ]
        assert plan.samples is not None and plan.calibration is not None
        state = calibrate.State(tmp_path / "state", {}, resume=False)
        ids = [s.token_ids for s in plan.samples.samples]
        blocks = list(calibrate.calibrate(snapshot, ids, plan.calibration, state))
        state.close()
        expected = {pair.input for block in blocks for pair in block.groups.values()}
        assert found and set(found) == expected


def test_the_manifest_tells_where_the_scales_are_from(snapshot: Snapshot, texts: Path, tmp_path: Path) -> None:
    keys = set()
    for count in (4, 5):
        plan = prepare(snapshot, calibration=texts, samples=count)
        quantize(plan, tmp_path / str(count))
        manifest = json.loads((tmp_path / str(count) / "manifest.json").read_text())
        assert manifest["inputs"]["calibration"]["samples"] == count
        assert re.fullmatch("sha256:[0-9a-f]{64}", manifest["inputs"]["calibration"]["texts"])
        keys.add(manifest["key"])
    assert len(keys) == 2


def test_without_data(snapshot: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fixed scale for the input of every linear"):
        prepare(snapshot, calibration="none")
    quantize(prepare(snapshot, format="hf", calibration="none"), tmp_path / "out")
    tensors = [n for f in (tmp_path / "out").glob("*.safetensors") for n in read_header(f)]
    assert any(n.endswith("weight_scale") for n in tensors) and not any(n.endswith("input_scale") for n in tensors)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["inputs"]["calibration"] == {"activations": "dynamic", "method": "weights only"}
    assert names(tmp_path) == ["out"]


def test_kv_scales_as_measured(source: Path, texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemobuild", "convert", str(source), "--precision", "fp8", "--kv-cache", "fp8"]
    scales = {}
    for choice in ("clamped", "measured"):
        folder = tmp_path / choice
        subprocess.run(
            [*command, "-o", str(folder), "--calibration", str(texts), "--kv-scales", choice],
            capture_output=True,
            check=True,
        )
        tensors = read_header(folder / "rank0.safetensors")
        names = [name for name in tensors if name.endswith("kv_cache_scaling_factor")]
        scales[choice] = {name: float(read_array(tensors[name])[0]) for name in names}
    assert min(scales["measured"].values()) < 1
    assert scales["clamped"] == {name: max(value, 1.0) for name, value in scales["measured"].items()}


@pytest.mark.parametrize("what", ["activation", "weight"])
def test_values_that_are_not_finite_leave_nothing_behind(what: str, texts: Path, tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    if what == "activation":
        # Finite numbers that overflow only when they meet.
        weights["model.layers.1.post_attention_layernorm.weight"][:] = 3e38
        weights["model.layers.1.mlp.up_proj.weight"][:] = 3e38
        words = "in block 1"
    else:
        weights["model.layers.3.mlp.down_proj.weight"][1, 1] = np.nan
        words = "model.layers.3.mlp.down_proj.weight"
    write_weights(write_model(tmp_path / "m"), weights)
    (tmp_path / "to").mkdir()
    with pytest.raises(IntegrityError, match=words):
        quantize(prepare(open_snapshot(tmp_path / "m"), calibration=texts), tmp_path / "to" / "out")
    assert names(tmp_path / "to") == []


@pytest.mark.parametrize("content", ["", "{}\n", '{"text": "a"}\n{"text": \n'])
def test_a_bad_file_of_texts_leaves_nothing_behind(content: str, snapshot: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(UsageError):
        quantize(prepare(snapshot, calibration=tmp_path / "t.jsonl"), tmp_path / "out")
    assert names(tmp_path) == ["t.jsonl"]


def test_too_little_memory_or_disk_is_told_before_the_start(
    snapshot: Snapshot, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(snapshot, calibration=texts)
    monkeypatch.setattr(module, "available_memory_bytes", lambda: plan.peak_memory_bytes - 1)
    with pytest.raises(DoesNotFit, match=r"needs .* largest block"):
        quantize(plan, tmp_path / "out")
    monkeypatch.setattr(module, "available_memory_bytes", lambda: plan.peak_memory_bytes)
    real = os.statvfs(tmp_path)
    free = [plan.disk_bytes // real.f_frsize]  # rounded down: one byte short at least

    class System:
        f_blocks, f_frsize = 1, real.f_frsize

        @property
        def f_bavail(self) -> int:
            return free[0]

    monkeypatch.setattr(os, "statvfs", lambda path: System())
    with pytest.raises(DoesNotFit, match="the samples between two blocks"):
        quantize(plan, tmp_path / "out")
    assert names(tmp_path) == []
    free[0] += 1
    quantize(plan, tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_what_an_interrupted_run_left_is_room_already_taken(
    snapshot: Snapshot, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(snapshot, format="hf", calibration=texts)
    assert plan.disk_bytes == (
        plan.conversion.target_bytes + plan.conversion.carried_bytes + planning.SMALL_FILES_BYTES + plan.stream_bytes
    )
    real = os.statvfs(tmp_path)
    for folder in (".out.partial", ".out.calibration"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_bytes(b"x" * (3 << 20))

    class System:
        f_blocks, f_frsize = 1, real.f_frsize
        f_bavail = (plan.disk_bytes - (5 << 20)) // real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: System())
    check_room(plan, tmp_path / "out")
    with pytest.raises(DoesNotFit, match="the samples between two blocks"):
        check_room(plan, tmp_path / "other")


@pytest.mark.parametrize("free", [-1, 0])
def test_gpu_memory_is_looked_at_before_the_start(
    free: int, snapshot: Snapshot, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = prepare(snapshot, calibration=texts)
    assert cpu.samples is not None
    run = calibrate.plan_calibration(snapshot, [len(s.token_ids) for s in cpu.samples.samples], "cuda")
    plan = dataclasses.replace(cpu, calibration=run)
    monkeypatch.setattr(module, "TorchDevice", lambda snapshot: Gpu())

    class Gpu:
        def free_bytes(self) -> int:
            return run.device_bytes + free

    with pytest.raises(DoesNotFit) if free < 0 else contextlib.nullcontext() as caught:
        check_room(plan, tmp_path / "out")
    assert caught is None or caught.value.code == "gpu-memory-too-small"


@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_told_before_the_texts_are_read(
    device: str, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises((ToolchainError, UsageError), match=r"needs PyTorch|'tpu' is unknown"):
        prepare(snapshot, calibration=tmp_path / "absent.jsonl", device=device)


def test_names_and_folders_that_cannot_be_are_told(snapshot: Snapshot, texts: Path, tmp_path: Path) -> None:
    plan = prepare(snapshot, calibration=texts)
    with pytest.raises(UsageError, match="too long"):
        quantize(plan, tmp_path / ("x" * 250))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        quantize(plan, tmp_path / "file" / "out")
    assert names(tmp_path) == ["file"]


def test_the_key_and_resume_see_what_the_texts_became(tmp_path: Path) -> None:
    template = "{% for m in messages %}user: {{ m['content'] }}{% endfor %}"
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    source = write_model(tmp_path / "m", template=template)
    plans = [prepare(open_snapshot(source), calibration=file)]
    # Only the letters differ: no count, and no file of weights or texts.
    for settings in source.glob("*.json*"):
        if template in (text := settings.read_text()):
            settings.write_text(text.replace("user: ", "USER: "))
    plans.append(prepare(open_snapshot(source), calibration=file))
    descriptions = [p.description or {} for p in plans]
    assert {key for key in descriptions[0] if descriptions[0][key] != descriptions[1][key]} == {"token_ids", "prompt"}
    assert plans[0].conversion.key != plans[1].conversion.key
    interrupt(plans[0], tmp_path / "out")
    with pytest.raises(UsageError, match="differs in calibration"):
        quantize(plans[1], tmp_path / "out", resume=True)


def interrupt(plan: QuantizePlan, output: Path) -> None:
    """Ended from outside when the first block was calibrated and is written."""

    def stop(progress: Progress) -> None:
        if "_proj." in progress.tensor:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plan, output, progress=stop)


@pytest.mark.parametrize("broken", [True, False])
def test_the_advice_for_a_calibration_that_is_foreign_or_broken_works(
    broken: bool, snapshot: Snapshot, texts: Path, tmp_path: Path
) -> None:
    plan = prepare(snapshot, calibration=texts)
    interrupt(plan if broken else prepare(snapshot, calibration=texts, samples=3), tmp_path / "out")
    if not broken:
        shutil.rmtree(tmp_path / ".out.partial")
    else:
        (tmp_path / ".out.calibration" / "journal").write_text("junk\n")
    left = names(tmp_path)
    for _ in range(2):  # nothing is taken away unasked
        with pytest.raises(UsageError) as caught:
            quantize(plan, tmp_path / "out", resume=True)
        assert caught.value.code == "resume-mismatch" and names(tmp_path) == left
    assert f"Delete {calibration_folder(tmp_path / 'out')}" in caught.value.next
    shutil.rmtree(calibration_folder(tmp_path / "out"))
    quantize(plan, tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out"]


def test_available_memory_is_a_number_here() -> None:
    assert 64 << 20 < (module.available_memory_bytes() or 0) < 1 << 44


def test_leftovers_are_not_replaced_unasked(snapshot: Snapshot, texts: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    plan = prepare(snapshot, calibration=texts)
    with pytest.raises(KeyboardInterrupt):
        quantize(plan, tmp_path / "out", progress=stop)
    left = names(tmp_path)
    assert ".out.partial" in left
    with pytest.raises(UsageError, match="--resume"):
        quantize(plan, tmp_path / "out")
    other = prepare(snapshot, calibration=texts, samples=3)
    with pytest.raises(UsageError, match="differs in calibration"):
        quantize(other, tmp_path / "out", resume=True)
    assert names(tmp_path) == left
    quantize(plan, tmp_path / "out", resume=True)
    assert names(tmp_path) == ["out"]


def test_a_waiting_writer_wakes_when_another_fails(
    snapshot: Snapshot, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails while a worker waits for a calibration that takes long."""
    hold = threading.Event()
    original = calibrate._run_pack

    def slow(device: Any, index: int, *rest: Any) -> Any:
        hold.wait(0.3)
        return original(device, index, *rest)

    def fail(progress: Progress) -> None:
        raise DoesNotFit("disk-full", "The disk is full.")

    monkeypatch.setattr(calibrate, "_run_pack", slow)
    begin_s = time.monotonic()
    with pytest.raises(DoesNotFit):
        quantize(prepare(snapshot, calibration=texts), tmp_path / "out", progress=fail)
    assert time.monotonic() - begin_s < 5
    assert names(tmp_path) == [] and not any(t.name == "calibration" for t in threading.enumerate())


def test_an_fp8_source_takes_no_texts(snapshot: Snapshot, texts: Path, tmp_path: Path) -> None:
    quantize(prepare(snapshot, format="hf", calibration=texts), tmp_path / "hf")
    quantize(prepare(snapshot, calibration=texts), tmp_path / "direct")
    again = open_snapshot(tmp_path / "hf", fp8=True)
    with pytest.raises(UsageError, match="is FP8 already"):
        prepare(again, calibration=texts)
    plan = prepare(again)
    assert plan.calibration is None and plan.samples is None
    for option in (["--samples", "3"], ["--tokens-per-sample", "3"], ["--device", "cpu"], ["--calibration", "t"]):
        done = run_convert(tmp_path / "hf", tmp_path / "no", "--precision", "fp8", *option)
        assert done.returncode == 2 and option[0] in done.stderr, done.stderr
    quantize(plan, tmp_path / "packed")
    assert (tmp_path / "packed" / "rank0.safetensors").read_bytes() == (
        tmp_path / "direct" / "rank0.safetensors"
    ).read_bytes()


def run_convert(source: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemobuild", "convert", str(source), "-o", str(output), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_result_without_data_is_labelled(source: Path, tmp_path: Path) -> None:
    options = ["--precision", "fp8", "--format", "hf", "--calibration", "none"]
    assert "weights only, no data" in run_convert(source, tmp_path / "a", *options).stdout
    assert "weights only" in json.loads(run_convert(source, tmp_path / "b", *options, "--json").stdout)["label"]


def test_the_command(source: Path, texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nemobuild", "convert", str(source), "-o", str(tmp_path / "out")]
    options = ["--precision", "fp8", "--kv-cache", "fp8", "--calibration", str(texts)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 texts" in done.stderr and re.search(r"peak memory below .*: writing .*, largest block", done.stderr)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == config["quantization"]["kv_cache_quant_algo"] == "FP8"
    for wrong, status in (
        (["--precision", "fp4"], 2),
        (["--precision", "fp8", "--device", "tpu"], 2),
        (["--precision", "fp8", "--tokens-per-sample", "100000"], 2),
        (["--calibration", str(texts)], 2),
        (["--precision", "fp8", "--calibration", "none"], 2),
        (["--device", "cpu"], 2),
        (["--precision", "fp8", "--calibration", "none", "--format", "hf", "--samples", "3"], 2),
        (["--precision", "fp8", "--calibration", "none", "--format", "hf", "--tokens-per-sample", "3"], 2),
        (["--precision", "fp8", "--calibration", "none", "--format", "hf", "--device", "cpu"], 2),
        (["--precision", "fp8", "--calibration", str(texts), "--samples", "13"], 2),
    ):
        done = subprocess.run(
            [*command[:-1], str(tmp_path / "no"), *wrong], capture_output=True, text=True, check=False
        )
        assert done.returncode == status and done.stderr.startswith("error: "), (wrong, done.stderr)
    assert names(tmp_path) == ["out"]
