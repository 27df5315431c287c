"""The service around the text layer, on a real Triton whose engine says given tokens at a given pace."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from benchmarks.replay.load import request, run
from benchmarks.replay.repository import Script, train_tokenizer, write_replay
from benchmarks.replay.texts import SENTENCES, token_streams
from nemobuild.errors import NemobuildError
from nemobuild.triton.client import stream, whole
from nemobuild.triton.launch import read_emitted
from nemobuild.triton.server import choose_endpoint, died, running

pytestmark = pytest.mark.xdist_group("triton")
FREE = (0, 0, 0)
SLOTS, QUEUE = 8, 4
ENDLESS = 40_000  # tokens: 200 s at the engine's pace
THOUGHT = "\n" + "Erst überlegen. ".join(SENTENCES) + "\n"
REPLY = "\n\nDie Antwort: สวัสดี 👩‍👩‍👧‍👦."
SCRIPTS = {
    "<reason>": Script(REPLY, reasoning=f"<think>{THOUGHT}</think>"),
    "<slow>": Script("too late", delay_s=20.0),
    "<endless>": Script("round and round, ", loop=True),
    "<fails>": Script("".join(SENTENCES), fail_at=5),
    "<plain>": Script("".join(SENTENCES)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, [*SCRIPTS, *(f"<cue{k}>" for k in range(SLOTS))])


@pytest.fixture(scope="module")
def texts(tokenizer):
    return token_streams(tokenizer, SLOTS, 150)


@pytest.fixture(scope="module")
def repository(tokenizer, texts, tmp_path_factory) -> Path:
    scripts = SCRIPTS | {f"<cue{k}>": Script(ids) for k, ids in enumerate(texts)}
    target = tmp_path_factory.mktemp("replay") / "repository"
    return write_replay(
        target, tokenizer, scripts, tokens_per_s=200, slots=SLOTS, queue=QUEUE, max_context_tokens=50_000
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "triton.log"


@pytest.fixture(scope="module")
def server(repository, log):
    endpoint = choose_endpoint(ports=FREE)
    with running(repository, endpoint, log, ready_timeout_s=120) as process:
        yield endpoint, process


@pytest.fixture
def grpc(server) -> str:
    return server[0].grpc_url


def ask(url: str, text: str, **fields):
    """Answer, reasoning, and the last response."""
    responses = list(stream(url, {"text_input": text} | fields, timeout_s=60))
    joined = ["".join(r.get(name, "") for r in responses) for name in ("text_output", "reasoning_output")]
    return *joined, responses[-1]


def metrics(server) -> dict[str, float]:
    endpoint = server[0]
    with urllib.request.urlopen(f"http://{endpoint.host}:{endpoint.metrics_port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    found = (re.fullmatch(r"nemobuild_chat_(\S+) (\S+)", line) for line in lines)
    return {match[1]: float(match[2]) for match in found if match}


def wait_for(condition, within_s: float = 20.0):
    """The first true value of ``condition``; the last one when none comes in time."""
    end = time.monotonic() + within_s
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return value


def test_streams_at_once_get_their_own_texts_whole(grpc, tokenizer, texts):
    fields = {"max_tokens": np.int32([[150]])}
    for _ in range(2):
        streams = run(grpc, [request("chat", {"text_input": f"<cue{k}>"} | fields) for k in range(SLOTS)])
        for answer, ids in zip(streams, texts, strict=True):
            outputs = answer.outputs()
            assert "".join(values["text_output"] for values in outputs) == tokenizer.decode(ids)
            assert outputs[-1]["completion_tokens"] == [150] and outputs[-1]["finish_reason"] == "length"
            assert len(outputs) > 2


def test_a_budget_ends_the_reasoning_and_the_answer_goes_on(grpc, server):
    whole = ask(grpc, "<reason>", temperature=0.0)
    assert whole[:2] == (REPLY, THOUGHT)
    before = metrics(server)["budget_cuts_total"]
    answer, reasoning, last = ask(grpc, "<reason>", max_thinking_tokens=30)
    assert (
        answer.lstrip() == REPLY.lstrip()
        and 0 < len(reasoning) < len(THOUGHT) / 2
        and THOUGHT.startswith(reasoning.rstrip("\n"))
    )
    assert 30 <= last["reasoning_tokens"] <= 60 and last["finish_reason"] == "stop"
    assert last["completion_tokens"] < whole[2]["completion_tokens"]
    assert wait_for(lambda: metrics(server)["budget_cuts_total"] == before + 1)


def test_a_budget_counts_within_max_tokens_and_keeps_log_probs_in_step(grpc):
    fields = {"text_input": "<reason>", "max_thinking_tokens": 10, "max_tokens": 40, "return_log_probs": True}
    responses = list(stream(grpc, fields, timeout_s=60))
    assert responses[-1]["completion_tokens"] == 40 and responses[-1]["finish_reason"] == "length"
    assert len([p for r in responses for p in r.get("output_log_probs", [])]) == 40


@pytest.mark.parametrize("how", ["tensor", "parameter", "triton"])
def test_an_answer_that_is_late_is_given_up_with_the_field_named(server, grpc, how):
    before = metrics(server)['refusals_total{reason="timeout"}']
    begin = time.monotonic()
    if how == "tensor":
        with pytest.raises(NemobuildError) as refused:
            ask(grpc, "<slow>", timeout_ms=300)
        message = refused.value.why
    else:
        parameters = {"timeout_ms": 300} if how == "parameter" else {"timeout": 300_000}
        body = json.dumps({"text_input": "<slow>", "parameters": parameters}).encode()
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(f"{server[0].http_url}/v2/models/chat/generate", body, timeout=30)
        assert failed.value.code == 400  # whatever the error, on this route
        message = json.loads(failed.value.read())["error"]
    assert "timeout_ms: the answer was not whole after 300 ms" in message
    assert time.monotonic() - begin < 15  # it would come after 20 seconds
    assert wait_for(lambda: metrics(server)['refusals_total{reason="timeout"}'] == before + 1)
    assert ask(grpc, "<plain>", timeout_ms=30_000)[0] == "".join(SENTENCES)


def test_what_finds_no_place_is_refused_as_busy_and_the_rest_goes_on(server, grpc):
    before = metrics(server)['refusals_total{reason="busy"}']
    endless = {"text_input": "<endless>", "max_tokens": 4000}  # 20 seconds: too long for what waits below
    held = [stream(grpc, endless, timeout_s=60) for _ in range(SLOTS)]
    for one in held:
        next(one)
    threads = [threading.Thread(target=ask, args=(grpc, "<plain>")) for _ in range(QUEUE)]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: metrics(server)['requests{state="waiting"}'] == QUEUE)
    assert metrics(server)['requests{state="running"}'] == SLOTS
    with pytest.raises(NemobuildError) as refused:
        ask(grpc, "<plain>")
    assert "busy" in refused.value.why
    with pytest.raises(urllib.error.HTTPError) as failed:
        urllib.request.urlopen(f"{server[0].http_url}/v2/models/chat/generate", b'{"text_input": "x"}', timeout=30)
    assert b"busy" in failed.value.read()
    begin = time.monotonic()
    for one in held:
        one.close()
    for thread in threads:
        thread.join(30)
    assert time.monotonic() - begin < 12  # and not when the endless ones are whole
    assert not any(thread.is_alive() for thread in threads)
    assert wait_for(lambda: metrics(server)['refusals_total{reason="busy"}'] == before + 2)
    assert wait_for(lambda: metrics(server)['requests{state="running"}'] == 0, 5)


def test_the_engines_own_queue_is_named_when_it_is_full(grpc, tokenizer):
    """Clients of the engine itself may have taken what ``chat`` counts on."""
    direct = {
        "input_ids": np.int32([[tokenizer.token_to_id("<endless>")]]),
        "input_lengths": np.int32([[1]]),
        "request_output_len": np.int32([[600]]),  # 3 seconds
    }
    taken = [request("tensorrt_llm", direct, ["output_ids"])] * (SLOTS + QUEUE)
    refused = ""
    for _ in range(4):  # where ours comes before the last of them, one of them is refused instead
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running_ones = pool.submit(run, grpc, taken)
            time.sleep(1)
            refused = _refusal(grpc)
            assert all(len(one.arrived) == 1 for one in running_ones.result(60))
        if refused:
            break
    assert "busy" in refused and "wait already" in refused


@pytest.mark.parametrize("how", ["tensor", "parameter"])
def test_the_ensemble_too_gives_up_an_answer_that_is_late(server, grpc, how):
    """Triton's HTTP server does not see that the client of a whole answer left; a deadline frees the slot there too."""
    if how == "tensor":
        with pytest.raises(NemobuildError) as late:
            list(stream(grpc, {"text_input": "<endless>", "max_tokens": ENDLESS, "timeout_ms": 1500}, model="ensemble"))
        message = late.value.why
    else:
        body = json.dumps({"text_input": "<endless>", "max_tokens": ENDLESS, "timeout_ms": 1500}).encode()
        with pytest.raises(urllib.error.HTTPError) as failed:
            urllib.request.urlopen(f"{server[0].http_url}/v2/models/ensemble/generate", body, timeout=60)
        message = failed.value.read().decode()
    assert "timeout_ms: the answer was not whole after 1500 ms" in message
    assert whole(grpc, {"text_input": "<plain>", "timeout_ms": 60_000})["text_output"] == "".join(SENTENCES)


