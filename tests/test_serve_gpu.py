"""Serving the GPU runtimes: the lines are the vendor's, the engine is compared first, and nothing outlives Ctrl-C.

Docker, MPI, NVML and the vendor's Triton are stand-ins; that Triton is the real carried one with a backend
``tensorrtllm`` in Python, so repositories are really loaded and asked.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemobuild.convert.executor import convert
from nemobuild.errors import ChildFailed, IntegrityError, NemobuildError, ToolchainError, UsageError
from nemobuild.plan.toolchain import load_toolchain
from nemobuild.triton.client import stream
from nemobuild.triton.launch import Emitted, Endpoint, choose_launch, read_emitted, serve_commands, serve_line
from nemobuild.triton.repository import plan_repository, write_repository
from nemobuild.triton.server import choose_endpoint, died, running
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.gpu_machine import docker, h100, image, nvml, put_first
from tests.plans import planned
from tests.processes import command_lines
from tests.tiny import write_model

pytestmark = pytest.mark.xdist_group("triton")
FREE = (0, 0, 0)
BUILT = {"gpu": "NVIDIA H100 80GB HBM3", "sm": "9.0", "tensorrt": "10.14.1.48", "trtllm": "1.2.1", "container": "26.07"}
ENDPOINT = Endpoint("127.0.0.1", 8000, 8001, 8002)
TP2 = {"machine": {"gpu": "h100-sxm", "count": 2}, "checkpoint": {"tensor_parallel": 2}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "tiny", template=templates.SUPER_V15.replace("tool_notes", "''"))


def emit(folder: Path, source: Path, *, engine: bytes = b"ftrt", **changes) -> Path:
    """A repository of the runtime tensorrt whose engine holds the bytes ``engine``."""
    plan = planned("tensorrt", **changes)
    checkpoint = convert(
        open_snapshot(source), folder / "checkpoint", tp=plan.profile.checkpoint.tensor_parallel
    ).output
    built = folder / "engine"
    built.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (built / "config.json").write_text(json.dumps({"version": "1.2.1", "pretrained_config": config}))
    for rank in range(len(plan.ranks)):
        (built / f"rank{rank}.engine").write_bytes(engine)
    (built / "manifest.json").write_text(json.dumps({"kind": "engine", "key": "0" * 64} | BUILT))
    return write_repository(plan_repository(plan, source, built), folder / "repository")


@pytest.fixture
def inside(monkeypatch, tmp_path):
    """Inside the vendor's container, with one H100."""
    nvml(monkeypatch, h100())
    put_first(monkeypatch, image(monkeypatch, tmp_path / "image") / "bin")


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """A machine with Docker and one H100; gives the folder that lists the running containers."""
    nvml(monkeypatch, h100())
    image(monkeypatch, tmp_path / "image")
    return docker(monkeypatch, tmp_path / "docker")


def generated(endpoint) -> list[dict]:
    return list(stream(endpoint.grpc_url, {"text_input": "Hello", "max_tokens": 1}, timeout_s=60))


# The lines.


def test_one_rank_needs_no_mpi():
    for runtime in ("tensorrt", "llmapi"):
        line = serve_line(runtime, 1, Path("/r"), ENDPOINT)
        assert line[:2] == ["tritonserver", "--model-repository=/r"]
        assert "--disable-auto-complete-config" in line and "--http-address=127.0.0.1" in line
        assert "--grpc-port=8001" in line
        for option in ("--http-restricted-api", "--grpc-restricted-protocol"):
            (value,) = (word.partition("=")[2] for word in line if word.startswith(option))
            assert value.split(":")[0] == "shared-memory,model-repository,trace,logging"


