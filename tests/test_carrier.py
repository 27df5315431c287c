"""The Triton carried by a wheel: really started, with a Python model of the running interpreter."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import jinja2
import pytest

from nemobuild.errors import ToolchainError
from nemobuild.triton import carrier
from nemobuild.triton.carrier import TritonInstall, carried_triton, find_libpython, find_triton
from nemobuild.wheels import cache_folder

DATA: dict[str, list[object]] = {
    "BOOL": [True, False, False],
    "UINT8": [1, 2, 250],
    "INT32": [1, -2, 21],
    "INT64": [2**40, 5],
    "UINT64": [2**60, 1],
    "FP32": [1.5, -2.5, 7.0],
    "FP64": [1.25, 3.0],
    "BYTES": ["héllo", "ภาษาไทย", "", "🙂"],
}
MODEL = """
import ctypes, json, ssl, sys, sysconfig
import jinja2, numpy as np, tokenizers
import triton_python_backend_utils as pb

class TritonPythonModel:
    def execute(self, requests):
        libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libpython" in line}
        about = {"version": list(sys.version_info[:3]), "jinja2": jinja2.__file__,
                 "numpy": np.__version__, "numpy_file": np.__file__,
                 "stdlib": sysconfig.get_path("stdlib"), "libpython": sorted(libraries)}
        about = pb.Tensor("ABOUT", np.array([json.dumps(about).encode()], dtype=object))
        return [
            pb.InferenceResponse(
                [about] + [pb.Tensor(t.name() + "_BACKWARDS", t.as_numpy()[::-1].copy()) for t in request.inputs()]
            )
            for request in requests
        ]
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_repository(folder: Path) -> Path:
    def tensor(name: str, kind: str) -> str:
        return f'{{ name: "{name}" data_type: TYPE_{"STRING" if kind == "BYTES" else kind} dims: [ -1 ] }}'

    inputs = ", ".join(tensor(kind, kind) for kind in DATA)
    outputs = ", ".join(tensor(f"{kind}_BACKWARDS", kind) for kind in DATA)
    version = folder / "backwards" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL)
    (version.parent / "config.pbtxt").write_text(
        f'backend: "python" input [ {inputs} ] output [ {outputs}, {tensor("ABOUT", "BYTES")} ]'
        " instance_group [ { kind: KIND_CPU } ]"
    )
    return folder


