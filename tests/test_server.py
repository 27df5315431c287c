"""Starting and stopping Triton when something is wrong: one sentence that says what, and nothing left behind."""

from __future__ import annotations

import dataclasses
import http.server
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemobuild.errors import ChildFailed, RemoteError, UsageError
from nemobuild.triton.client import stream
from nemobuild.triton.launch import Endpoint
from nemobuild.triton.server import choose_endpoint, log_failure, running
from tests.processes import command_lines

pytestmark = pytest.mark.xdist_group("triton")
FREE = (0, 0, 0)


ANSWERING = (
    "import numpy as np, triton_python_backend_utils as pb\n"
    "class TritonPythonModel:\n"
    "    def execute(self, requests):\n"
    "        for r in requests:\n"
    "            text = pb.Tensor('text_output', np.array([[b'x']], dtype=np.object_))\n"
    "            r.get_response_sender().send(pb.InferenceResponse([text]), pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)\n"
)


def test_a_port_in_use_is_refused_by_number():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=str(port)):
            choose_endpoint(ports=(None, port, None))


def test_default_ports_give_way_to_free_ones():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8001))
            taken.listen()
        except OSError:
            pass  # something else has it, which serves as well
        endpoint = choose_endpoint()
        ports = {endpoint.http_port, endpoint.grpc_port, endpoint.metrics_port}
        assert 8001 not in ports and len(ports) == 3


def test_ports_must_differ():
    with pytest.raises(UsageError, match="9000"):
        choose_endpoint(ports=(9000, 9000, None))


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(UsageError, match=r"192\.0\.2\.1"):
        choose_endpoint("192.0.2.1")


def test_what_is_not_a_repository_is_refused(tmp_path):
    with (
        pytest.raises(UsageError, match="not a model repository"),
        running(tmp_path, choose_endpoint(ports=FREE), tmp_path / "log"),
    ):
        pass


def write_model(repository: Path, code: str) -> None:
    folder = repository / "chat" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(code)
    (folder.parent / "config.pbtxt").write_text(
        'name: "chat" backend: "python" max_batch_size: 1\n'
        'input { name: "text_input" data_type: TYPE_STRING dims: 1 optional: true }\n'
        'input { name: "max_tokens" data_type: TYPE_INT32 dims: 1 optional: true }\n'
        'input { name: "temperature" data_type: TYPE_FP32 dims: 1 optional: true }\n'
        'output { name: "text_output" data_type: TYPE_STRING dims: 1 }\n'
        "model_transaction_policy { decoupled: true } instance_group { kind: KIND_CPU }\n"
    )


def test_a_model_that_cannot_load_is_named_with_its_reason(tmp_path):
    write_model(tmp_path / "repository", "raise RuntimeError('the weights are from another planet')")
    with (
        pytest.raises(ChildFailed, match=r"chat.*the weights are from another planet") as failed,
        running(tmp_path / "repository", choose_endpoint(ports=FREE), tmp_path / "log", ready_timeout_s=60),
    ):
        pass
    assert failed.value.exit_status == 8 and str(tmp_path / "log") in failed.value.next


def test_ready_means_a_token_not_a_port(tmp_path):
    write_model(
        tmp_path / "repository",
        "import triton_python_backend_utils as pb\n"
        "class TritonPythonModel:\n"
        "    def execute(self, requests):\n"
        "        for r in requests:\n"
        "            error = pb.InferenceResponse(error=pb.TritonError('internal error: no engine'))\n"
        "            r.get_response_sender().send(error, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)\n",
    )
    with (
        pytest.raises(ChildFailed, match=r"did not generate a token.*no engine"),
        running(tmp_path / "repository", choose_endpoint(ports=FREE), tmp_path / "log", ready_timeout_s=60),
    ):
        pass


@pytest.mark.parametrize("lost", [1, 9])
def test_a_start_that_loses_a_race_inside_triton_is_made_again(tmp_path, lost):
    """As Triton 2.51 aborts now and then on a loaded machine; but not for ever."""
    starts = tmp_path / "starts"
    write_model(
        tmp_path / "repository",
        "import os, pathlib\n"
        f"starts = pathlib.Path({str(starts)!r})\n"
        "with starts.open('a') as f: f.write('x')\n"
        f"if len(starts.read_text()) <= {lost}:\n"
        "    print('terminate called after throwing boost::interprocess::lock_exception', flush=True)\n"
        "    os.kill(os.getppid(), 6)\n" + ANSWERING,
    )
    server = running(tmp_path / "repository", choose_endpoint(ports=FREE), tmp_path / "log", ready_timeout_s=60)
    if lost > 3:
        with pytest.raises(ChildFailed, match="ended"), server:
            pass
        assert len(starts.read_text()) == 3
    else:
        with server as process:
            assert process.poll() is None and len(starts.read_text()) == 2


def test_a_port_for_metrics_that_another_takes_as_triton_starts(tmp_path):
    """Triton says so, answers for a while, and then crashes; so it is started again, and refused in the end."""
    write_model(tmp_path / "repository", ANSWERING)
    starts = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = choose_endpoint(ports=FREE)
        endpoint = Endpoint(free.host, free.http_port, free.grpc_port, taken.getsockname()[1])
        with pytest.raises(ChildFailed, match=f"port {endpoint.metrics_port} for metrics") as failed:
            server = running(tmp_path / "repository", endpoint, tmp_path / "log", ready_timeout_s=60)
            with server:
                starts.append(1)
    assert failed.value.code == "no-metrics" and not starts


def test_another_server_on_the_same_port_is_not_taken_for_ours(tmp_path):
    write_model(tmp_path / "repository", "raise RuntimeError('broken')")

    class Neighbour(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"name": "another"}')

        def log_message(self, *_):
            pass

    other = http.server.HTTPServer(("127.0.0.1", 0), Neighbour)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    endpoint = dataclasses.replace(choose_endpoint(ports=FREE), http_port=other.server_address[1])
    with (
        pytest.raises(ChildFailed, match="broken"),
        running(tmp_path / "repository", endpoint, tmp_path / "log", ready_timeout_s=60),
    ):
        pass
    other.shutdown()
    other.server_close()


def test_a_server_that_is_not_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RemoteError, match="nemobuild serve"):
        list(stream(f"127.0.0.1:{port}", {"text_input": "x"}, timeout_s=30))


def test_serve_stops_on_a_signal_and_says_why_it_cannot_start(tmp_path):
    write_model(tmp_path / "repository", "import time; time.sleep(60)")
    command = [sys.executable, "-m", "nemobuild", "serve", str(tmp_path / "repository")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = tmp_path / "repository.triton.log"
    while not log.exists() or "TRITONBACKEND" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert str(tmp_path) not in command_lines()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "E1 x] \"failed to load 'chat' version 1: Internal: ModuleNotFoundError: No module named 'x'\\n\\nAt:",
            "model 'chat': ModuleNotFoundError: No module named 'x'",
        ),
        ("E1 \"Poll failed for model directory 'post': unexpected key\"", "model 'post': unexpected key"),
        (
            "failed to start HTTP service: Unavailable - Socket '127.0.0.1:1' already in use\nerror: creating server",
            "creating server",
        ),
        ("nothing of use", "its log gives no reason"),
    ],
)
def test_the_reason_is_found_in_the_log(tmp_path, text, sentence):
    (tmp_path / "log").write_text(text)
    assert sentence in log_failure(tmp_path / "log")
