"""The whole road through a real Triton: weights that say known texts, asked over gRPC and HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from nemobuild.convert.executor import convert
from nemobuild.errors import UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.triton.client import stream, whole
from nemobuild.triton.repository import plan_repository, write_repository
from nemobuild.triton.server import choose_endpoint, running
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.plans import planned
from tests.scripted import CLOSED, write_scripted

pytestmark = pytest.mark.xdist_group("triton")
FREE = (0, 0, 0)

REASONING = "\nशायद … ลองคิดดู <TOOLCALL> is only quoted 🤔\n"
ANSWER = "\n\nสวัสดีครับ, नमस्ते! Grüße 👩‍👩‍👧‍👦🏳️‍🌈 fertig."
OFF_ANSWER = "Sofort: ตอบทันที, तुरंत 🙂. STOP here, not this."
CALLS = '[{"name": "get_weather", "arguments": {"city": "Zürich"}}]'
SCRIPTS = {
    "\n": f"<think>{REASONING}</think>{ANSWER}",
    CLOSED: OFF_ANSWER,
    "T": f"no tools asked for: <TOOLCALL>{CALLS}</TOOLCALL>",
    "L": "round and round, ",
}
TEMPLATE = templates.SUPER_V15.replace("tool_notes", "''")
MESSAGES = json.dumps([{"role": "user", "content": "Hi"}])


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("road")
    source = write_scripted(folder / "hf", SCRIPTS, TEMPLATE, loops=("L",), spelled="SHi")
    checkpoint = convert(open_snapshot(source), folder / "checkpoint", tp=2).output
    plan = planned(
        config=load_json(source / "config.json"),
        checkpoint={"tensor_parallel": 2},
        limits={
            "max_batch_size": 32,
            "max_context_tokens": 4000,
            "default_max_tokens": 400,
            "kv_cache_tokens": 40000,
            "max_queue_size": 32,
        },
        reasoning={"policy": "nemotron-super-v1.5", "default": "on"},
    )
    emitted = write_repository(plan_repository(plan, source, checkpoint), folder / "emitted")
    shutil.rmtree(source)
    shutil.rmtree(checkpoint)
    return emitted.rename(folder / "moved")  # nothing that it was made from is needed any more


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    endpoint = choose_endpoint(ports=FREE)
    with running(repository, endpoint, tmp_path_factory.mktemp("log") / "triton.log", ready_timeout_s=120):
        yield endpoint


def ask(server, **fields):
    """All responses of ``chat``, and their deltas joined."""
    responses = list(stream(server.grpc_url, fields, timeout_s=60))
    text = "".join(r.get("text_output", "") for r in responses)
    return text, "".join(r.get("reasoning_output", "") for r in responses), responses


def post(server, path: str, **fields):
    """Status and events (server-sent or one) of an HTTP request."""
    request = urllib.request.Request(f"{server.http_url}/v2/models/{path}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            body, status = response.read().decode(), response.status
    except urllib.error.HTTPError as error:
        body, status = error.read().decode(), error.code
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.strip()]
    return status, [json.loads(line) for line in lines]


def test_a_streamed_answer_with_reasoning(server):
    text, reasoning, responses = ask(server, messages=MESSAGES, temperature=0.0)
    assert (text, reasoning) == (ANSWER, REASONING)
    assert len(responses) > 5  # it streams; tokens that came together left together
    last = responses[-1]
    assert last["finish_reason"] == "stop"
    assert last["completion_tokens"] > last["reasoning_tokens"] > 10
    assert all("�" not in r["text_output"] + r["reasoning_output"] for r in responses)


@pytest.mark.parametrize("as_parameter", [False, True])
def test_reasoning_off_by_tensor_and_by_parameter(server, as_parameter):
    if as_parameter:
        status, events = post(server, "chat/generate_stream", messages=MESSAGES, parameters={"reasoning_mode": "off"})
        assert status == 200
        text = "".join(e["text_output"] for e in events)
        assert "".join(e["reasoning_output"] for e in events) == ""
    else:
        text, reasoning, _ = ask(server, messages=MESSAGES, reasoning_mode="off")
        assert reasoning == ""
    assert text == OFF_ANSWER


def test_the_ensemble_gives_the_same_as_the_joined_stream(server):
    for mode, (text, reasoning) in {"on": (ANSWER, REASONING), "off": (OFF_ANSWER, "")}.items():
        fields = {"messages": MESSAGES, "reasoning_mode": mode, "temperature": 0.0}
        grpc = whole(server.grpc_url, fields, timeout_s=60)
        status, (http,) = post(server, "ensemble/generate", **fields)
        assert status == 200
        streamed = ask(server, **fields)[2][-1]
        for answer in (grpc, http):
            assert (answer["text_output"], answer["reasoning_output"]) == (text, reasoning)
            for name in ("finish_reason", "prompt_tokens", "reasoning_tokens", "completion_tokens"):
                assert answer[name] == streamed[name]


def test_chat_over_http_whole_and_streamed(server):
    status, (answer,) = post(server, "chat/generate", messages=MESSAGES, reasoning_mode="off", stream=False)
    assert status == 200 and answer["text_output"] == OFF_ANSWER
    status, events = post(server, "chat/generate_stream", messages=MESSAGES)
    assert status == 200 and "".join(e["text_output"] for e in events) == ANSWER and len(events) > 5


def test_the_reasoning_mode_reaches_the_ensemble_as_a_parameter(server):
    for fields in ({"reasoning_mode": "off"}, {"parameters": {"reasoning_mode": "off"}}):
        status, (answer,) = post(server, "ensemble/generate", messages=MESSAGES, **fields)
        assert status == 200 and answer["text_output"] == OFF_ANSWER


def test_a_stop_string_ends_the_answer_and_is_not_in_it(server):
    fields = {"messages": MESSAGES, "reasoning_mode": "off", "stop_words": ["nope", " STOP here"]}
    text, _, responses = ask(server, **fields)
    assert text == OFF_ANSWER[: OFF_ANSWER.index(" STOP")]
    assert responses[-1]["finish_reason"] == "stop"
    answer = whole(server.grpc_url, fields, timeout_s=60)
    assert answer["text_output"] == text and answer["finish_reason"] == "stop"
    assert answer["completion_tokens"] == responses[-1]["completion_tokens"]


def test_a_tool_call_is_given_apart_only_when_tools_were_offered(server):
    tools = json.dumps([{"type": "function", "function": {"name": "get_weather"}}])
    asked = {"text_input": "T", "max_tokens": 400, "temperature": 0.0}
    assert "<TOOLCALL>" in ask(server, **asked)[0]
    with pytest.raises(UsageError, match="tools"):
        ask(server, **asked, tools=tools)


def test_length_log_probs_and_echo(server):
    text, _, responses = ask(server, text_input="L", max_tokens=7, temperature=0.0, return_log_probs=True)
    assert responses[-1]["finish_reason"] == "length" and responses[-1]["completion_tokens"] == 7
    log_probs = [p for r in responses for p in r.get("output_log_probs", [])]
    assert len(log_probs) == 7 and all(-0.01 < p <= 0 for p in log_probs)
    assert responses[-1]["cum_log_probs"] == pytest.approx(sum(log_probs), abs=1e-5)
    echoed = ask(server, text_input="L", max_tokens=7, temperature=0.0, exclude_input_in_output=False)[0]
    assert echoed == "L" + text
    answer = whole(
        server.grpc_url,
        {"text_input": "L", "max_tokens": 7, "temperature": 0.0, "return_log_probs": True},
        timeout_s=60,
    )
    assert answer["text_output"] == text and answer["output_log_probs"] == pytest.approx(log_probs, abs=1e-5)


def test_sampling_follows_the_seed(server):
    def sampled(seed: int) -> str:
        return ask(server, text_input="L", max_tokens=12, temperature=100.0, seed=seed)[0]

    assert sampled(1) == sampled(1) != sampled(2)


def test_32_streams_at_once_are_all_right(server):
    expected = {"on": (ANSWER, REASONING), "off": (OFF_ANSWER, "")}

    def one(k: int):
        mode = "on" if k % 2 else "off"
        return ask(server, messages=MESSAGES, reasoning_mode=mode)[:2] == expected[mode]

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        assert all(pool.map(one, range(32)))


BAD = [
    ({"messages": "{nonsense"}, "messages"),
    ({"messages": '[{"role": "robot", "content": "x"}]'}, "messages[0].role"),
    ({"messages": MESSAGES, "max_tokens": -5}, "max_tokens"),
    ({"text_input": "x" * 4001}, "text_input"),
    ({"text_input": "x", "max_tokens": 4000}, "max_tokens"),
    ({"text_input": "x", "messages": MESSAGES}, "messages"),
    ({"messages": MESSAGES, "reasoning_mode": "loud"}, "reasoning_mode"),
    ({"messages": MESSAGES, "temperature": -1.0}, "temperature"),
    ({"messages": '[{"role": "assistant", "tool_calls": "x"}]'}, "messages[0].tool_calls"),
    ({"text_input": "x", "beam_width": 4}, "beam_width"),
]


@pytest.mark.parametrize(("fields", "named"), BAD)
def test_a_bad_request_is_refused_by_name_and_the_server_goes_on(server, fields, named):
    for call in (lambda: ask(server, **fields), lambda: whole(server.grpc_url, fields, timeout_s=60)):
        with pytest.raises(UsageError) as refused:
            call()
        assert f"{named}: " in refused.value.why
    for path in ("ensemble/generate", "chat/generate_stream"):
        status, (answer,) = post(server, path, **fields)
        assert 400 <= status < 600 and f"{named}: " in answer["error"]
    assert ask(server, messages=MESSAGES, reasoning_mode="off")[0] == OFF_ANSWER


def test_a_client_that_asks_for_some_outputs_only(server):
    from tritonclient import grpc

    client = grpc.InferenceServerClient(server.grpc_url)
    text = grpc.InferInput("messages", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[MESSAGES.encode()]], dtype=np.object_))
    wanted = [grpc.InferRequestedOutput("text_output")]
    for _ in range(3):
        answer = client.infer("ensemble", [text], outputs=wanted)
        assert answer.as_numpy("text_output").item().decode() == ANSWER and answer.as_numpy("finish_reason") is None
        arrived = queue.Queue()
        client.start_stream(callback=lambda result, error, to=arrived: to.put((result, error)))
        client.async_stream_infer("chat", [text], outputs=wanted, enable_empty_final_response=True)
        pieces, final = [], False
        while not final:
            result, error = arrived.get(timeout=60)
            assert error is None
            final = result.get_response().parameters["triton_final_response"].bool_param
            names = [output.name for output in result.get_response().outputs]
            assert names in (["text_output"], [])
            pieces += [result.as_numpy("text_output").item().decode()] if names else []
        client.stop_stream()
        assert "".join(pieces) == ANSWER
    client.close()


def test_a_very_large_body_is_refused_and_the_server_goes_on(server):
    for path in ("ensemble/generate", "chat/generate_stream"):
        for size in (4 << 20, 9 << 20):
            status, (answer,) = post(server, path, text_input="A" * size)
            assert 400 <= status < 600 and "text_input" in answer["error"]
    assert ask(server, messages=MESSAGES, reasoning_mode="off")[0] == OFF_ANSWER


def test_an_unknown_field_is_refused(server):
    for path in ("ensemble/generate", "chat/generate"):
        status, (answer,) = post(server, path, text_input="L", colour="red")
        assert 400 <= status < 600 and "colour" in answer["error"]


def test_text_that_is_not_utf8_is_refused(server):
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(server.grpc_url)
    tensor = grpc.InferInput("text_input", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"\xff\xfe"]], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="text_input: not valid UTF-8"):
        client.infer("ensemble", [tensor])
    client.close()


def _completed(server) -> int:
    """Requests that the engine model has finished, by Triton's own count."""
    with urllib.request.urlopen(f"{server.http_url}/v2/models/tensorrt_llm/stats", timeout=10) as response:
        stats = json.loads(response.read())["model_stats"][0]["inference_stats"]
    return int(stats["success"]["count"]) + int(stats["fail"]["count"])


