"""What a roll decides, and what it refuses, before anything is started; the child that ends with its starter."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nemobuild.doctor.machine import HostMemory
from nemobuild.engine.process import with_us
from nemobuild.errors import ChildFailed, IntegrityError, UsageError, VerificationFailed
from nemobuild.gates.prompts import Answer
from nemobuild.gateway.process import GatewayProcess, listening, target_of, url_of
from nemobuild.local import open_local
from nemobuild.roll import roll, rollback
from nemobuild.serving import present_endpoint, room
from nemobuild.serving.canary import judge_canary
from nemobuild.serving.control import Control, controlled, give_order, running_services, state_folder
from nemobuild.serving.run import folder_of
from nemobuild.store import Store
from nemobuild.triton.launch import Emitted, Endpoint
from tests.gpu_machine import h100, nvml

ENDPOINT = {"host": "127.0.0.1", "http_port": 1, "grpc_port": 2, "metrics_port": 3}
PROFILE = "tiny.yaml"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a profile, and a store with two versions of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMOBUILD_STORE", str(tmp_path / "store"))
    limits = {"max_batch_size": 4, "max_context_tokens": 256, "default_max_tokens": 32}
    profile = {"description": "Tiny.", "runtime": "cpu", "model": {"source": "tiny"}, "limits": limits}
    Path(PROFILE).write_text(yaml.safe_dump(profile | {"reasoning": {"policy": "nemotron-super-v1.5"}}))
    return tmp_path


def publish(content: str) -> int:
    folder = Path("made")
    folder.mkdir(exist_ok=True)
    (folder / "config").write_text(content)
    key = f"{sum(content.encode()):064x}"
    Store().commit("repository", key, folder, {})
    return Store().publish("tiny", {"repository": key}, revision=None, gates="passed", note="").number


def code_of(call, *arguments, **how) -> str:
    with pytest.raises(UsageError) as failed:
        call(*arguments, **how)
    assert failed.value.next or failed.value.why
    return failed.value.code


def test_what_is_refused(home):
    assert code_of(roll, "no-such-profile") == "unknown-profile"
    assert code_of(roll, PROFILE) == "not-serving"
    assert code_of(rollback, PROFILE) == "nothing-published"
    publish("one")
    assert code_of(rollback, PROFILE) == "nothing-before"
    assert code_of(rollback, PROFILE, 7) == "no-publication"
    state = {"folder": folder_of(PROFILE)}
    with controlled(state):
        (state_folder() / f"{os.getppid()}.json").write_text((state_folder() / f"{os.getpid()}.json").read_text())
        assert code_of(roll, PROFILE) == "several-services"


def test_a_rollback_without_a_service(home):
    for number, content in enumerate(("one", "two", "three"), 1):
        assert publish(content) == number
    done = rollback(PROFILE)
    assert (done.before, done.now, done.rolled) == (3, 2, None)
    assert Path("build/tiny/repository/config").read_text() == "two"
    assert rollback(PROFILE).now == 1 and Path("build/tiny/repository/config").read_text() == "one"
    assert rollback(PROFILE, 3).now == 3 and Store().current("tiny").number == 3


def test_a_rollback_whose_roll_fails_changes_nothing(home):
    for content in ("one", "two"):
        publish(content)
    with controlled({"folder": folder_of(PROFILE)}) as control:
        service = threading.Thread(target=lambda: refuse(control))
        service.start()
        with pytest.raises(VerificationFailed, match="It is broken") as failed:
            rollback(PROFILE)
        service.join()
    assert (failed.value.code, failed.value.why, failed.value.next) == ("rolled-back", "Why.", "Next.")
    assert Store().current("tiny").number == 2 and not Path("build/tiny/repository").exists()


def refuse(control: Control) -> None:
    order = control.wait(60)
    assert order.fields["number"] == 1
    with order.connection:
        order.tell("something happens")
        order.failed(VerificationFailed("rolled-back", "It is broken.", why="Why.", next="Next."))


def test_other_commands_find_the_newest_service_that_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / ("long" * 40)))  # longer than a socket's name may be
    assert present_endpoint() == "127.0.0.1:8001"
    with controlled(ENDPOINT) as control:
        (state_folder() / "4194305.json").write_text('{"host": "127.0.0.1", "grpc_port": 9}')  # no process has it
        assert present_endpoint() == "127.0.0.1:2"
        control.remember(ENDPOINT | {"grpc_port": 5, "number": 4})
        assert present_endpoint() == "127.0.0.1:5" and running_services(number=4) and not running_services(number=3)
        events: list[str] = []
        answers = []
        asking = threading.Thread(target=lambda: answers.append(give_order(os.getpid(), {"a": 1}, events.append)))
        asking.start()
        order = control.wait(60)
        order.tell("half")
        order.done({"whole": True})
        order.connection.close()
        asking.join()
        assert (order.fields, events, answers) == ({"a": 1}, ["half"], [{"whole": True}])
    assert present_endpoint() == "127.0.0.1:8001" and not list(state_folder().glob(f"{os.getpid()}*"))
    with pytest.raises(ChildFailed, match="does not answer"):
        give_order(os.getpid(), {}, events.append)


def test_who_talks_nonsense_to_a_service_does_not_disturb_it(tmp_path):
    with controlled(ENDPOINT) as control:
        for said in (b"", b"{", b"[]\n", b"\xff\n", b"x" * 100_000):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(state_folder() / f"{os.getpid()}.sock"))
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                assert control.wait(60) is None


def test_without_a_folder_for_its_state_a_service_serves_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with controlled(ENDPOINT) as control:
        assert control is None and running_services() == {}


ANSWER = Answer("capital-en", "en", "off", "Paris", "", (), "stop", 1, 0.1)
WRONG = replace(ANSWER, wrong="it holds none of Paris")


@pytest.mark.parametrize(
    ("answers", "before", "broken"),
    [
        ([ANSWER], [ANSWER], ""),
        ([WRONG], [WRONG], ""),  # a model of which that cannot be asked
        ([WRONG], [], ""),
        ([WRONG, replace(ANSWER, prompt="b")], [ANSWER, replace(ANSWER, prompt="b")], ""),  # what the gates allow
        ([WRONG], [ANSWER], "nothing right"),
        ([replace(ANSWER, unsound="it is empty")], [], "it is empty"),
    ],
)
def test_what_the_canary_takes_for_broken(answers, before, broken):
    if not broken:
        judge_canary(answers, before)
        return
    with pytest.raises(VerificationFailed, match=broken) as failed:
        judge_canary(answers, before)
    assert "capital-en" in str(failed.value)


def test_room_on_the_host(tmp_path, monkeypatch):
    """What the running one takes decides, and what the new one is larger."""
    for name, size_bytes in (("old", 1000), ("new", 5000)):
        (tmp_path / name / "chat").mkdir(parents=True)
        (tmp_path / name / "chat" / "config.pbtxt").write_text("")
        (tmp_path / name / "weights").write_bytes(b"0" * size_bytes)
    monkeypatch.setattr(room, "session_bytes", lambda pid: 10_000)
    for available_bytes, slots in ((15_000, "two"), (14_999, "one")):
        monkeypatch.setattr(room, "host_memory", lambda have=available_bytes: HostMemory(1 << 40, have, False))
        found = room.find_room("smollm2-cpu", tmp_path / "new", tmp_path / "old", 1)
        assert found.slots == slots and "host memory" in found.why


@pytest.mark.parametrize(
    ("used_gib", "slots", "cards"),
    [((70, 70), "one", ()), ((70, 0), "two", (1,)), ((0, 0), "two", (0,)), ((79, 20), "one", ())],
)
def test_room_on_gpus(monkeypatch, tmp_path, used_gib, slots, cards):
    """The 49B takes nearly a whole H100, whichever is free."""
    nvml(monkeypatch, *(h100(used=gib << 30) for gib in used_gib))
    made = Emitted("tensorrt", 1, None, (9, 0))
    monkeypatch.setattr(room, "read_emitted", lambda folder: made)
    monkeypatch.setattr(room, "host_memory", lambda: HostMemory(1 << 42, 1 << 42, False))
    found = room.find_room("super-49b-v1.5-h100-fp8", tmp_path, tmp_path, 1)
    assert (found.slots, found.cards) == (slots, cards) and "free" in found.why


def test_a_gateway_keeps_what_it_serves_when_the_next_version_cannot_be_read(tmp_path):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "tokenizer.json").write_text("{}")
    limits = {"max_context_tokens": 100, "max_prompt_tokens": 90, "default_max_tokens": 10}
    settings = {"model_name": "tiny", "vocab_size": 10, "bos_token": None, "end_token_ids": [1], "limits": limits}
    (assets / "runtime.json").write_text(json.dumps(settings))
    nowhere = Endpoint("127.0.0.1", 9, 9, 9)
    with listening("127.0.0.1", 0, None) as bound:
        gateway = GatewayProcess(bound, nowhere, assets, None, tmp_path / "log")
        try:
            with pytest.raises(IntegrityError, match="cannot serve"):
                gateway.steer(target_of(1, nowhere, tmp_path / "none"))
            os.kill(gateway.pid, signal.SIGKILL)
            assert gateway.steer(target_of(0, nowhere, assets), held=True) == 0  # dead: nothing of it is left
            while not gateway.check():
                time.sleep(0.05)
            assert gateway.steer(target_of(0, nowhere, assets)) == 0
            with open_local(f"{url_of(bound)}/v1/models", timeout_s=60) as answer:
                assert b"tiny" in answer.read()
        finally:
            gateway.stop()


STARTER = """
import subprocess, sys, threading, time
from nemobuild.engine.process import with_us
line = with_us([sys.executable, "-c", "import time; time.sleep(600)"])
print(subprocess.Popen(line, start_new_session=True).pid, flush=True)
time.sleep(600)
"""


def test_a_child_ends_with_its_starter():
    starter = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{starter.stdout.readline().strip()}/cmdline")
    while b"sleep(600)" not in child.read_bytes() or b"child.py" in child.read_bytes():
        time.sleep(0.02)  # it is not the program yet
    starter.kill()
    starter.communicate()
    while child.exists() and child.read_bytes():  # a zombie has no line
        time.sleep(0.02)


def test_a_child_that_cannot_start_says_so():
    done = subprocess.run(with_us(["/no/such/program"]), capture_output=True, text=True)
    assert done.returncode == 1 and "error: cannot start /no/such/program: No such file" in done.stderr
    report = [sys.executable, "-c", "import resource; print(resource.getrlimit(resource.RLIMIT_STACK)[0])"]
    assert subprocess.run(with_us(report, 64 << 20), capture_output=True, text=True).stdout.strip() == str(64 << 20)
