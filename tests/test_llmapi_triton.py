"""The ``llmapi`` runtime through a real Triton: the same client gets the same as from ``cpu``.

``tensorrt_llm`` is the strict stand-in of ``tests/standins``, which finds its tokens with the CPU engine.
"""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from nemobuild.convert.executor import convert
from nemobuild.errors import ChildFailed, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.triton.client import stream, whole
from nemobuild.triton.repository import plan_repository, write_repository
from nemobuild.triton.server import choose_endpoint, running
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.plans import planned
from tests.scripted import CLOSED, write_scripted

pytestmark = pytest.mark.xdist_group("triton")

SITE = Path(__file__).parent / "standins" / "site-packages"
TEMPLATE = templates.SUPER_V15.replace("tool_notes", "''")
REASONING, ANSWER = "\nशायद … ลองคิดดู 🤔\n", "\n\nสวัสดีครับ, नमस्ते! Grüße 👩‍👩‍👧‍👦 fertig."
OFF_ANSWER = "Sofort: ตอบทันที 🙂. STOP here, not this."
SCRIPTS = {"\n": f"<think>{REASONING}</think>{ANSWER}", CLOSED: OFF_ANSWER, "L": "round and round, "}
MESSAGES = json.dumps([{"role": "user", "content": "Hi"}])
SLOTS, QUEUE = 4, 32
LIMITS = {
    "max_batch_size": SLOTS,
    "max_context_tokens": 4000,
    "default_max_tokens": 400,
    "kv_cache_tokens": 16000,
    "max_queue_size": QUEUE,
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> dict[str, Path]:
    """One model, emitted for both runtimes."""
    folder = tmp_path_factory.mktemp("llmapi")
    source = write_scripted(folder / "hf", SCRIPTS, TEMPLATE, loops=("L",))
    served = {"cpu": convert(open_snapshot(source), folder / "checkpoint").output, "llmapi": source}
    found = {}
    for runtime, engine in served.items():
        plan = planned(
            runtime,
            config=load_json(source / "config.json"),
            limits=LIMITS,
            reasoning={"policy": "nemotron-super-v1.5", "default": "on"},
        )
        found[runtime] = write_repository(plan_repository(plan, source, engine), folder / f"emitted-{runtime}")
    shutil.rmtree(source)  # nothing that it was made from is needed any more
    (found["llmapi"] / "manifest.json").unlink()  # it asks for the vendor's container
    return found


@pytest.fixture(scope="module")
def servers(repositories, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SITE))
        # What a launcher's mpirun leaves; LLM must not take it for its own job.
        patch.setenv("OMPI_COMM_WORLD_SIZE", "1")
        patch.setenv("PMIX_RANK", "0")
        endpoints = {name: choose_endpoint(ports=(0, 0, 0)) for name in repositories}
        logs = tmp_path_factory.mktemp("log")
        cpu, llm = (
            running(folder, endpoints[name], logs / name, ready_timeout_s=120) for name, folder in repositories.items()
        )
        with cpu, llm:
            yield endpoints


def both(servers, asked):
    """The same question to both runtimes."""
    first, second = (asked(endpoint) for endpoint in servers.values())
    return first, second


def ask(endpoint, **fields):
    return list(stream(endpoint.grpc_url, fields, timeout_s=60))