def _refusal(grpc: str) -> str:
    try:
        ask(grpc, "<plain>", max_tokens=1)
    except NemobuildError as error:
        return error.why
    return ""


def test_an_engine_that_fails_is_told_apart_from_a_bad_request(server, grpc):
    before = metrics(server)['refusals_total{reason="internal"}']
    with pytest.raises(NemobuildError, match="failed") as failed:
        ask(grpc, "<fails>")
    assert failed.value.code == "server-failed" and "told to" in failed.value.why
    assert wait_for(lambda: metrics(server)['refusals_total{reason="internal"}'] == before + 1)
    assert ask(grpc, "<plain>")[0] == "".join(SENTENCES)


def test_clients_that_leave_the_ensemble_free_its_slots(server, grpc):
    """Endless answers fill all slots; when their clients leave, others are served long before those would end."""
    client = tritonclient.grpc.InferenceServerClient(grpc)
    values = {"text_input": ("BYTES", np.array([[b"<endless>"]], object)), "max_tokens": ("INT32", [[ENDLESS]])}
    inputs = [tritonclient.grpc.InferInput(name, [1, 1], kind) for name, (kind, _) in values.items()]
    for tensor, (kind, value) in zip(inputs, values.values(), strict=True):
        tensor.set_data_from_numpy(np.array(value, object if kind == "BYTES" else np.int32))
    calls = [client.async_infer("ensemble", inputs, lambda result, error: None) for _ in range(SLOTS + QUEUE)]

    def served():
        try:
            return ask(grpc, "<plain>", timeout_ms=3000)[0] == "".join(SENTENCES)
        except NemobuildError as error:
            assert "busy" in error.why or "timeout_ms" in error.why
            return False

    assert wait_for(lambda: not served())
    for call in calls:
        call.cancel()
    assert wait_for(served, 60)


