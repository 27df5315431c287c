"""Building an engine: the command, the read-back, the manifest, and every way in which it fails.

``trtllm-build`` and ``docker`` are strict stand-ins on PATH; the checkpoint is one that ``convert`` wrote.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nemobuild.convert.executor import convert
from nemobuild.engine import builder as builders
from nemobuild.engine import process, tensorrt
from nemobuild.engine.built_with import BuiltWith, compare_with_here
from nemobuild.engine.container import Mount, docker_run
from nemobuild.engine.foreign import explain
from nemobuild.errors import (
    ChildFailed,
    DoesNotFit,
    IntegrityError,
    NemobuildError,
    ToolchainError,
    UsageError,
    VerificationFailed,
)
from nemobuild.places import load_plan
from nemobuild.plan.toolchain import load_toolchain
from nemobuild.weights.snapshot import open_snapshot
from tests.standins.trtllm_build import FAILURES
from tests.test_process import alive, wait_for
from tests.tiny import write_model
from tests.toolchains import H100, enter, install_trtllm, machine, write_profile


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    return convert(open_snapshot(source), tmp_path_factory.mktemp("trt") / "checkpoint").output


@pytest.fixture
def plan(source, tmp_path):
    return load_plan(str(write_profile(tmp_path / "tiny.yaml", source)))


@pytest.fixture(params=["local", "container"])
def where(request):
    return request.param


def on(monkeypatch, tmp_path, **more):
    enter(monkeypatch, machine(tmp_path / "machine", **more))


def build(plan, checkpoint, tmp_path, where="local", **more):
    return tensorrt.build(
        plan,
        checkpoint,
        tmp_path / "engine",
        builder=builders.find_builder(plan, where),
        checkpoint_key="key of the checkpoint",
        log=tmp_path / "engine.log",
        **more,
    )


def left(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.name not in ("machine", "tiny.yaml"))


def test_an_engine_with_its_manifest(monkeypatch, tmp_path, plan, checkpoint, where):
    on(monkeypatch, tmp_path, local=where == "local", STANDIN_ALLOCATE_MIB="50", STANDIN_SECONDS="0.7")
    lines = []
    report = build(plan, checkpoint, tmp_path, where, on_line=lines.append)
    assert left(tmp_path) == ["engine", "engine.log"]
    assert sorted(p.name for p in report.engine.iterdir()) == [
        "config.json",
        "manifest.json",
        "rank0.engine",
        "timing.cache",
    ]
    manifest = json.loads((report.engine / "manifest.json").read_text())
    assert manifest["kind"] == "engine" and manifest["key"] == report.key
    assert {k: manifest[k] for k in ("gpu", "sm", "driver", "tensorrt", "trtllm", "container")} == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "sm": "9.0",
        "driver": "590.44.01",
        "tensorrt": "10.14.1.48",
        "trtllm": "1.2.1",
        "container": None if where == "local" else "26.07",
    }
    assert manifest["inputs"]["max_batch_size"] == 8 and manifest["inputs"]["checkpoint"] == "key of the checkpoint"
    assert manifest["files"]["rank0.engine"] == (report.engine / "rank0.engine").stat().st_size
    assert any("Building engine of rank 0" in line for line in lines)
    assert (
        (tmp_path / "engine.log").read_text().startswith("$ " + ("trtllm-build" if where == "local" else "docker run"))
    )
    if where == "local":  # the stand-in's daemon has no control groups
        assert report.peak_memory_bytes > 50 << 20


def test_the_timing_cache_of_one_build_is_an_input_of_the_next(monkeypatch, tmp_path, plan, checkpoint):
    on(monkeypatch, tmp_path)
    first = build(plan, checkpoint, tmp_path)
    assert "miss of 0" in first.log.read_text()
    known = tensorrt.known_timing_cache(first.engine)
    second = build(plan, checkpoint, tmp_path, timing_cache=known)
    assert "hit of 1" in second.log.read_text() and second.key != first.key
    assert build(plan, checkpoint, tmp_path).key == first.key, "equal inputs, equal key"


def test_what_a_failed_build_has_timed_is_kept(monkeypatch, tmp_path, plan, checkpoint):
    on(monkeypatch, tmp_path, STANDIN_FAIL="gpu-oom")
    with pytest.raises(DoesNotFit):
        build(plan, checkpoint, tmp_path)
    monkeypatch.delenv("STANDIN_FAIL")
    report = build(plan, checkpoint, tmp_path, timing_cache=tensorrt.known_timing_cache(tmp_path / "engine"))
    assert "hit of 1" in report.log.read_text()
    assert left(tmp_path) == ["engine", "engine.log"]


@pytest.mark.parametrize(
    ("fail", "kind", "code"),
    [
        ("gpu-oom", DoesNotFit, "gpu-out-of-memory"),
        ("torch-oom", DoesNotFit, "gpu-out-of-memory"),
        ("host-oom", DoesNotFit, "host-out-of-memory"),
        ("worker-killed", DoesNotFit, "host-out-of-memory"),
        ("serialization", ToolchainError, "engine-of-another-tensorrt"),
        ("version", ToolchainError, "engine-of-another-tensorrt"),
        ("compute", ToolchainError, "engine-of-another-gpu"),
        ("library", ToolchainError, "library-missing"),
        ("libcuda", ToolchainError, "no-gpu"),
        ("module", ToolchainError, "library-missing"),
        ("driver", ToolchainError, "driver-too-old"),
        ("no-kernel", ChildFailed, "no-tactic"),
        ("disk", DoesNotFit, "disk-full"),
        ("unknown", ChildFailed, "build-failed"),
        ("killed", ChildFailed, "build-killed"),
        ("empty", IntegrityError, "engine-incomplete"),
        ("no-config", IntegrityError, "engine-incomplete"),
    ],
)
def test_every_failure_becomes_one_sentence_and_leaves_no_engine(
    monkeypatch, tmp_path, plan, checkpoint, fail, kind, code
):
    on(monkeypatch, tmp_path, STANDIN_FAIL=fail)
    with pytest.raises(kind) as caught:
        build(plan, checkpoint, tmp_path)
    assert caught.value.code == code and caught.value.next
    if code not in ("engine-incomplete",):
        assert str(tmp_path / "engine.log") in caught.value.next
    assert set(left(tmp_path)) <= {"engine.log", "engine.timing.cache"}


def test_the_table_above_has_every_failure_of_the_stand_in():
    marks = test_every_failure_becomes_one_sentence_and_leaves_no_engine.pytestmark[0].args[1]
    assert set(FAILURES) <= {fail for fail, _, _ in marks}


def test_a_failed_build_keeps_the_engine_that_was_there(monkeypatch, tmp_path, plan, checkpoint):
    on(monkeypatch, tmp_path)
    before = build(plan, checkpoint, tmp_path)
    content = (before.engine / "manifest.json").read_bytes()
    monkeypatch.setenv("STANDIN_FAIL", "gpu-oom")
    with pytest.raises(DoesNotFit):
        build(plan, checkpoint, tmp_path)
    assert (before.engine / "manifest.json").read_bytes() == content


@pytest.mark.parametrize(
    "field",
    [
        "version",
        "build_config.max_batch_size",
        "build_config.max_num_tokens",
        "build_config.max_seq_len",
        "build_config.max_beam_width",
        "build_config.kv_cache_type",
        "build_config.weight_streaming",
        "build_config.plugin_config.tokens_per_block",
        "build_config.plugin_config.remove_input_padding",
        "build_config.plugin_config.context_fmha",
        "build_config.plugin_config.multiple_profiles",
        "build_config.plugin_config.use_paged_context_fmha",
        "build_config.plugin_config.use_fp8_context_fmha",
        "build_config.plugin_config.gemm_plugin",
        "pretrained_config.mapping",
        "pretrained_config.quantization.quant_algo",
        "pretrained_config.quantization.kv_cache_quant_algo",
    ],
)
def test_an_engine_that_came_out_otherwise_is_refused_by_field(monkeypatch, tmp_path, plan, checkpoint, field):
    wrong = {"version": "1.1.0", "build_config.kv_cache_type": "CONTINUOUS"}.get(field, 7)
    wrong = None if field.endswith("gemm_plugin") else wrong
    on(monkeypatch, tmp_path, STANDIN_CONFIG=json.dumps({field: wrong}))
    with pytest.raises(VerificationFailed) as caught:
        build(plan, checkpoint, tmp_path)
    name = field.rpartition(".")[2]
    assert ("world_size" if name == "mapping" else name) in caught.value.why
    assert not (tmp_path / "engine").exists()


def test_a_timeout_ends_the_build_and_its_workers(monkeypatch, tmp_path, source, checkpoint, where):
    plan = load_plan(str(write_profile(tmp_path / "tiny.yaml", source, build__timeout_s=1)))
    pid = tmp_path / "machine" / "pid"
    on(monkeypatch, tmp_path, local=where == "local", STANDIN_FAIL="hang", STANDIN_PID=str(pid))
    with pytest.raises(ChildFailed, match="stopped after") as caught:
        build(plan, checkpoint, tmp_path, where)
    assert "build.timeout_s" in caught.value.next
    wait_for(lambda: not alive(int(pid.read_text())))
    assert left(tmp_path) == ["engine.log"]


def test_a_container_that_ignores_the_request_does_not_outlive_its_client(monkeypatch, tmp_path, source, checkpoint):
    """Docker's client hands on a request to end, but not a kill."""
    plan = load_plan(str(write_profile(tmp_path / "tiny.yaml", source, build__timeout_s=1)))
    pid = tmp_path / "machine" / "pid"
    on(monkeypatch, tmp_path, local=False, STANDIN_FAIL="stubborn", STANDIN_PID=str(pid))
    monkeypatch.setattr(process.run, "__kwdefaults__", process.run.__kwdefaults__ | {"grace_s": 0.5})
    with pytest.raises(ChildFailed, match="stopped after"):
        build(plan, checkpoint, tmp_path, "container")
    wait_for(lambda: not alive(int(pid.read_text())))