@pytest.mark.parametrize(("word", "text"), [("<|start_header_id|>", "Hi"), ("SH", "H")])
def test_a_stop_word_that_the_text_does_not_show_ends_the_answer(server, word, text):
    """A control token, or one that began in the prompt: the engine stops there, as TensorRT-LLM does."""
    fields = {"text_input": "S", "temperature": 0.0}
    assert ask(server, **fields)[0] == "Hi"
    *_, last = answer = list(stream(server.grpc_url, fields | {"stop_words": [word]}, timeout_s=60))
    assert "".join(r.get("text_output", "") for r in answer) == text and last["finish_reason"] == "stop"


def _slots_are_free(server, within_s: float = 20.0) -> bool:
    """32 requests, as many as there are slots, get their answers at once only if nothing else runs."""
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        done = list(pool.map(lambda _: ask(server, text_input="L", max_tokens=4, temperature=0.0)[0], range(32)))
    return all(done) and time.monotonic() - begin < within_s


@pytest.mark.parametrize("route", ["grpc", "http"])
def test_a_client_that_leaves_frees_its_slot(server, route):
    """Endless answers fill all slots and the KV pool; when their clients leave, others must be served."""
    fields = {"text_input": "L", "max_tokens": 3900, "temperature": 0.0}
    if route == "grpc":
        streams = [stream(server.grpc_url, fields, timeout_s=60) for _ in range(8)]
        for s in streams:
            next(s)
        for s in streams:
            s.close()
    else:
        body = json.dumps(fields).encode()
        sockets = [socket.create_connection((server.host, server.http_port)) for _ in range(8)]
        for s in sockets:
            head = f"POST /v2/models/chat/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            s.sendall(head.encode() + body)
        for s in sockets:
            assert s.recv(64)
        for s in sockets:
            s.close()
    assert _slots_are_free(server)


