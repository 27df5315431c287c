"""``nemobuild doctor``: every check runs, each trouble is named with what to do, and the exit status is the worst."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemobuild.doctor import machine, report
from nemobuild.doctor.gpus import check_driver, check_gpus
from nemobuild.doctor.host import check_disk, check_ports, judge_shm
from nemobuild.doctor.machine import Listener, host_memory, listeners
from nemobuild.doctor.report import examine
from nemobuild.errors import ToolchainError, UsageError
from nemobuild.nvml import check_count, pick_gpus, read_nvidia
from nemobuild.places import load_plan
from tests.gpu_machine import docker, h100, image, nvml, put_first
from tests.toolchains import STANDINS

FP8 = "super-49b-v1.5-h100-fp8"
PAIR = "super-49b-v1.5-2xh100-bf16"


def found(findings, level):
    return [f"{finding.check}: {finding.what}" for finding in findings if finding.level == level]


def doctor(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "nemobuild", "doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )


def test_the_stand_in_has_the_names_and_numbers_of_the_real_package():
    show = "import json, pynvml; print(json.dumps({n: v for n, v in vars(pynvml).items() if isinstance(v, int)}))"
    names = "import json, pynvml; print(json.dumps([n for n in dir(pynvml) if n.startswith('nvml')]))"

    def ask(code, path):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True)
        return json.loads(done.stdout)

    standin = str(STANDINS / "driver")
    assert ask(show, standin).items() <= ask(show, "").items()
    assert set(ask(names, standin)) <= set(ask(names, ""))


@pytest.mark.skipif(Path("/proc/driver/nvidia").exists(), reason="this machine has a driver")
def test_without_a_driver_the_laptop_is_healthy_and_the_gpu_profile_is_not(tmp_path):
    done = doctor("--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0 == report["exit_status"], done.stdout
    driver = next(f for f in report["findings"] if f["check"] == "driver")
    assert driver["level"] == "note" and "libnvidia-ml.so.1" in driver["why"]
    done = doctor(FP8, "--json", cwd=tmp_path, PATH="/nowhere")
    report = json.loads(done.stdout)
    codes = {f["code"] for f in report["findings"]}
    assert done.returncode == 4 == report["exit_status"]
    assert {"no-driver", "no-docker"} <= codes  # the second is found although the first was met before
    assert {f["check"] for f in report["findings"]} >= {"driver", "memory", "disk", "shm", "versions", "ports"}
    assert all(f["next"] for f in report["findings"] if f["exit_status"] == 4)
    text = doctor(FP8, cwd=tmp_path, PATH="/nowhere").stdout
    assert "There is no NVIDIA driver on this machine." in text and "There is no docker program on PATH." in text


def test_a_profile_for_the_cpu_does_not_ask_for_a_gpu(tmp_path):
    done = doctor("smollm2-cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "error" not in done.stdout
    assert doctor("no-such-profile", cwd=tmp_path).returncode == 2


def test_a_check_that_cannot_be_made_stops_no_other(monkeypatch, tmp_path):
    def broken():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(report, "listeners", broken)
    findings = report.examine(None, tmp_path).findings
    (ports,) = (f for f in findings if f.check == "ports")
    assert ports.level == "warning" and "Input/output error" in ports.why
    assert {"driver", "memory", "disk", "shm", "versions"} <= {f.check for f in findings}


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("NVML_ERROR_LIBRARY_NOT_FOUND", "no-driver", "no NVIDIA driver"),
        ("NVML_ERROR_DRIVER_NOT_LOADED", "driver-not-loaded", "not loaded"),
        ("NVML_ERROR_LIB_RM_VERSION_MISMATCH", "driver-mismatch", "different versions"),
        ("NVML_ERROR_NO_PERMISSION", "driver-not-permitted", "this user"),
        ("NVML_ERROR_NOT_SUPPORTED", "driver-broken", "does not start"),
    ],
)
def test_a_driver_that_does_not_start(monkeypatch, name, code, words):
    nvml(monkeypatch, init=name)
    with pytest.raises(ToolchainError, match=words) as failed:
        read_nvidia()
    assert failed.value.code == code
    levels = [f.level for f in check_driver(failed.value, None)]
    assert levels == ["note" if code == "no-driver" else "error"]  # broken is worse than absent


def test_without_the_package_the_error_says_how_to_get_it(tmp_path):
    code = "import sys; sys.modules['pynvml'] = None; from nemobuild.nvml import read_nvidia; read_nvidia()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "nemobuild[gpu]" in done.stderr


def test_a_healthy_h100(monkeypatch):
    nvml(monkeypatch, h100())
    nvidia = read_nvidia()
    assert (nvidia.driver, nvidia.cuda) == ("590.44.01", (13, 1))
    plan = load_plan(FP8)
    assert [f.level for f in check_driver(nvidia, plan)] == ["ok"]
    (gpu,) = check_gpus(nvidia.gpus, plan)
    assert gpu.level == "ok" and "79.65 GiB" in gpu.what and "SM 9.0, ECC on, MIG off, 700 W" in gpu.what


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"mig": True}, 4, "MIG is on"),
        ({"sm": [8, 9], "name": "NVIDIA L40S"}, 4, "SM 8.9; the profile is for"),
        ({"total": 40 << 30}, 3, "has 40.00 GiB"),
        ({"used": 70 << 30, "processes": [{"pid": 7, "name": "vllm", "used": 69 << 30}]}, 3, "vllm (7, 69.00 GiB)"),
        ({"used": 20 << 30, "processes": [{"pid": 8}]}, 0, "a process (8)"),
        ({"used": 20 << 30}, 0, "KV cache will be smaller"),
        ({"ecc": False}, 0, "ECC is off"),
        ({"ecc_errors": 3}, 0, "3 uncorrected"),
        ({"power_mw": 350_000}, 0, "350 W of 700 W"),
    ],
)
def test_what_is_wrong_with_a_card(monkeypatch, changes, status, words):
    nvml(monkeypatch, h100(**changes))
    findings = list(check_gpus(read_nvidia().gpus, load_plan(FP8)))
    assert max(f.exit_status for f in findings) == status
    troubles = [f for f in findings if f.level in ("warning", "error")]
    assert words in " ".join(f"{f.what} {f.why}" for f in troubles)
    assert all(f.next for f in troubles)


def test_a_card_that_supports_little_is_not_ill(monkeypatch):
    nvml(monkeypatch, {"name": "NVIDIA RTX 6000 Ada Generation", "total": 48 << 30, "used": 0, "sm": [8, 9]})
    (finding,) = check_gpus(read_nvidia().gpus, None)
    assert finding.level == "ok" and "ECC" not in finding.what and "MIG" not in finding.what


def test_cards_are_counted_and_chosen(monkeypatch):
    nvml(monkeypatch, h100())
    few = list(check_gpus(read_nvidia().gpus, load_plan(PAIR)))[-1]
    assert (few.code, few.exit_status, few.what) == ("too-few-gpus", 4, "2 GPUs are needed; there are 1.")
    nvml(monkeypatch)
    assert [f.exit_status for f in check_gpus(read_nvidia().gpus, load_plan(FP8))] == [4]
    nvml(monkeypatch, h100(sm=[8, 9]), h100(), h100())
    gpus = read_nvidia().gpus
    assert [g.index for g in pick_gpus(gpus, (9, 0), 2)] == [1, 2]
    assert [g.index for g in pick_gpus(gpus, (9, 0), 3)] == [0, 1, 2]
    nvml(monkeypatch, h100(), h100(lost=True))
    with pytest.raises(ToolchainError, match="does not answer"):
        read_nvidia()


@pytest.mark.parametrize(
    ("visible", "count", "seen"),
    [
        ("2,0", 1, [2]),
        ("2, 0", 3, [2, 0]),
        ("GPU-00000001-0000", 1, [1]),
        ("GPU-00000002,0", 2, [2, 0]),
        ("GPU-0000000", 1, []),  # of several
        ("GPU-f", 1, []),
        ("7", 1, []),
        ("0,7,1", 3, [0]),  # as CUDA: nothing after one that is not there
        ("1,-1,2", 3, [1]),
        ("0,0", 2, [0]),
        ("", 1, []),
        ("-1", 1, []),
        ("NoDevFiles", 1, []),
    ],
)
def test_what_cuda_may_not_see_is_not_used(monkeypatch, tmp_path, visible, count, seen):
    nvml(monkeypatch, h100(), h100(), h100())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    chosen = pick_gpus(read_nvidia().gpus, (9, 0), count)
    assert [gpu.index for gpu in chosen] == seen
    if len(seen) < count:
        with pytest.raises(ToolchainError, match=f"there are {len(seen)}") as caught:
            check_count(chosen, count)
        assert f"CUDA_VISIBLE_DEVICES is {visible!r}" in caught.value.why


@pytest.mark.parametrize("visible", ["MIG-5c1e", "all", "0;1", "gpu0"])
def test_a_choice_of_gpus_that_is_not_understood_is_refused(monkeypatch, tmp_path, visible):
    nvml(monkeypatch, h100())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES"):
        pick_gpus(read_nvidia().gpus, (9, 0), 1)
    assert "bad-visible-devices" in {f.code for f in examine(load_plan(FP8), tmp_path).findings}


def test_a_plan_that_does_not_fit_is_not_the_machines_fault(monkeypatch, tmp_path):
    nvml(monkeypatch, h100())
    plan = load_plan("super-49b-v1.5-h200-bf16", gpu="h100-sxm")
    findings = examine(plan, tmp_path).findings
    (finding,) = (f for f in findings if f.code == "does-not-fit")
    assert (finding.check, finding.exit_status, finding.why) == ("plan", 3, " ".join(plan.shortfalls))
    assert plan.remedies[0].change in finding.next
    assert "gpu-in-use" not in {f.code for f in findings}
    assert "plan" not in {f.check for f in examine(load_plan(FP8), tmp_path).findings}


@pytest.mark.parametrize(
    ("driver", "level", "words"),
    [
        ("590.44.01", "ok", ""),
        ("600.1", "ok", ""),
        ("580.95.05", "warning", "minor version compatibility"),
        ("575.57.08", "error", "machine.container to '25.10'"),
    ],
)
def test_the_driver_against_the_container(monkeypatch, driver, level, words):
    nvml(monkeypatch, h100(), driver=driver)
    last = list(check_driver(read_nvidia(), load_plan(FP8)))[-1]
    assert last.level == level and words in f"{last.why} {last.next}"


def test_shared_memory(monkeypatch, tmp_path):
    put_first(monkeypatch, tmp_path)  # no vendor's Triton: the container that we start brings its own
    assert found(judge_shm(64 << 20, 1 << 20, None), "error") == [
        "shm: The cpu runtime needs 64.00 MiB of shared memory."
    ]
    assert not found(judge_shm(64 << 20, 1 << 20, load_plan(FP8)), "error")
    put_first(monkeypatch, image(monkeypatch, tmp_path / "image") / "bin")
    (finding,) = (f for f in judge_shm(64 << 20, 60 << 20, load_plan(FP8)) if f.level == "error")
    assert finding.exit_status == 3 and "--shm-size=2g" in finding.next


def test_memory_is_that_of_the_control_group(monkeypatch):
    whole = host_memory()
    assert 0 < whole.available_bytes <= whole.total_bytes
    monkeypatch.setattr(machine, "_group_limits", lambda: [(1 << 60, 0), (1 << 30, 1 << 29)])
    assert host_memory() == machine.HostMemory(1 << 30, 1 << 29, True)
    report = examine(load_plan(FP8))
    memory = [f for f in report.findings if f.check == "memory"]
    assert [f.level for f in memory] == ["ok", "error"] and "limit of the control group" in memory[0].what


def test_disk_asks_only_for_what_is_not_made_yet(tmp_path):
    plan = load_plan(FP8)
    assert "fetch 92.88 GiB" in str(list(check_disk(tmp_path / "build", plan))) or not found(
        check_disk(tmp_path / "build", plan), "error"
    )
    for folder in ("snapshot", "checkpoint", "engine"):
        (tmp_path / folder).mkdir()
    assert not found(check_disk(tmp_path, plan), "error")


def test_who_listens_is_read_from_the_kernel():
    with socket.create_server(("127.0.0.1", 0)) as near, socket.create_server(("0.0.0.0", 0)) as far:
        mine = {listener.port: listener for listener in listeners() if listener.pid == os.getpid()}
        assert mine[near.getsockname()[1]].address == "127.0.0.1" and not mine[near.getsockname()[1]].exposed
        assert mine[far.getsockname()[1]].exposed


def test_ports_in_use_and_exposed():
    taken = Listener("127.0.0.1", 8000, 9, "python3")
    assert found(check_ports([taken]), "note") == ["ports: Port 8000 is in use by python3."]
    open_to_all = [Listener("0.0.0.0", 8001, None, None), Listener("::", 9000, 4, "tritonserver")]
    warned = found(check_ports(open_to_all), "warning")
    assert len(warned) == 2 and all("other machines can reach it" in what for what in warned)
    mapped = [Listener("::ffff:127.0.0.1", 9000, 4, "tritonserver"), Listener("0.0.0.0", 22, 1, "sshd")]
    assert not found(check_ports(mapped), "warning")


def test_docker(monkeypatch, tmp_path):
    nvml(monkeypatch, h100())
    plan = load_plan(FP8)

    def container():
        return [f for f in examine(plan, tmp_path).findings if f.check == "container"]

    put_first(monkeypatch, tmp_path)
    if shutil.which("docker") is None:
        assert [f.code for f in container()] == ["no-docker"]
    docker(monkeypatch, tmp_path / "docker")
    (fine,) = container()
    assert fine.level == "ok" and fine.facts["gpu"]
    monkeypatch.setenv("STANDIN_DOCKER_RUNTIMES", "runc")
    assert [f.code for f in container()] == ["", "no-container-toolkit"]
    monkeypatch.setenv("STANDIN_DOCKER_FAIL", "daemon")
    (broken,) = container()
    assert broken.exit_status == 4 and "systemctl start docker" in broken.next


def test_an_engine_of_another_machine_is_found_before_serving(monkeypatch, tmp_path):
    docker(monkeypatch, tmp_path / "docker")
    manifest = {"sm": "8.9", "gpu": "NVIDIA L40S", "tensorrt": "10.14.1.48", "trtllm": "1.2.1", "container": "26.07"}
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "manifest.json").write_text(json.dumps(manifest))
    nvml(monkeypatch, h100())
    (finding,) = (f for f in examine(load_plan(FP8), tmp_path).findings if f.check == "engine")
    assert finding.exit_status == 4 and "8.9" in finding.what and "9.0" in finding.what
    (tmp_path / "engine" / "manifest.json").write_text(json.dumps(manifest | {"sm": "9.0", "trtllm": "1.2.1.2510"}))
    (finding,) = (f for f in examine(load_plan(FP8), tmp_path).findings if f.check == "engine")
    assert finding.level == "ok"


def test_versions_inside_the_container(monkeypatch, tmp_path):
    def versions(profile):
        return [f for f in examine(profile and load_plan(profile), tmp_path).findings if f.check == "versions"]

    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "25.10")
    (fine,) = versions(None)
    assert fine.facts["trtllm"] == "1.0.0" and fine.facts["container"] == "25.10"
    _, other = versions(FP8)
    assert other.code == "another-trtllm" and "container 26.07 has 1.2.1" in other.what
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "26.07")
    assert [f.level for f in versions(FP8)] == ["ok"]
    package = tmp_path / "tensorrt_llm-1.2.1.2510.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.2.1.2510\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (longer,) = versions(FP8)
    assert longer.level == "ok" and longer.facts["trtllm"] == "1.2.1.2510"