def test_an_interrupt_ends_the_build_and_its_workers(monkeypatch, tmp_path, plan, checkpoint, where):
    pid = tmp_path / "machine" / "pid"
    on(monkeypatch, tmp_path, local=where == "local", STANDIN_FAIL="hang", STANDIN_PID=str(pid))

    def interrupt():
        wait_for(lambda: pid.exists() and pid.read_text())
        time.sleep(0.1)
        os.kill(os.getpid(), 2)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        build(plan, checkpoint, tmp_path, where)
    wait_for(lambda: not alive(int(pid.read_text())))
    assert left(tmp_path) == ["engine.log"]


def test_a_disk_that_becomes_full(monkeypatch, tmp_path, plan, checkpoint):
    on(monkeypatch, tmp_path, STANDIN_ENGINE_MIB="8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    try:
        with pytest.raises(DoesNotFit, match="disk"):
            build(plan, checkpoint, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "engine" not in left(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], check=False).returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(monkeypatch, tmp_path, plan, checkpoint, small_disk):
    on(monkeypatch, tmp_path, STANDIN_ENGINE_MIB="8")
    with pytest.raises(DoesNotFit, match="The disk became full"):
        build(plan, checkpoint, small_disk)
    assert not (small_disk / "engine").exists() and not list(small_disk.glob(".engine*"))
    (small_disk / "ballast").write_bytes(bytes(2 << 20))
    calls = (tmp_path / "machine" / "calls").read_text()
    with pytest.raises(DoesNotFit, match="free; the engine needs"):
        build(plan, checkpoint, small_disk)
    assert (tmp_path / "machine" / "calls").read_text() == calls, "told before anything ran"


def test_a_kill_for_want_of_memory_is_told_from_another(monkeypatch, tmp_path, plan, checkpoint):
    on(monkeypatch, tmp_path, STANDIN_FAIL="killed")
    counts = iter([7, 8])
    monkeypatch.setattr(process, "_oom_kills", lambda: next(counts))
    with pytest.raises(DoesNotFit, match="host ran out of memory") as caught:
        build(plan, checkpoint, tmp_path)
    assert caught.value.code == "host-out-of-memory" and "of host memory" in caught.value.why


def test_a_store_that_is_read_only(monkeypatch, tmp_path, plan, checkpoint):
    on(monkeypatch, tmp_path)
    with pytest.raises(NemobuildError, match=r"/sys/\.?engine") as caught:
        build(plan, checkpoint, Path("/sys"))
    assert caught.value.exit_status == 2


def test_a_checkpoint_that_lacks_a_tensor(monkeypatch, tmp_path, plan, source):
    from safetensors.numpy import load_file, save_file

    made = convert(open_snapshot(source), tmp_path / "checkpoint").output
    tensors = load_file(made / "rank0.safetensors")
    del tensors["transformer.layers.0.attention.qkv.weight"]
    save_file(tensors, made / "rank0.safetensors")
    on(monkeypatch, tmp_path)
    with pytest.raises(IntegrityError, match="lacks tensors") as caught:
        build(plan, made, tmp_path)
    assert "layers.0.attention.qkv.weight" in caught.value.why


def test_fp8_on_two_ranks(monkeypatch, tmp_path, source):
    from nemobuild.convert.quantize import prepare, quantize

    profile = write_profile(
        tmp_path / "tiny.yaml",
        source,
        checkpoint__precision="fp8",
        checkpoint__kv_cache="fp8",
        checkpoint__tensor_parallel=2,
        machine__count=2,
        build__workers=2,
    )
    plan = load_plan(str(profile))
    prepared = prepare(open_snapshot(source), kv_cache="fp8", tp=2, samples=2, tokens_per_sample=32)
    checkpoint = quantize(prepared, tmp_path / "checkpoint").output
    on(monkeypatch, tmp_path, local=False, cards=";".join([H100, "NVIDIA L4:8.9", H100]))
    found = builders.find_builder(plan, "container")
    assert found.gpus == (0, 2), "the card of another kind is left alone"
    report = build(plan, checkpoint, tmp_path, "container")
    assert {"rank0.engine", "rank1.engine"} <= set(report.files)
    assert json.loads((report.engine / "manifest.json").read_text())["inputs"]["use_fp8_context_fmha"] == "enable"


def test_a_builder_of_another_kind_is_refused_before_work(monkeypatch, tmp_path, plan):
    cases = [
        ({"cards": "NVIDIA L40S:8.9"}, "local", "another-gpu", "NVIDIA L40S"),
        ({"cards": ""}, "local", "another-gpu", "no GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "local", "too-few-gpus", "CUDA_VISIBLE_DEVICES is ''"),
        ({"local": False, "STANDIN_DOCKER_FAIL": "daemon"}, "container", "no-docker-daemon", "systemctl"),
        ({"local": False, "STANDIN_DOCKER_FAIL": "permission"}, "auto", "no-docker-daemon", "group docker"),
        ({"local": False}, "local", "no-trtllm-build", "--container"),
        ({"local": True}, "container", "no-docker", "--local"),
    ]
    for i, (more, where, code, words) in enumerate(cases):
        with monkeypatch.context() as patch:
            enter(patch, machine(tmp_path / f"machine{i}", **more))
            if "CUDA_VISIBLE_DEVICES" in more:
                patch.setenv("CUDA_VISIBLE_DEVICES", more["CUDA_VISIBLE_DEVICES"])
            with pytest.raises(ToolchainError) as caught:
                builders.find_builder(plan, where)
        assert caught.value.code == code and words in str(caught.value), str(caught.value)
    for i, versions in enumerate([{"trtllm": "1.1.0"}, {"tensorrt": "10.13.3.9"}, {"trtllm": "1.2.10"}]):
        environment = machine(tmp_path / f"other{i}")
        install_trtllm(tmp_path / f"versions{i}", **versions)
        with monkeypatch.context() as patch:
            enter(patch, environment | {"PATH": f"{tmp_path}/versions{i}/bin:/usr/bin:/bin"})
            with pytest.raises(ToolchainError, match=next(iter(versions.values()))) as caught:
                builders.find_builder(plan, "auto")
        assert caught.value.code == "another-version"


def test_what_is_installed_is_what_is_noted(monkeypatch, tmp_path, plan):
    environment = machine(tmp_path / "machine")
    install_trtllm(tmp_path / "longer", trtllm="1.2.1.2510")
    for record in (tmp_path / "longer").glob("lib/python3*/*/tensorrt-*.dist-info"):
        shutil.rmtree(record)
    enter(monkeypatch, environment | {"PATH": f"{tmp_path}/longer/bin:/usr/bin:/bin"})
    made = builders.find_builder(plan, "local").built_with
    assert (made.trtllm, made.tensorrt, made.container) == ("1.2.1.2510", None, None)
    compare_with_here({"trtllm": made.trtllm, "tensorrt": None}, HERE)


def test_no_driver(monkeypatch, tmp_path, plan):
    environment = machine(tmp_path / "machine")
    enter(monkeypatch, environment)
    monkeypatch.delenv("STANDIN_CARDS")
    with pytest.raises(ToolchainError) as caught:
        builders.find_builder(plan)
    assert caught.value.code == "no-driver"


@pytest.mark.parametrize(("fail", "code"), [("gpu", "no-container-toolkit"), ("old-driver", "driver-too-old")])
def test_docker_that_cannot_start_the_container(monkeypatch, tmp_path, plan, checkpoint, fail, code):
    on(monkeypatch, tmp_path, local=False, STANDIN_DOCKER_FAIL=fail)
    monkeypatch.setattr(builders, "_check_daemon", lambda docker: None)
    with pytest.raises(ToolchainError) as caught:
        build(plan, checkpoint, tmp_path, "container")
    assert caught.value.code == code


def test_an_image_that_cannot_be_had(monkeypatch, tmp_path, source, checkpoint):
    plan = load_plan(str(write_profile(tmp_path / "tiny.yaml", source, machine__container="26.03")))
    on(monkeypatch, tmp_path, local=False)
    with pytest.raises(ToolchainError) as caught:
        build(plan, checkpoint, tmp_path, "container")
    assert caught.value.code == "no-image"


def test_the_docker_line():
    line = docker_run(
        load_toolchain("26.07"),
        ["trtllm-build", "--workers", "1"],
        [Mount(Path("/w/checkpoint")), Mount(Path("/w/engine"), writable=True)],
        gpus=(0, 1),
        name="nemobuild-1",
    )
    text = " ".join(line)
    assert text.startswith("docker run --rm --init --name nemobuild-1") and '--gpus "device=0,1"' in text
    assert "--shm-size 2147483648 --ulimit memlock=-1" in text and "--network none" in text
    assert "source=/w/checkpoint,target=/w/checkpoint,readonly" in text
    assert "source=/w/engine,target=/w/engine " in text
    assert text.endswith("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3 trtllm-build --workers 1")
    assert f"--user {os.getuid()}:{os.getgid()}" in text
    assert "--cap-drop ALL --security-opt no-new-privileges" in text
    served = " ".join(docker_run(load_toolchain("26.07"), ["x"], [], gpus=(0,), name="n", ports=(("127.0.0.1", 8000),)))
    assert "--publish 127.0.0.1:8000:8000" in served and "--network" not in served


HERE = BuiltWith(gpu="H100", sm="9.0", driver="590", tensorrt="10.14.1.48", trtllm="1.2.1", container="26.07")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"sm": "8.9", "gpu": "NVIDIA L40S"}, ("compute capability 8.9", "compute capability 9.0", "NVIDIA L40S")),
        ({"tensorrt": "10.11.0.33", "container": "25.10"}, ("TensorRT 10.11.0.33", "TensorRT 10.14.1.48", "25.10")),
        ({"trtllm": "1.1.0", "container": None}, ("TensorRT-LLM 1.1.0", "TensorRT-LLM 1.2.1", "nemobuild build")),
    ],
)
def test_an_engine_of_another_kind_is_refused_before_it_is_loaded(made, words):
    manifest = {name: getattr(HERE, name) for name in BuiltWith.__slots__} | made
    with pytest.raises(ToolchainError) as caught:
        compare_with_here(manifest, HERE)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_engine_of_the_same_kind_is_accepted():
    same = {name: getattr(HERE, name) for name in BuiltWith.__slots__}
    for change in (
        {},
        {"driver": "580"},
        {"gpu": "H100 PCIe"},
        {"container": None},
        {"tensorrt": None},
        {"trtllm": "1.2.1.2510"},
    ):
        compare_with_here(same | change, HERE)
    compare_with_here({}, HERE)
    with pytest.raises(IntegrityError, match="sm"):
        compare_with_here({"sm": 9.0}, HERE)


def test_a_cause_is_found_behind_its_consequences():
    log = "libcuda.so.1: cannot open shared object file\nModuleNotFoundError: No module named 'x'\nBus error"
    found = explain(log)
    assert found is not None and found.code == "no-gpu" and "libcuda" in found.why
    assert explain("all is well") is None
    assert explain("MemoryError") is not None and explain("Traceback\nMemoryError") is not None


def test_a_contradiction_in_the_profile_is_told_before_anything_runs(monkeypatch, tmp_path, source, checkpoint):
    on(monkeypatch, tmp_path)
    with pytest.raises(UsageError, match=r"build\.gemm_plugin"):
        build(
            load_plan(str(write_profile(tmp_path / "tiny.yaml", source, build__gemm_plugin="fp8"))),
            checkpoint,
            tmp_path,
        )
    assert not (tmp_path / "machine" / "calls").exists()