def test_an_older_client_that_sends_engine_era_fields(server):
    status, (answer,) = post(
        server,
        "ensemble/generate",
        text_input="L",
        max_tokens=5,
        bad_words="",
        stop_words="",
        pad_id=2,
        end_id=2,
        beam_width=1,
        length_penalty=1.0,
        top_k=1,
        top_p=0.5,
    )
    assert status == 200 and answer["text_output"] == ask(server, text_input="L", max_tokens=5, temperature=0.0)[0]


def test_the_server_stops_with_all_its_children(repository, tmp_path):
    endpoint = choose_endpoint(ports=FREE)
    with running(repository, endpoint, tmp_path / "log", ready_timeout_s=120) as process:
        group = process.pid
        assert len(_group(group)) >= 6  # Triton and its stubs
    assert _group(group) == []
    with pytest.raises(OSError), socket.create_connection((endpoint.host, endpoint.grpc_port), timeout=1):
        pass


def _group(number: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == number and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


CLOSED_ROUTES = (
    ("GET", "systemsharedmemory/status"),
    ("POST", "systemsharedmemory/region/x/register"),
    ("GET", "cudasharedmemory/status"),
    ("POST", "repository/index"),
    ("POST", "repository/models/chat/load"),
    ("POST", "repository/models/chat/unload"),
    ("GET", "trace/setting"),
    ("POST", "trace/setting"),
    ("GET", "logging"),
    ("POST", "logging"),
)


@pytest.mark.parametrize("headers", [{}, {"closed": "to-all: never"}, {"closed:to-all": "never"}])
def test_what_no_client_needs_is_closed_over_http(server, headers):
    for method, path in CLOSED_ROUTES:
        with socket.create_connection((server.host, server.http_port), timeout=10) as connection:
            lines = [f"{method} /v2/{path} HTTP/1.1", "Host: x", "Content-Length: 2"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            connection.sendall(("\r\n".join(lines) + "\r\n\r\n{}").encode())
            assert connection.recv(64).startswith(b"HTTP/1.1 403"), path


@pytest.mark.parametrize("name", ["closed", "closed:to-all"])
def test_what_no_client_needs_is_closed_over_grpc(server, name):
    """Not even a client that writes its own HTTP/2 frames gets in with a header whose name is none."""
    calls = ("LogSettings", "TraceSetting", "SystemSharedMemoryStatus", "RepositoryIndex", "RepositoryModelUnload")
    for call in calls:
        assert _grpc_status(server, call, f"triton-grpc-protocol-{name}", "never") not in (None, 0), call
    assert _grpc_status(server, "ServerLive", f"triton-grpc-protocol-{name.partition(':')[0]}", "never") == 0


def _grpc_status(server, call: str, name: str, value: str) -> int | None:
    """Status of an empty request to ``call`` with one header more, sent as bare frames (RFC 9113, RFC 7541)."""

    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/inference.GRPCInferenceService/{call}",
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
        name: value,
    }
    block = b"".join(b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in headers.items())
    with socket.create_connection((server.host, server.grpc_port), timeout=10) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
        connection.sendall(frame(1, 4, 1, block) + frame(0, 1, 1, bytes(5)))
        got = b""
        while not (found := re.search(rb"grpc-status([\x01\x02])(\d{1,2})", got)):
            piece = connection.recv(65536)
            if not piece:
                return None
            got += piece
        return int(found[2][: found[1][0]])


def test_the_repository_is_only_read(server, repository):
    ask(server, messages=MESSAGES)
    assert [file for file in repository.rglob("*") if "__pycache__" in file.parts] == []


def test_metrics_are_served(server):
    with urllib.request.urlopen(f"http://{server.host}:{server.metrics_port}/metrics", timeout=10) as response:
        assert b"nv_inference_request_success" in response.read()


def test_threads_do_not_pile_up(server):
    before = threading.active_count()
    for _ in range(5):
        ask(server, text_input="L", max_tokens=2)
    assert threading.active_count() <= before + 2


def chat(server, *arguments: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemobuild", "chat", "--url", server.grpc_url, *arguments]
    return subprocess.run(command, text=True, check=False, stderr=subprocess.PIPE, **more)


def test_the_chat_command_as_a_pipe_and_as_json(server):
    piped = chat(server, input="Hi\n", stdout=subprocess.PIPE)
    assert piped.stdout == ANSWER + "\n" and piped.returncode == 0
    answer = json.loads(chat(server, "Hi", "--json", stdout=subprocess.PIPE).stdout)
    assert (answer["text_output"], answer["reasoning_output"]) == (ANSWER, REASONING)
    off = chat(server, "Hi", "--reasoning", "off", "--stop", " STOP", stdout=subprocess.PIPE)
    assert off.stdout == OFF_ANSWER[: OFF_ANSWER.index(" STOP")] + "\n"
    refused = chat(server, "Hi", "--reasoning", "loud", "--json", stdout=subprocess.PIPE)
    assert refused.returncode == 2 and "reasoning_mode" in json.loads(refused.stderr)["error"]["why"]


def test_a_terminal_shows_reasoning_dimmed_and_apart(server):
    ours, theirs = os.openpty()
    assert chat(server, "Hi", stdout=theirs).returncode == 0
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:
            break
    text = shown.decode().replace("\r\n", "\n")
    reasoning = "".join(re.findall("\x1b\\[2m(.*?)\x1b\\[0m", text, flags=re.DOTALL))
    assert reasoning == REASONING
    assert re.sub("\x1b\\[2m.*?\x1b\\[0m", "", text, flags=re.DOTALL) == "\n\n" + ANSWER + "\n"
    os.close(ours)
