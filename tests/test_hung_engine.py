"""An engine that hangs: nobody waits for ever, the service says that it is not ready, and comes back by itself."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import time
import urllib.error
import urllib.request

import pytest

from nemobuild.errors import NemobuildError
from nemobuild.gateway.errors import ApiError
from nemobuild.gateway.process import GatewayProcess, listening, url_of
from nemobuild.gateway.upstream import Upstream
from nemobuild.triton.client import stream
from nemobuild.triton.guard import stubs
from nemobuild.triton.server import choose_endpoint, running
from tests.gateway_road import ENDLESS, HI, LOOP, MODEL, write_road

pytestmark = pytest.mark.xdist_group("triton")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    repository = write_road(tmp_path_factory.mktemp("road"))
    config = repository / "chat" / "config.pbtxt"
    text = config.read_text()
    for name, usual, quick in (("period", "10", "0.5"), ("timeout", "30", "3")):
        before, key, after = text.partition(f'"watchdog_{name}_s"')
        text = before + key + after.replace(f'"{usual}"', f'"{quick}"', 1)
    config.write_text(text)
    return repository


def asked(url, path, body=None):
    """Status and body of a request to the gateway."""
    request = urllib.request.Request(
        url + path, body and json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def within(condition, limit_s=60.0):
    end = time.monotonic() + limit_s
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


@pytest.mark.parametrize("way", ["lane", "grpc"])
def test_an_engine_that_hangs(repository, tmp_path, way):
    for model in ("chat", "tensorrt_llm_collect"):
        config = repository / model / "config.pbtxt"
        config.write_text(config.read_text().replace('"lane"', f'"{way}"'))
    endpoint = choose_endpoint(ports=(0, 0, 0))
    assets = repository / "chat" / "1" / "assets"
    with (
        running(repository, endpoint, tmp_path / "triton.log", ready_timeout_s=120) as triton,
        listening("127.0.0.1", 0, None) as bound,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        url, gateway = url_of(bound), GatewayProcess(bound, endpoint, assets, None, tmp_path / "gateway.log")
        try:
            assert within(lambda: asked(url, "/health")[0] == 200)
            endless = stream(endpoint.grpc_url, {"text_input": LOOP, "max_tokens": ENDLESS}, timeout_s=90)
            next(endless)
            (engine,) = (pid for pid, model in stubs(triton.pid).items() if model == "tensorrt_llm")
            os.kill(engine, signal.SIGSTOP)
            try:
                late = pool.submit(
                    failure, stream(endpoint.grpc_url, {"text_input": "x", "timeout_ms": 500}, timeout_s=90)
                )
                whole = pool.submit(asked, url, "/v1/chat/completions", {"model": MODEL, "messages": HI})
                with pytest.raises(ApiError) as silent:
                    asyncio.run(first_piece(endpoint.grpc_url, {"text_input": "x", "stream": True}, silence_s=0.3))
                assert (silent.value.status, silent.value.code) == (504, "timeout")
                assert "timeout_ms: the answer was not whole after 500 ms" in late.result(90)
                assert "the engine does not answer" in failure(endless)
                assert within(lambda: asked(url, "/health")[0] == 503)
                if way == "grpc":  # Triton, being asked, notices too that a process stands still, and starts it anew
                    assert whole.result(90)[0] in (500, 503)
                    return
                assert whole.result(90)[0] == 503
                status, body = asked(url, "/v1/chat/completions", {"model": MODEL, "messages": HI, "stream": True})
                assert status == 503 and json.loads(body)["error"]["code"] == "engine_silent"
            finally:
                os.kill(engine, signal.SIGCONT)
            assert within(lambda: asked(url, "/health")[0] == 200)
            assert asked(url, "/v1/chat/completions", {"model": MODEL, "messages": HI})[0] == 200
        finally:
            gateway.stop()


async def first_piece(url, fields, silence_s):
    upstream = Upstream(url)
    try:
        return await anext(upstream.ask(fields, silence_s))
    finally:
        await upstream.close()


def failure(responses) -> str:
    try:
        for _ in responses:
            pass
    except NemobuildError as error:
        return error.why
    return "none"