def post(endpoint, path, **fields):
    request = urllib.request.Request(f"{endpoint.http_url}/v2/models/{path}", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            body, status = response.read().decode(), response.status
    except urllib.error.HTTPError as error:
        body, status = error.read().decode(), error.code
    return status, [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.strip()]


def joined(responses):
    """Deltas put together; which tokens leave together depends on the time. Values of one response as they are."""
    whole: dict = {}
    for response in responses:
        for name, value in response.items():
            if name in ("output_log_probs", "token_ids") and not isinstance(value, list):
                value = [value]  # one number in JSON
            whole[name] = whole.get(name, type(value)()) + value  # counts are on the last response only
    return whole


REQUESTS = [
    {"messages": MESSAGES, "temperature": 0.0},
    {"messages": MESSAGES},  # sampled, as the profile says for reasoning
    {"messages": MESSAGES, "reasoning_mode": "off"},
    {"messages": MESSAGES, "reasoning_mode": "off", "stop_words": ["nope", " STOP here"]},
    {"text_input": "L", "max_tokens": 7, "temperature": 0.0, "return_log_probs": True},
    {"text_input": "L", "max_tokens": 9, "temperature": 100.0, "seed": 5, "top_k": 50},
    {"text_input": "L", "max_tokens": 12, "temperature": 0.0, "repetition_penalty": 90.0, "presence_penalty": 3.0},
    {"text_input": "L", "max_tokens": 5, "temperature": 0.0, "exclude_input_in_output": False},
]


@pytest.mark.parametrize("fields", REQUESTS, ids=lambda fields: "-".join(fields))
def test_the_same_client_gets_the_same_streams(servers, fields):
    """The joined deltas over gRPC and HTTP, and whole from the ensemble over both."""
    streams = both(servers, lambda server: joined(ask(server, **fields)))
    assert streams[0] == streams[1]
    for path in ("chat/generate_stream", "ensemble/generate"):
        (status, cpu), (other, llm) = both(servers, lambda server, path=path: post(server, path, **fields))
        assert status == other == 200
        for event in (*cpu, *llm):
            del event["model_name"], event["model_version"]
        assert joined(cpu) == joined(llm)
    wholes = both(servers, lambda server: whole(server.grpc_url, fields, timeout_s=60))
    assert wholes[0] == wholes[1]


def test_the_streams_say_what_the_model_says(servers):
    """Against the known text, so that both cannot be wrong together."""
    responses = ask(servers["llmapi"], messages=MESSAGES, temperature=0.0)
    assert "".join(r["text_output"] for r in responses) == ANSWER
    assert "".join(r["reasoning_output"] for r in responses) == REASONING
    assert responses[-1]["finish_reason"] == "stop"
    stopped = ask(servers["llmapi"], messages=MESSAGES, reasoning_mode="off", stop_words=[" STOP here"])
    assert "".join(r["text_output"] for r in stopped) == OFF_ANSWER[: OFF_ANSWER.index(" STOP")]
    endless = ask(servers["llmapi"], text_input="L", max_tokens=7, temperature=0.0)
    assert endless[-1]["finish_reason"] == "length" and endless[-1]["completion_tokens"] == 7


def engine_request(server, request_id="", **arrays):
    """All responses of ``tensorrt_llm`` itself as {output: list}; the tensors as given, with their batch axis."""
    import queue

    from tritonclient import grpc
    from tritonclient.utils import np_to_triton_dtype

    inputs = []
    for name, array in arrays.items():
        array = np.asarray(array)[None] if np.asarray(array).ndim == 1 else np.asarray(array)
        tensor = grpc.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    arrived: queue.Queue = queue.Queue()
    client = grpc.InferenceServerClient(server.grpc_url)
    client.start_stream(callback=lambda result, error: arrived.put((result, error)))
    client.async_stream_infer("tensorrt_llm", inputs, request_id=request_id, enable_empty_final_response=True)
    responses, final = [], False
    try:
        while not final:
            result, error = arrived.get(timeout=60)
            if error is not None:
                raise UsageError("refused", str(error.message()))
            message = result.get_response()
            final = message.parameters["triton_final_response"].bool_param
            if message.outputs:
                responses.append({o.name: result.as_numpy(o.name).tolist() for o in message.outputs})
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()
    return responses


def scalar(value, kind):
    return np.array([value], kind)


def tensors(prompt, new, **more):
    return {
        "input_ids": np.array(prompt, np.int32),
        "input_lengths": scalar(len(prompt), np.int32),
        "request_output_len": scalar(new, np.int32),
        "temperature": scalar(0.0, np.float32),
        "exclude_input_in_output": scalar(True, np.bool_),
    } | more


def test_the_engine_model_gives_the_same_tensors_out(servers):
    """Stop ids of one and of several tokens, an end id, streaming and whole, on the bare contract."""
    loop = [t for r in engine_request(servers["cpu"], **tensors([100], 60)) for t in r["output_ids"][0][0]]
    words = {
        "one": [[loop[8]]],
        "several": [[7, 9], loop[4:7]],
        "begins in the prompt": [[100, loop[0]]],
    }
    for name, stops in words.items():
        ids, ends = [t for word in stops for t in word], np.cumsum([len(word) for word in stops]).tolist()
        packed = np.array([[ids, ends + [-1] * (len(ids) - len(ends))]], np.int32)
        for streaming in (False, True):
            more = {"streaming": scalar(streaming, np.bool_), "stop_words_list": packed}
            cpu, llm = both(servers, lambda s, more=more: engine_request(s, **tensors([100], 60, **more)))
            assert cpu == llm, name
            assert sum(len(r["output_ids"][0][0]) for r in llm) < 60
            assert len(llm) == 1 or streaming
    ended = tensors([100], 60, end_id=scalar(loop[5], np.int32), streaming=scalar(True, np.bool_))
    cpu, llm = both(servers, lambda s: engine_request(s, **ended))
    assert cpu == llm and len(llm) == loop.index(loop[5]) + 1


BAD = [
    ({"beam_width": scalar(4, np.int32)}, "beam_width"),
    ({"lora_task_id": scalar(4, np.uint64)}, "lora_task_id"),
    ({"input_ids": np.array([100, 1 << 20], np.int32), "input_lengths": scalar(2, np.int32)}, "input_ids"),
    ({"request_output_len": scalar(5000, np.int32)}, "max_new_tokens"),
    ({"temperature": scalar(-1, np.float32)}, "temperature"),
    ({"runtime_top_p": scalar(2, np.float32)}, "top_p"),
]


@pytest.mark.parametrize(("wrong", "named"), BAD, ids=[named for _, named in BAD])
def test_bad_input_is_refused_by_name_in_the_same_words(servers, wrong, named):
    said = []
    for server in servers.values():
        with pytest.raises(UsageError) as refused:
            engine_request(server, **tensors([100], 5) | wrong)
        said.append(refused.value.what)
    assert said[0] == said[1] and f"{named}: " in said[1]


def test_what_llm_cannot_do_is_refused_and_not_dropped(servers):
    packed = np.array([[[100, 101], [2, -1]]], np.int32)
    with pytest.raises(UsageError, match="bad_words: a word of several tokens"):
        engine_request(servers["llmapi"], **tensors([100], 5, bad_words_list=packed))
    single = np.array([[[101], [1]]], np.int32)
    cpu, llm = both(servers, lambda s: engine_request(s, **tensors([100], 5, bad_words_list=single)))
    assert cpu == llm


def test_bad_fields_are_refused_by_name(servers):
    for fields, named in (
        ({"messages": MESSAGES, "max_tokens": -5}, "max_tokens"),
        ({"text_input": "x", "max_tokens": 4000}, "max_tokens"),
        ({"text_input": "x", "beam_width": 4}, "beam_width"),
    ):
        with pytest.raises(UsageError) as refused:
            ask(servers["llmapi"], **fields)
        assert f"{named}: " in refused.value.why
        status, (answer,) = post(servers["llmapi"], "ensemble/generate", **fields)
        assert 400 <= status < 600 and f"{named}: " in answer["error"]


def test_many_at_once_are_all_right(servers):
    """More than there are slots: the rest waits its turn."""
    expected = {"on": ANSWER, "off": OFF_ANSWER}

    def one(k: int) -> bool:
        mode = "on" if k % 2 else "off"
        responses = ask(servers["llmapi"], messages=MESSAGES, reasoning_mode=mode)
        return "".join(r["text_output"] for r in responses) == expected[mode]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(16)))