def test_each_rank_of_an_engine_is_a_server_and_only_the_first_has_the_text_models():
    line = shlex.join(serve_line("tensorrt", 3, Path("/r"), ENDPOINT))
    program, *ranks = line.replace("mpirun --allow-run-as-root ", "mpirun|").replace(" : ", "|").split("|")
    assert program == "mpirun" and len(ranks) == 3
    assert all(rank.startswith("-n 1 tritonserver --model-repository=/r ") for rank in ranks)
    explicit = " --model-control-mode=explicit --load-model=tensorrt_llm"
    assert [explicit in rank for rank in ranks] == [False, True, True]
    prefixes = {word for rank in ranks for word in rank.split() if "shm-region-prefix-name=" in word}
    assert len(prefixes) == 3  # shared memory of the ranks stays apart


def test_several_ranks_of_llmapi_go_through_the_vendors_launcher():
    line = serve_line("llmapi", 4, Path("/r"), ENDPOINT)
    assert line[:6] == ["mpirun", "--allow-run-as-root", "-n", "4", "trtllm-llmapi-launch", "tritonserver"]
    assert ":" not in line


def test_the_container_gets_what_it_needs_and_no_more(tmp_path):
    (title, line), (other, within) = serve_commands(planned("tensorrt", **TP2), tmp_path)
    image_name = load_toolchain("26.07").image
    before, after = line[: line.index(image_name)], line[line.index(image_name) + 1 :]
    text = shlex.join(before)
    assert before[:2] == ["docker", "run"] and "--rm" in before
    assert "--publish 127.0.0.1:8001:8001" in text and "0.0.0.0" not in text
    assert f"type=bind,source={tmp_path},target={tmp_path},readonly" in text
    assert f"--workdir {tmp_path}" in text
    assert f"--user {'65534:65534' if os.getuid() == 0 else f'{os.getuid()}:{os.getgid()}'}" in text
    assert "memlock=-1" in text and f"--shm-size {2 << 30}" in text and "device=0,1" in text
    assert "--grpc-address=0.0.0.0" in after  # inside, where nothing but the published ports leads
    assert [word.replace("0.0.0.0", "127.0.0.1") for word in after] == within
    assert "container" in title and "inside" in other
    ((title, line),) = serve_commands(planned("cpu"), tmp_path)
    assert line[0] == "tritonserver"


def test_what_a_repository_says_of_itself(tmp_path, source):
    made = read_emitted(emit(tmp_path, source, **TP2))
    assert (made.runtime, made.ranks, made.sm) == ("tensorrt", 2, (9, 0))
    assert made.toolchain.tag == "26.07" and made.engine["tensorrt"] == "10.14.1.48"
    with pytest.raises(UsageError, match="not a model repository"):
        read_emitted(tmp_path / "engine")
    for text in ('{"profile": []}', '{"profile": {"runtime": "tpu"}}', "[]", "{"):
        (tmp_path / "repository" / "manifest.json").unlink()
        (tmp_path / "repository" / "manifest.json").write_text(text)
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            read_emitted(tmp_path / "repository")


# Serving.


def test_inside_the_container(tmp_path, source, inside):
    endpoint = choose_endpoint(ports=FREE)
    seen = []
    with running(emit(tmp_path, source), endpoint, tmp_path / "log", on_start=seen.append, ready_timeout_s=60):
        answer = generated(endpoint)
        assert answer[-1]["finish_reason"] == "stop"
    assert Path(seen[0].command[0]).name == "tritonserver" and not seen[0].removal
    assert seen[0].env["CUDA_VISIBLE_DEVICES"] == "0"


