"""The gateway before a real Triton, asked by the official client of OpenAI."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest

from nemobuild.conversation import Conversation
from nemobuild.errors import UsageError
from nemobuild.gateway.keys import make_key, read_keys
from nemobuild.gateway.process import GatewayProcess, listening, url_of
from nemobuild.gateway.upstream import Upstream
from nemobuild.triton.launch import Endpoint
from tests.gateway_road import ANSWER, CALLS, ENDLESS, HI, LOOP, MODEL, OFF_ANSWER, REASONING, Road, served, write_road

pytestmark = pytest.mark.xdist_group("triton")
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("get_weather", "now")]
OFF = {"reasoning_effort": "none"}
RAW_CALLS = f"<TOOLCALL>{CALLS}</TOOLCALL>"  # what a client reads that offered no tools


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    return file, make_key(file, "tester")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return write_road(tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="module")
def road(repository, tmp_path_factory, keys):
    with served(repository, tmp_path_factory.mktemp("logs"), keys[0]) as road:
        yield road


@pytest.fixture(scope="module")
def client(road, keys):
    with openai.OpenAI(base_url=f"{road.url}/v1", api_key=keys[1], max_retries=0, timeout=60) as client:
        yield client


def create(client, **more):
    return client.chat.completions.create(**{"model": MODEL, "messages": HI} | more)


def joined(stream):
    """Text, reasoning and calls of a stream, and its chunks."""
    chunks, text, reasoning, calls = list(stream), "", "", {}
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for piece in choice.delta.tool_calls or []:
                call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
                call["arguments"] += piece.function.arguments
    return text, reasoning, list(calls.values()), chunks


def raw(road, path, body=None, key=None, headers=(), method=None):
    """Status, headers and text of a request."""
    head = {"content-type": "application/json", **dict(headers)} | ({"authorization": f"Bearer {key}"} if key else {})
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(road.url + path, data, head, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def metric(road, keys, line):
    for row in raw(road, "/metrics", key=keys[1])[2].splitlines():
        if row.startswith(line + " "):
            return float(row.rpartition(" ")[2])
    return 0.0


def test_a_plain_answer(client):
    answer = create(client)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.reasoning_content) == (ANSWER + RAW_CALLS, REASONING)
    assert choice.finish_reason == "stop" and choice.message.role == "assistant" and choice.message.tool_calls is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 10 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens
    assert answer.model == MODEL and abs(answer.created - time.time()) < 60


def test_a_streamed_answer_equals_the_plain_one(client):
    text, reasoning, calls, chunks = joined(create(client, stream=True, stream_options={"include_usage": True}))
    assert (text, reasoning, calls) == (ANSWER + RAW_CALLS, REASONING, [])
    assert len(chunks) >= 4 and len({chunk.id for chunk in chunks}) == 1  # how many: as fast as they are sent
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == create(client).usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in create(client, stream=True))


def test_reasoning_off_in_both_ways(client):
    for how in ({"reasoning_effort": "none"}, {"extra_body": {"reasoning": {"enabled": False}}}):
        message = create(client, **how).choices[0].message
        assert message.content == OFF_ANSWER and not hasattr(message, "reasoning_content")
        assert joined(create(client, stream=True, **how))[:2] == (OFF_ANSWER, "")


def test_a_thinking_budget_ends_the_reasoning_early(client):
    budget = {"extra_body": {"reasoning": {"max_tokens": 12}}}
    answer = create(client, **budget)
    thought = answer.choices[0].message.reasoning_content
    assert REASONING.startswith(thought.rstrip()) and 0 < len(thought.rstrip()) < len(REASONING.rstrip())
    after = "\n\n" + OFF_ANSWER  # what this model says after a closing tag
    assert answer.choices[0].message.content == after
    assert answer.usage.completion_tokens_details.reasoning_tokens < 30
    assert joined(create(client, stream=True, **budget))[:2] == (after, thought)


def test_tool_calls_whole_and_streamed(client):
    expected = [(call["name"], call["arguments"]) for call in json.loads(CALLS)]
    choice = create(client, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == ANSWER
    assert [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls] == expected
    assert len({call.id for call in choice.message.tool_calls}) == 2
    text, reasoning, calls, chunks = joined(create(client, tools=TOOLS, stream=True))
    assert (text, reasoning) == (ANSWER, REASONING)
    assert [(call["name"], json.loads(call["arguments"])) for call in calls] == expected
    assert all(call["id"] for call in calls) and calls[0]["id"] != calls[1]["id"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert any(c.choices[0].delta.tool_calls for c in chunks[:-1])


def test_an_answer_and_tool_results_can_be_sent_back(client):
    message = create(client, tools=TOOLS).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "12"} for call in message.tool_calls]
    assert create(client, tools=TOOLS, messages=[*HI, message, *results]).choices[0].message.tool_calls


def test_tool_choice_none_hides_the_tools(client):
    shown, hidden, without = (
        create(client, tools=TOOLS),
        create(client, tools=TOOLS, tool_choice="none"),
        create(client),
    )
    assert hidden.choices[0].message.tool_calls is None and hidden.choices[0].finish_reason == "stop"
    assert hidden.usage.prompt_tokens == without.usage.prompt_tokens < shown.usage.prompt_tokens


def test_stops_length_and_seed(client):
    choice = create(client, **OFF, stop=["nope", " STOP"]).choices[0]
    assert choice.message.content == OFF_ANSWER[: OFF_ANSWER.index(" STOP")] and choice.finish_reason == "stop"
    short = create(client, **OFF, max_completion_tokens=3)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3
    wild = [
        create(client, **OFF, temperature=100.0, seed=s, max_tokens=12).choices[0].message.content for s in (1, 1, 2)
    ]
    assert wild[0] == wild[1] != wild[2]


def test_log_probabilities_name_every_token(client):
    for stream in (False, True):
        answer = create(client, **OFF, logprobs=True, stream=stream)
        parts = [chunk.choices[0].logprobs.content for chunk in (answer if stream else [answer])]
        content = [item for part in parts for item in part]
        data = b"".join(bytes(item.bytes) for item in content)
        assert data.decode() == OFF_ANSWER + "<|eot_id|>"
        assert all(-0.01 < item.logprob <= 0 for item in content)


@pytest.mark.parametrize("how", [{}, OFF])
def test_no_log_probability_is_lost_on_the_way(client, how):
    """Tokens that are a part of a character bring no text, and may come in a response of their own."""
    for _ in range(10):
        chunks = list(create(client, **how, logprobs=True, stream=True, stream_options={"include_usage": True}))
        count = sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices and c.choices[0].logprobs)
        assert count == chunks[-1].usage.completion_tokens


def test_tool_calls_in_a_conversation_of_the_command_line(road, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    talk = Conversation(road.triton.grpc_url, {"reasoning_mode": "on"}, tools=tmp_path / "tools.json")
    pieces = list(talk.ask("Hi"))
    assert [kind for kind, _ in pieces].count("tool_calls") == 1 and pieces[-1][0] == "tool_calls"
    said = [(call["name"], json.loads(call["arguments"])) for call in json.loads(pieces[-1][1])]
    assert said == [(call["name"], call["arguments"]) for call in json.loads(CALLS)]


def test_a_reader_that_takes_its_time_is_not_taken_for_a_silent_server(road):
    async def read():
        upstream, pieces = Upstream(road.triton.grpc_url), 0
        try:
            async for _ in upstream.ask({"text_input": LOOP, "max_tokens": 300, "stream": True}, silence_s=1.0):
                pieces += 1
                if pieces == 1:
                    await asyncio.sleep(2.5)
        finally:
            await upstream.close()
        return pieces

    assert asyncio.run(read()) > 1


def test_half_a_body_is_no_fault_of_the_gateway(road, keys):
    host, port = road.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {keys[1]}\r\n"
    with socket.create_connection((host, int(port))) as half:
        half.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode())
    end = time.monotonic() + 20
    while '"client_left"' not in road.gateway_log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    text = road.gateway_log.read_text()
    assert '"client_left"' in text and "Traceback" not in text


def test_a_list_of_a_million_wrong_things_is_refused_at_the_first(road, keys):
    body = json.dumps({"model": MODEL, "messages": HI, "stop": [1] * 1_000_000}).encode()
    status, _, text = raw(road, "/v1/chat/completions", body, keys[1])
    assert status == 400 and json.loads(text)["error"]["param"] == "stop[0]" and len(text) < 500


def test_a_raw_completion(client):
    whole = client.completions.create(model=MODEL, prompt=LOOP, max_tokens=8, echo=True, logprobs=0)
    text = whole.choices[0].text
    assert text.startswith(LOOP + "round") and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8 == len(whole.choices[0].logprobs.tokens)
    assert LOOP + "".join(whole.choices[0].logprobs.tokens) == text
    chunks = list(client.completions.create(model=MODEL, prompt=LOOP, max_tokens=8, stream=True))
    assert LOOP + "".join(chunk.choices[0].text for chunk in chunks) == text


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == MODEL and model.max_model_len == 50_000 and client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="model"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as caught:
        create(client, model="gpt-4o")
    assert caught.value.param == "model" and caught.value.code == "model_not_found"


def test_16_streams_at_once_are_all_right(client):
    def one(k):
        if k % 2:
            return joined(create(client, stream=True))[:2] == (ANSWER + RAW_CALLS, REASONING)
        return joined(create(client, stream=True, **OFF))[:2] == (OFF_ANSWER, "")

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(16)))


def test_a_refusal_names_the_field_before_any_event(client):
    for more, named in (
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"max_completion_tokens": 60_000}, "max_completion_tokens"),
        ({"extra_body": {"reasoning": {"max_tokens": -1}}}, "reasoning.max_tokens"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"max_tokens": 2**40}, "max_tokens"),
    ):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                create(client, stream=stream, **more)
            assert caught.value.param == named and f"{named}: " in caught.value.message


def test_a_key_is_needed_and_can_be_revoked(road, keys):
    file, key = keys
    chat = {"model": MODEL, "messages": HI, **OFF}
    for given in (None, "nb-wrong", key[:-1]):
        for path, body in (("/v1/chat/completions", chat), ("/v1/models", None), ("/metrics", None)):
            status, headers, text = raw(road, path, body, given)
            assert status == 401 and headers["www-authenticate"] == "Bearer"
            assert json.loads(text)["error"]["code"] == "invalid_api_key"
    assert raw(road, "/v1/models", headers={"authorization": key})[0] == 401  # no scheme
    assert raw(road, "/health")[0] == 200  # a probe has no key, and learns nothing
    with urllib.request.urlopen(urllib.request.Request(f"{road.url}/health", method="HEAD"), timeout=30) as answer:
        assert answer.status == 200 and answer.read() == b""
    second = make_key(file, "guest")
    assert raw(road, "/v1/chat/completions", chat, second)[0] == 200
    kept = [line for line in file.read_text().splitlines() if not line.startswith("guest ")]
    file.write_text("\n".join(kept) + "\n")
    assert raw(road, "/v1/chat/completions", chat, second)[0] == 401
    assert raw(road, "/v1/chat/completions", chat, key)[0] == 200


def test_keys_are_hashed_at_rest(tmp_path):
    file = tmp_path / "keys.txt"
    key = make_key(file, "a.b@c-d")
    assert key not in file.read_text() and file.stat().st_mode & 0o777 == 0o600
    assert list(read_keys(file).values()) == ["a.b@c-d"]
    with pytest.raises(UsageError, match=r"a\.b@c-d"):
        make_key(file, "a.b@c-d")
    with pytest.raises(UsageError, match="two words"):
        make_key(file, "two words")
    file.write_text("# note\n\nname plain-text-key\n")
    with pytest.raises(UsageError, match="Line 3"):
        read_keys(file)


def test_what_the_gateway_refuses_to_open(tmp_path):
    with pytest.raises(UsageError, match="without API keys"), listening("0.0.0.0", 0, None):
        pass
    (tmp_path / "none.txt").write_text("")
    with pytest.raises(UsageError, match="no key"), listening("127.0.0.1", 0, tmp_path / "none.txt"):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=str(port)), listening("127.0.0.1", port, None):
            pass


def test_sizes_forms_and_paths_are_limited(road, keys):
    path, key = "/v1/chat/completions", keys[1]
    large = b'{"model": "' + b"x" * (9 << 20) + b'"}'
    assert raw(road, path, large, key)[0] == 413
    unsized = socket.create_connection(tuple(road.url.removeprefix("http://").split(":")))
    with unsized:  # without a length, the limit counts what arrives
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        unsized.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent, piece = 0, b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        try:
            while sent < 64 << 20:
                unsized.sendall(piece)
                sent += 1 << 20
        except OSError:
            pass
        assert sent < 64 << 20
    assert raw(road, path, {"model": MODEL, "messages": HI}, key, {"content-type": "text/plain"})[0] == 415
    for bad in ("/v1/embeddings", "/docs", "/openapi.json", "/v1/chat/completions/"):
        status, _, text = raw(road, bad, key=key)
        assert status == 404 and json.loads(text)["error"]["message"]
    assert raw(road, path, key=key)[0] == 405


def test_a_gateway_without_triton_and_without_keys(repository, tmp_path):
    """It says that it is not ready, and serves only who names this machine."""
    assets = repository / "chat" / "1" / "assets"
    with listening("127.0.0.1", 0, None) as bound, socket.create_server(("127.0.0.1", 0)) as nobody:
        nobody_port = nobody.getsockname()[1]
        nobody.close()
        nowhere = Endpoint("127.0.0.1", *[nobody_port] * 3)
        gateway = GatewayProcess(bound, nowhere, assets, None, tmp_path / "log")
        alone = Road(None, url_of(bound), gateway, tmp_path / "log")
        try:
            assert raw(alone, "/health/live")[0] == 200
            assert raw(alone, "/health")[0] == 503
            for stream in (False, True):
                status, _, text = raw(alone, "/v1/chat/completions", {"model": MODEL, "messages": HI, "stream": stream})
                assert status == 503 and json.loads(text)["error"]["code"] == "no_server"
            assert raw(alone, "/v1/models", headers={"host": "localhost:1"})[0] == 200
            assert raw(alone, "/v1/models", headers={"host": "rebound.example.org"})[0] == 400
            status, headers, text = raw(alone, "/")
            assert status == 200 and "<title>" in text and "frame-ancestors" in headers["content-security-policy"]
        finally:
            gateway.stop()


def test_other_origins_get_nothing(road, keys):
    origin = {"origin": "https://example.org", "access-control-request-method": "POST"}
    status, headers, _ = raw(road, "/v1/chat/completions", headers=origin, method="OPTIONS")
    assert status in (401, 405) and headers["access-control-allow-origin"] is None
    _, headers, _ = raw(road, "/v1/models", key=keys[1], headers=origin)
    assert headers["access-control-allow-origin"] is None


def test_metrics_move(road, client, keys):
    def look():
        name = "nemobuild_gateway_"
        chat = 'route="/v1/chat/completions"'
        lines = (
            f'{name}requests_total{{{chat},status="200"}}',
            f'{name}requests_total{{{chat},status="400"}}',
            f'{name}errors_total{{code="invalid_value"}}',
            f'{name}tokens_total{{kind="completion"}}',
            f'{name}tokens_total{{kind="reasoning"}}',
            f"{name}time_to_first_token_seconds_count",
            f"{name}request_seconds_count{{{chat}}}",
        )
        return [metric(road, keys, line) for line in lines]

    before = look()
    usage = create(client).usage
    with pytest.raises(openai.BadRequestError):
        create(client, n=2)
    thought = usage.completion_tokens_details.reasoning_tokens
    wanted, end = [1, 1, 1, usage.completion_tokens, thought, 1, 2], time.monotonic() + 30
    while (moved := [b - a for a, b in zip(before, look(), strict=True)]) != wanted and time.monotonic() < end:
        time.sleep(0.1)  # the second's last line is written after its answer
    assert moved == wanted


def test_the_log_has_a_line_per_request_and_no_text(road, client):
    secret = "Geheimnis-4711"
    answer = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": secret}]
    )
    with pytest.raises(openai.BadRequestError):
        create(client, extra_body={secret: 1})
    found, end = [], time.monotonic() + 30
    while not found and time.monotonic() < end:
        time.sleep(0.1)  # the line is written after its answer
        text = road.gateway_log.read_text()
        found = [line for line in text.splitlines(keepends=True) if answer.headers["x-request-id"] in line]
        found = [json.loads(line) for line in found if line.endswith("\n")]
    assert secret not in text and "fertig" not in text
    (line,) = found
    assert line["status"] == 200 and line["key"] == "tester" and line["finish_reason"] == "stop"
    assert line["completion_tokens"] == answer.parse().usage.completion_tokens


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_frees_its_slot(client, streamed):
    """Endless answers fill every slot; when their clients leave, others must be served at once."""
    endless = {"model": MODEL, "prompt": LOOP, "max_tokens": ENDLESS, "temperature": 0}

    def leave(_):
        if streamed:
            with client.completions.create(**endless, stream=True) as stream:
                next(iter(stream))
                together.wait()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=2.0).completions.create(**endless)

    together = threading.Barrier(16, timeout=60)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(16)))
        short = endless | {"max_tokens": 4, "timeout": 90}  # the endless ones would take longer
        done = list(pool.map(lambda _: client.completions.create(**short).choices[0].text, range(16)))
    assert all(done)


def test_what_finds_no_place_is_told_to_come_again(road, keys):
    """16 run and 16 wait; the next is refused, with the status that makes clients try again."""
    host, port = road.url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": LOOP, "max_tokens": 20_000, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {keys[1]}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ask = {"model": MODEL, "prompt": LOOP, "max_tokens": 1}
    with contextlib.ExitStack() as held:
        for _ in range(32):
            held.enter_context(socket.create_connection((host, int(port)))).sendall(head.encode() + body)
        end = time.monotonic() + 30
        while (answer := raw(road, "/v1/completions", ask, keys[1]))[0] == 200 and time.monotonic() < end:
            pass
    status, headers, text = answer
    assert (status, headers["retry-after"]) == (429, "1")
    assert json.loads(text)["error"] | {"message": ""} == {
        "message": "",
        "type": "rate_limit_error",
        "param": None,
        "code": "server_busy",
    }
    end = time.monotonic() + 30
    while raw(road, "/v1/completions", ask, keys[1])[0] != 200 and time.monotonic() < end:
        time.sleep(0.1)
    assert raw(road, "/v1/completions", ask, keys[1])[0] == 200


def test_a_key_file_whose_last_line_is_open_gets_a_line_more(tmp_path):
    make_key(tmp_path / "keys", "one")
    (tmp_path / "keys").write_text((tmp_path / "keys").read_text().rstrip("\n"))
    make_key(tmp_path / "keys", "two")
    assert sorted(read_keys(tmp_path / "keys").values()) == ["one", "two"]