def start(install: TritonInstall, repository: Path, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [str(install.binary), f"--model-repository={repository}", "--http-address=127.0.0.1"]
    command += [f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    command += [f"--backend-directory={install.backend_directory}"]
    with log.open("wb") as stream:
        return subprocess.Popen(  # nothing of our environment but what find_triton says
            command, env=dict(install.env), stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )


def wait_ready(server: subprocess.Popen[bytes], port: int, log: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/models/backwards/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"Triton did not become ready:\n{log.read_text()[-4000:]}")


def stop(server: subprocess.Popen[bytes]) -> int:
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def test_a_python_model_runs_on_this_interpreter_and_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # no activated environment
    install = carried_triton()
    port, log = free_port(), tmp_path / "triton.log"
    server = start(install, write_repository(tmp_path / "repository"), port, log)
    try:
        wait_ready(server, port, log)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2", timeout=5) as reply:
            assert json.load(reply)["version"] == carrier.TRITON_VERSION
        inputs = [{"name": k, "datatype": k, "shape": [len(v)], "data": v} for k, v in DATA.items()]
        infer = urllib.request.Request(
            f"http://127.0.0.1:{port}/v2/models/backwards/infer",
            data=json.dumps({"inputs": inputs}).encode(),
            method="POST",
        )
        with urllib.request.urlopen(infer, timeout=10) as reply:
            outputs = {out["name"]: out["data"] for out in json.load(reply)["outputs"]}
    finally:
        status = stop(server)
    assert status == 0, log.read_text()[-4000:]
    about = json.loads(outputs.pop("ABOUT")[0])
    assert outputs == {f"{kind}_BACKWARDS": values[::-1] for kind, values in DATA.items()}
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert about["version"] == list(sys.version_info[:3])
    assert f"numpy=={about['numpy']}" == carrier.STUB_NUMPY[version][0]
    assert Path(about["numpy_file"]).is_relative_to(cache_folder())  # not the environment's
    assert about["jinja2"] == jinja2.__file__  # the environment's
    assert Path(about["stdlib"]).resolve() == Path(sysconfig.get_path("stdlib")).resolve()
    assert [Path(p).resolve() for p in about["libpython"]] == [find_libpython()]


def test_a_second_call_unpacks_nothing() -> None:
    first = carried_triton()
    stub = first.backend_directory / "python" / "triton_python_backend_stub"  # type: ignore[operator]
    before = (first.binary.stat().st_ino, stub.stat().st_ino)
    second = carried_triton()
    assert second == first
    assert (first.binary.stat().st_ino, stub.stat().st_ino) == before


def test_the_environment_of_the_user_is_kept_behind_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/driver/lib::")
    monkeypatch.setenv("PATH", "/opt/tools:/usr/bin")
    env = carried_triton().env
    assert env["LD_LIBRARY_PATH"].split(":")[2:] == ["/opt/driver/lib"]  # no empty entry: it would mean "here"
    assert env["PATH"].split(":")[1:] == ["/opt/tools", "/usr/bin"]


def test_tritonserver_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carried = carried_triton()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tritonserver").symlink_to(carried.binary)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    found = find_triton()
    assert (found.binary, found.backend_directory, found.origin) == (tmp_path / "bin" / "tritonserver", None, "PATH")
    assert not found.env  # no backend of this Python beside it
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_triton().backend_directory == carried.backend_directory


def test_an_installed_triton_gets_our_packages_only_for_its_own_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "bin" / "tritonserver"
    (tmp_path / "bin").mkdir()
    binary.write_bytes(b"\x7fELF")
    binary.chmod(0o755)
    (tmp_path / "backends" / "python").mkdir(parents=True)
    stub = tmp_path / "backends" / "python" / "triton_python_backend_stub"
    monkeypatch.setenv("PATH", str(binary.parent))
    for minor, ours in ((sys.version_info[1], True), (8, False)):
        # The stubs of the carried server, except 3.13's, name libpython as those of an installed server do.
        stub.write_bytes(f"\0libpython3.{minor}.so.1.0\0".encode())
        assert ("PYTHONPATH" in find_triton().env) is ours


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda m: m.setattr(sys, "version_info", (3, 14, 0, "final", 0)), "triton-python", "cpython 3.14"),
        (lambda m: m.setattr(platform, "machine", lambda: "aarch64"), "no-triton", "Linux aarch64"),
        (lambda m: m.setattr(os, "confstr", lambda _: "glibc 2.31"), "no-triton", "glibc 2.31"),
        (lambda m: m.setattr(os, "confstr", lambda _: None), "no-triton", "unknown C library"),
        (lambda m: m.setattr(Path, "is_file", lambda _: False), "no-libpython", "apt-get install libpython3."),
    ],
)
def test_what_this_machine_cannot_do_is_said(change, code, says, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    change(monkeypatch)
    with pytest.raises(ToolchainError) as caught:
        carried_triton()
    assert caught.value.code == code
    assert says in str(caught.value)


def test_libpython_is_found_through_the_loader_when_it_is_not_beside_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian has it: a static python3, libpython in a package of its own, known to ldconfig."""
    real = find_libpython()
    (tmp_path / "ldconfig").write_text(f"#!/bin/sh\necho '\t{real.name} (libc6,x86-64) => {real}'\n")
    (tmp_path / "ldconfig").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_exec_prefix", str(tmp_path))
    assert find_libpython() == real