def test_two_ranks_inside_the_container_leave_nothing_behind(tmp_path, source, inside, monkeypatch):
    nvml(monkeypatch, h100(sm=[8, 9]), h100(), h100())
    endpoint = choose_endpoint(ports=FREE)
    seen = []
    repository = emit(tmp_path, source, **TP2)
    with running(repository, endpoint, tmp_path / "log", on_start=seen.append, ready_timeout_s=60):
        assert generated(endpoint)
        assert "rank waits" in (tmp_path / "log").read_text()
        assert str(repository) in command_lines()
    assert Path(seen[0].command[0]).name == "mpirun" and seen[0].env["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert str(repository) not in command_lines()


def test_docker_and_ctrl_c(tmp_path, source, outside):
    repository = emit(tmp_path, source)
    process = subprocess.Popen(
        [sys.executable, "-m", "nemobuild", "serve", str(repository), "--timeout", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("ready"), process.stderr.read()
    assert len(list(outside.iterdir())) == 1  # one container runs
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "docker run --rm" in said and said.rstrip().endswith("stopped")  # the line is shown, never hidden
    assert not list(outside.iterdir()) and str(repository) not in command_lines()


def test_a_container_does_not_outlive_its_killed_client(tmp_path, source, outside):
    """``docker run`` is only a client: when it dies alone the container lives on, and is removed by name."""
    endpoint, repository = choose_endpoint(ports=FREE), emit(tmp_path, source)
    with running(repository, endpoint, tmp_path / "log", ready_timeout_s=60) as process:
        process.kill()
        process.wait()
        assert generated(endpoint)
        assert list(outside.iterdir())
    assert not list(outside.iterdir()) and str(repository) not in command_lines()


def test_ctrl_c_while_it_loads(tmp_path, source, outside):
    repository = emit(tmp_path, source)
    slow = repository / "chat" / "1" / "model.py"
    slow.write_text("import time; time.sleep(60)")
    command = [sys.executable, "-m", "nemobuild", "serve", str(repository)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(outside.iterdir()) or str(repository / "chat") not in command_lines():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not list(outside.iterdir()) and str(repository) not in command_lines()


def test_two_ranks_of_llmapi_in_a_container(tmp_path, source, outside, monkeypatch):
    nvml(monkeypatch, h100(), h100())
    monkeypatch.setenv("STANDIN_GPUS", "2")
    machine, split = {"gpu": "h100-sxm", "count": 2}, {"format": "hf", "tensor_parallel": 2}
    plan = planned("llmapi", machine=machine, checkpoint=split)
    repository = write_repository(plan_repository(plan, source, source), tmp_path / "repository")
    endpoint = choose_endpoint(ports=FREE)
    with running(repository, endpoint, tmp_path / "log", ready_timeout_s=90):
        assert generated(endpoint)[-1]["completion_tokens"] == 1
    assert not list(outside.iterdir()) and str(repository) not in command_lines()


# What keeps it from serving.


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({"sm": [8, 9], "name": "NVIDIA L40S"}, r"built with compute capability 9\.0; serving with .* 8\.9.*H100"),
        ({}, r"built with TensorRT 10\.14\.1\.48, TensorRT-LLM 1\.2\.1; serving with TensorRT 10\.11\.0\.33.*26\.07"),
    ],
)
def test_an_engine_of_another_machine_is_not_even_loaded(tmp_path, source, inside, monkeypatch, machine, words):
    nvml(monkeypatch, h100(**machine))
    if not machine:
        monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "25.10")
    with (
        pytest.raises(ToolchainError, match=words) as failed,
        running(emit(tmp_path, source), choose_endpoint(ports=FREE), tmp_path / "log"),
    ):
        pass
    assert failed.value.exit_status == 4 and not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("cards", "visible", "code", "words"),
    [
        ([h100()], None, "too-few-gpus", "2 GPUs are needed; there are 1"),
        ([], None, "too-few-gpus", "there are 0"),
        ([h100(), h100()], "1", "too-few-gpus", "CUDA_VISIBLE_DEVICES is '1'"),
        ([h100(), h100(sm=[8, 9])], None, "engine-of-another-kind", "8.9"),
    ],
)
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_every_rank_needs_a_card_of_the_engines_kind(
    tmp_path, source, request, monkeypatch, place, cards, visible, code, words
):
    request.getfixturevalue(place)
    nvml(monkeypatch, *cards)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ToolchainError) as failed:
        choose_launch(read_emitted(emit(tmp_path, source, **TP2)), tmp_path / "repository", ENDPOINT, "id")
    assert failed.value.code == code and words in str(failed.value)


