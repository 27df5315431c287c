"""``nemobuild doctor --exposed``: ports are asked what they are, and what is open is named."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from nemobuild.doctor.exposure import Service, check_exposure, identify, judge
from nemobuild.doctor.machine import Listener
from nemobuild.triton.carrier import find_triton
from nemobuild.triton.server import choose_endpoint, running
from tests.test_server import ANSWERING, write_model

pytestmark = pytest.mark.xdist_group("triton")


def at(port: int, address: str = "127.0.0.1") -> Listener:
    return Listener(address, port, None, None)


def test_our_triton_lets_one_use_the_model_and_nothing_else(tmp_path):
    write_model(tmp_path / "repository", ANSWERING)
    endpoint = choose_endpoint(ports=(0, 0, 0))
    with running(tmp_path / "repository", endpoint, tmp_path / "log", ready_timeout_s=120):
        assert identify(at(endpoint.http_port)) == Service("Triton over HTTP", ("use the model",))
        assert identify(at(endpoint.grpc_port)) == Service("Triton over gRPC", ("use the model",))
        assert identify(at(endpoint.metrics_port)).kind == "Triton's metrics"
        done = subprocess.run(
            [sys.executable, "-m", "nemobuild", "doctor", "--exposed", "--json"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = {f["facts"]["listener"]["port"]: f for f in json.loads(done.stdout)["findings"] if f["facts"]}
        assert found[endpoint.grpc_port]["level"] == "ok" and "Only this machine" in found[endpoint.grpc_port]["why"]


def test_a_triton_with_its_doors_open_is_found_out(tmp_path):
    install, endpoint = find_triton(), choose_endpoint(ports=(0, 0, 0))
    ports = [f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), endpoint.ports, strict=True)]
    addresses = [f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")]
    (tmp_path / "empty").mkdir()
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [install.binary, f"--model-repository={tmp_path / 'empty'}", *ports, *addresses],
            env=os.environ | dict(install.env),
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            for port in (endpoint.http_port, endpoint.grpc_port):
                end = time.monotonic() + 90  # a door that is slow to answer counts as closed
                while (service := identify(at(port))) is None or len(service.open_doors) < 5:
                    assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                    assert time.monotonic() < end, service
                finding = judge(at(port), service)
                assert finding.level == "warning" and "load and unload models" in finding.why
                assert "nemobuild serve" in finding.next
        finally:
            process.kill()


@contextlib.contextmanager
def web(answers):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.get(self.path, (404, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_a_gateway_with_and_without_keys():
    with web({"/v1/models": (200, {"data": []})}) as port:
        service = identify(at(port))
        assert service == Service("an OpenAI-compatible API", ("use the model",))
        assert judge(at(port), service).level == "ok"
        far = judge(at(port, "0.0.0.0"), service)
        assert far.level == "warning" and "Other machines" in far.why and "--api-keys" in far.next
    with web({"/v1/models": (401, {})}) as port:
        service = identify(at(port))
        assert judge(at(port, "::"), service).level == "ok" and not service.open_doors


def test_what_could_end_a_triton_is_said_where_others_can_reach_it():
    service = Service("Triton over gRPC", ("use the model",))
    assert "triton_grpc_error" in judge(at(1, "0.0.0.0"), service).why
    assert "triton_grpc_error" not in judge(at(1), service).why


def test_what_is_no_business_of_ours_is_left_alone():
    with web({}) as port:
        assert [f.level for f in check_exposure([at(port)])] == ["ok"]
