"""The gateway, or Triton behind it, killed under load: clients get an error, the service comes back or says why."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from nemobuild.triton.server import choose_endpoint
from tests.gateway_road import ENDLESS, HI, LOOP, MODEL, OFF_ANSWER, write_road

pytestmark = pytest.mark.xdist_group("triton")
STREAMS = 6


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_road(tmp_path_factory.mktemp("road"))


def alive(pids: list[int]) -> list[int]:
    """Those that still run; one that ended and was not yet collected does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


class Service:
    """``nemobuild serve --openai`` as a user starts it."""

    def __init__(self, repository: Path, folder: Path) -> None:
        endpoint = choose_endpoint(ports=(0, 0, 0))
        command = [sys.executable, "-m", "nemobuild", "serve", str(repository), "--openai", "--json"]
        command += ["--log", str(folder / "triton.log")]
        for name in ("http", "grpc", "metrics"):
            command += [f"--{name}-port", str(getattr(endpoint, f"{name}_port"))]
        # A proxy that is not there: none of what runs on this machine may ask for it.
        env = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
        env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        text = ""
        while not text.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            text += line
        self.url = json.loads(text)["openai"].removesuffix("/v1")

    def children(self, what: str) -> list[int]:
        """Processes below this one, at any depth, that run ``what``."""
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int(
                    (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                )
        below, found = {self.process.pid}, []
        while more := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= more
        for pid in below - {self.process.pid}:
            with contextlib.suppress(OSError):
                if what in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(pid)
        return sorted(found)

    def post(self, body, path="/v1/chat/completions", timeout_s=60.0):
        data = json.dumps({"model": MODEL, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        return urllib.request.urlopen(request, timeout=timeout_s)


@pytest.fixture
def service(repository, tmp_path):
    service = Service(repository, tmp_path)
    yield service
    everything = service.children("")
    service.process.terminate()
    service.process.communicate(timeout=60)
    assert not alive(everything)


def endless_streams(service):
    """Streams that never end by themselves, and a list that gets how each of them did end."""
    ends: list[str] = []
    begun = threading.Semaphore(0)

    def read():
        said = False
        try:
            with service.post({"prompt": LOOP, "max_tokens": ENDLESS, "stream": True}, "/v1/completions") as answer:
                for line in answer:
                    if not said:
                        said = True
                        begun.release()
                    if line.startswith(b"data: {") and "error" in (event := json.loads(line[6:])):
                        ends.append(event["error"]["code"])
                        return
                    if line.startswith(b"data: [DONE]"):
                        ends.append("done")
                        return
            ends.append("cut")
        except (OSError, http.client.HTTPException) as error:
            ends.append(type(error).__name__)

    threads = [threading.Thread(target=read) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=60)
    return threads, ends


def test_a_killed_gateway_comes_back(service):
    threads, ends = endless_streams(service)
    (gateway,) = service.children("nemobuild.gateway")
    os.kill(gateway, signal.SIGKILL)
    # The socket outlives the process: a client that connects now waits, and is not refused.
    with service.post({"messages": HI, "reasoning_effort": "none"}) as answer:
        assert json.loads(answer.read())["choices"][0]["message"]["content"] == OFF_ANSWER
    for thread in threads:
        thread.join(30)
    assert len(ends) == STREAMS and "done" not in ends  # they hear of it, at once
    (again,) = service.children("nemobuild.gateway")
    assert again != gateway
    with urllib.request.urlopen(f"{service.url}/health", timeout=30) as health:
        assert json.loads(health.read()) == {"ready": True}
    # What the killed one had asked for does not go on in the engine: the slots are free.
    for _ in range(3):
        with service.post({"prompt": LOOP, "max_tokens": 4}, "/v1/completions", timeout_s=90) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 4


def test_a_killed_triton_ends_the_service_with_a_reason(service):
    threads, ends = endless_streams(service)
    (triton,) = service.children("tritonserver --model-repository")
    everything = service.children("")
    os.kill(triton, signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    assert len(ends) == STREAMS and "done" not in ends
    _, errors = service.process.communicate(timeout=60)
    assert service.process.returncode == 8
    assert json.loads(errors)["error"]["code"] == "triton-died" and "killed" in json.loads(errors)["error"]["why"]
    assert not alive(everything)


def test_a_killed_serve_leaves_nothing_behind(repository, tmp_path):
    service = Service(repository, tmp_path)
    everything = service.children("")
    assert len(everything) > 4
    threads, _ = endless_streams(service)
    service.process.kill()
    service.process.communicate(timeout=30)
    regions = Path("/dev/shm").glob(f"nemobuild_{service.process.pid}_*")
    end = time.monotonic() + 30
    while (alive(everything) or any(regions)) and time.monotonic() < end:
        time.sleep(0.2)
        regions = Path("/dev/shm").glob(f"nemobuild_{service.process.pid}_*")
    assert not alive(everything) and not list(regions)
    for thread in threads:
        thread.join(30)