def test_a_repository_for_another_trtllm(tmp_path, inside, monkeypatch):
    """Options in model.yaml are those of one version; another one stops at the first that it does not know."""
    repository = tmp_path / "repository"
    (repository / "chat").mkdir(parents=True)
    (repository / "chat" / "config.pbtxt").write_text("")
    profile = planned("llmapi").profile.model_dump()
    manifest = {"profile": profile, "trtllm": "1.2.1", "engine": None}
    (repository / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "25.10")
    with (
        pytest.raises(ToolchainError, match=r"TensorRT-LLM 1\.2\.1; serving with TensorRT-LLM 1\.0\.0"),
        running(repository, choose_endpoint(ports=FREE), tmp_path / "log"),
    ):
        pass


def test_an_engine_that_tensorrt_refuses(tmp_path, source, inside):
    repository = emit(tmp_path, source, engine=b"built by 10.11.0.33")
    with (
        pytest.raises(ToolchainError, match=r"another TensorRT than the 10\.14\.1\.48") as failed,
        running(repository, choose_endpoint(ports=FREE), tmp_path / "log", ready_timeout_s=60),
    ):
        pass
    assert "nemobuild build" in failed.value.next and str(tmp_path / "log") in failed.value.next


def test_without_docker_and_without_the_vendors_triton(tmp_path, source, monkeypatch):
    nvml(monkeypatch, h100())
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    repository = emit(tmp_path, source)
    for where, code in (("auto", "no-docker"), ("container", "no-docker"), ("local", "no-vendor-triton")):
        with (
            pytest.raises(ToolchainError) as failed,
            running(repository, choose_endpoint(ports=FREE), tmp_path / "log", where=where),
        ):
            pass
        assert failed.value.code == code and failed.value.next


def test_a_triton_without_the_backend_is_not_the_vendors(tmp_path, source, inside, monkeypatch):
    shutil.rmtree(tmp_path / "image" / "backends")
    with (
        pytest.raises(ToolchainError, match=r"libtriton_tensorrtllm\.so"),
        running(emit(tmp_path, source), choose_endpoint(ports=FREE), tmp_path / "log", where="local"),
    ):
        pass


@pytest.mark.parametrize(("fail", "code"), [("daemon", "no-docker-daemon"), ("gpu", "no-container-toolkit")])
def test_what_docker_says(tmp_path, source, outside, monkeypatch, fail, code):
    monkeypatch.setenv("STANDIN_DOCKER_FAIL", fail)
    with (
        pytest.raises(ToolchainError) as failed,
        running(emit(tmp_path, source), choose_endpoint(ports=FREE), tmp_path / "log", ready_timeout_s=60),
    ):
        pass
    assert failed.value.code == code


def test_without_a_driver(tmp_path, source, outside, monkeypatch):
    nvml(monkeypatch, init="NVML_ERROR_LIBRARY_NOT_FOUND")
    with (
        pytest.raises(ToolchainError, match="no NVIDIA driver"),
        running(emit(tmp_path, source), choose_endpoint(ports=FREE), tmp_path / "log"),
    ):
        pass


def test_the_cpu_runtime_has_no_container(tmp_path):
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.pbtxt").write_text("")
    with (
        pytest.raises(UsageError, match="no container"),
        running(tmp_path, choose_endpoint(ports=FREE), tmp_path / "log", where="container"),
    ):
        pass


@pytest.mark.parametrize("status", [-9, 137])
def test_a_killed_server(tmp_path, status):
    error: NemobuildError = died(status, Emitted(), tmp_path / "log")
    assert isinstance(error, ChildFailed) and "out of memory" in error.why