def test_metrics_count_tokens_times_answers_refusals_and_cancellations(server, grpc):
    time.sleep(1.5)  # what earlier requests moved has arrived
    before = metrics(server)
    _, _, last = ask(grpc, "<reason>")
    with pytest.raises(NemobuildError):
        ask(grpc, "<plain>", reasoning_mode="loud")
    left = stream(grpc, {"text_input": "<endless>", "max_tokens": 2000}, timeout_s=60)
    next(left)
    left.close()
    wanted = {
        'tokens_total{part="reasoning"}': last["reasoning_tokens"],
        'answers_total{finish_reason="stop"}': 1,
        'refusals_total{reason="request"}': 1,
        "cancellations_total": 1,
        "first_token_seconds_count": 2,
        'first_token_seconds_bucket{le="+Inf"}': 2,
    }

    def moved():
        now = metrics(server)
        return {name: now[name] - before[name] for name in now}

    wait_for(lambda: all(moved()[name] == value for name, value in wanted.items()))
    assert {name: moved()[name] for name in wanted} == wanted
    now = moved()
    assert now['tokens_total{part="prompt"}'] == last["prompt_tokens"] + 1
    assert now['tokens_total{part="answer"}'] >= last["completion_tokens"] - last["reasoning_tokens"]
    assert now["inter_token_seconds_count"] >= last["completion_tokens"] - 2
    assert 0.001 < now["inter_token_seconds_sum"] / now["inter_token_seconds_count"] < 0.1  # the engine's pace is 0.005
    assert now["first_token_seconds_sum"] > 0 and metrics(server)["healthy"] == 1


def test_the_log_has_a_line_for_each_answer_and_none_of_its_words(grpc, log):
    ask(grpc, "Geheimnis <reason>")
    text = log.read_text(errors="replace")
    lines = re.findall(r'\{"event": "chat\.answer".*?\}', text.replace("\\", ""))
    assert lines and json.loads(lines[-1])["finish_reason"] == "stop" and json.loads(lines[-1])["total_ms"] > 0
    assert "Geheimnis" not in text and "Antwort" not in text