def served_quickly(server, within_s: float = 15.0) -> bool:
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(SLOTS) as pool:
        done = list(pool.map(lambda _: ask(server, text_input="L", max_tokens=4, temperature=0.0), range(SLOTS)))
    return all(done) and time.monotonic() - begin < within_s


@pytest.mark.parametrize("route", ["grpc", "http"])
def test_a_client_that_leaves_frees_its_slot(servers, route):
    """Endless answers fill every slot; without cancellation they would run for minutes."""
    server, fields = servers["llmapi"], {"text_input": "L", "max_tokens": 3900, "temperature": 0.0}
    if route == "grpc":
        streams = [stream(server.grpc_url, fields, timeout_s=60) for _ in range(SLOTS)]
        for s in streams:
            next(s)
        for s in streams:
            s.close()
    else:
        body = json.dumps(fields).encode()
        head = f"POST /v2/models/chat/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        sockets = [socket.create_connection((server.host, server.http_port)) for _ in range(SLOTS)]
        for s in sockets:
            s.sendall(head.encode() + body)
        for s in sockets:
            assert s.recv(64)
            s.close()
    assert served_quickly(server)


def test_a_running_request_is_stopped_by_its_id(servers):
    server = servers["llmapi"]
    long = tensors([100], 3900, streaming=scalar(True, np.bool_))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(engine_request, server, "stop-me", **long)
        time.sleep(0.2)
        assert engine_request(server, "stop-me", **tensors([100], 1, stop=scalar(True, np.bool_))) == []
        assert 0 < sum(len(r["output_ids"][0][0]) for r in running_one.result(timeout=20)) < 3900


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("skip_tokenizer_init:", "max_batch_sise: 3\nskip_tokenizer_init:", "max_batch_sise"),
        ("decoupled: true", "decoupled: false", "decoupled differs"),
        ("tensor_parallel_size: 1", "tensor_parallel_size: 2", "Only 1 GPUs are available, but 2 are required"),
    ],
)
def test_what_llm_refuses_stops_the_start_with_its_reason(repositories, tmp_path, monkeypatch, before, after, words):
    broken = shutil.copytree(repositories["llmapi"], tmp_path / "broken")
    file = broken / "tensorrt_llm" / "1" / "model.yaml"
    file.write_text(file.read_text().replace(before, after))
    monkeypatch.syspath_prepend(str(SITE))
    with (
        pytest.raises(ChildFailed, match=words),
        running(broken, choose_endpoint(ports=(0, 0, 0)), tmp_path / "log", ready_timeout_s=60),
    ):
        pass