def _watchdog():
    file = Path(__file__).resolve().parent.parent / "triton_repo" / "watchdog.py"
    spec = importlib.util.spec_from_file_location("watchdog", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Watchdog


def test_the_watchdog_reports_an_engine_that_hangs_and_one_that_comes_back():
    told, hang, goes_on = [], threading.Event(), threading.Event()

    def generate():
        if hang.is_set():
            goes_on.wait(10)

    dog = _watchdog()(generate, lambda: 0, told.append, period_s=0.05, timeout_s=0.2)
    try:
        time.sleep(0.3)
        assert told == [True] and dog.healthy
        hang.set()
        assert wait_for(lambda: told == [True, False], 5) and not dog.healthy
        hang.clear()
        goes_on.set()
        assert wait_for(lambda: told == [True, False, True], 5) and dog.healthy
    finally:
        dog.close()


def test_the_watchdog_does_not_take_a_full_engine_for_one_that_hangs():
    told, asked, stands, goes_on = [], [], threading.Event(), threading.Event()

    def progress():
        asked.append(stands.is_set())
        return 0 if stands.is_set() else len(asked)

    dog = _watchdog()(lambda: goes_on.wait(60), progress, told.append, period_s=0.01, timeout_s=0.05)
    try:
        assert wait_for(lambda: len(asked) > 5) and told == [True]  # while its token waits for a place
        stands.set()
        assert wait_for(lambda: told == [True, False])
        stands.clear()
        assert wait_for(lambda: told == [True, False, True])
    finally:
        goes_on.set()
        dog.close()


def test_the_watchdog_reports_an_engine_that_refuses_once_it_has_worked():
    told, works, asked = [], threading.Event(), []

    def generate():
        asked.append(works.is_set())
        if not works.is_set():
            raise RuntimeError("not loaded, or gone")

    dog = _watchdog()(generate, lambda: 0, told.append, period_s=0.05, timeout_s=0.2)
    try:
        assert wait_for(lambda: len(asked) > 3, 5) and told == [True]  # it is being loaded
        works.set()
        assert wait_for(lambda: any(asked), 5) and told == [True]
        works.clear()
        assert wait_for(lambda: told == [True, False], 5)
    finally:
        dog.close()


def _processes(group: int) -> dict[str, int]:
    """Pid of each stub by its model, and of Triton itself."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_text(errors="replace").split("\0")
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            model = next((Path(word).parts[-3] for word in words if word.endswith("/model.py")), "triton")
            found[model] = int(stat.parent.name)
    return found


@pytest.mark.parametrize("victim", ["chat", "tensorrt_llm", "triton"])
def test_clients_hear_of_a_process_that_is_killed_and_nothing_stays_behind(repository, tmp_path, victim):
    endpoint = choose_endpoint(ports=FREE)
    with running(repository, endpoint, tmp_path / "log", ready_timeout_s=120) as process:
        group = process.pid
        begun = threading.Barrier(5)

        def follow() -> str:
            pieces = stream(endpoint.grpc_url, {"text_input": "<endless>", "max_tokens": 2000}, timeout_s=30)
            next(pieces)
            begun.wait(30)
            try:
                for _ in pieces:
                    pass
            except NemobuildError as error:
                return error.code
            return "ended"

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(follow) for _ in range(4)]
            begun.wait(30)
            os.kill(_processes(group)[victim], signal.SIGKILL)
            heard = [answer.result(60) for answer in answers]
        assert all(code not in ("ended", "no-answer") for code in heard)
        status = process.wait(10)
        if status == -signal.SIGABRT and victim != "triton":
            return  # Triton 2.51 noticed by itself, and now and then aborts on it
        assert status == -signal.SIGKILL
        why = died(status, read_emitted(repository), tmp_path / "log").why
        assert ("out of memory" in why) if victim == "triton" else (why == f"The process of model {victim!r} ended.")
    assert wait_for(lambda: _processes(group) == {}, 10)
    assert not list(Path("/dev/shm").glob(f"nemobuild_{os.getpid()}_{endpoint.grpc_port}_*"))


def test_any_engine_can_be_called_over_grpc(tokenizer, texts, repository, tmp_path):
    """As ``chat`` calls the backend in C++; here the same engine as above, called by the other way."""
    shutil.copytree(repository, tmp_path / "repository")
    for model in ("chat", "tensorrt_llm_collect"):
        config = tmp_path / "repository" / model / "config.pbtxt"
        assert '"lane"' in config.read_text()
        config.write_text(config.read_text().replace('"lane"', '"grpc"'))
    endpoint = choose_endpoint(ports=FREE)
    with running(tmp_path / "repository", endpoint, tmp_path / "log", ready_timeout_s=120) as process:
        grpc = endpoint.grpc_url
        test_streams_at_once_get_their_own_texts_whole(grpc, tokenizer, texts)
        test_a_budget_counts_within_max_tokens_and_keeps_log_probs_in_step(grpc)
        test_a_budget_ends_the_reasoning_and_the_answer_goes_on(grpc, (endpoint, process))
        test_an_answer_that_is_late_is_given_up_with_the_field_named((endpoint, process), grpc, "tensor")
        test_what_finds_no_place_is_refused_as_busy_and_the_rest_goes_on((endpoint, process), grpc)
        test_the_engines_own_queue_is_named_when_it_is_full(grpc, tokenizer)
        body = json.dumps({"text_input": "<plain>", "max_tokens": 500}).encode()
        with urllib.request.urlopen(f"{endpoint.http_url}/v2/models/ensemble/generate", body, timeout=60) as answer:
            assert json.loads(answer.read())["text_output"] == "".join(SENTENCES)
        with pytest.raises(NemobuildError) as failed:
            ask(grpc, "<fails>")
        assert failed.value.code == "server-failed"
