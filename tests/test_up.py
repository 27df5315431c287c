"""``nemobuild up``: one line from a profile to an endpoint, and the same line when all is there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from nemobuild.store import Store
from tests import templates
from tests.tiny import write_model
from tests.toolchains import write_profile

UP = [sys.executable, "-m", "nemobuild", "up", "tiny.yaml"]
CPU = {"runtime": "cpu", "machine": None, "build": {}}


@pytest.fixture
def here(tmp_path, monkeypatch):
    template = templates.SUPER_V15.replace("tool_notes", "''")
    source = write_model(tmp_path / "tiny", template=template)
    monkeypatch.chdir(tmp_path)
    write_profile(tmp_path / "tiny.yaml", source, **CPU, limits__max_batch_size=2)
    return tmp_path


def up(*options):
    """The process, and its standard output line by line as JSON; it ends when the caller has seen enough."""
    process = subprocess.Popen([*UP, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield from (json.loads(line) for line in process.stdout)
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[1]
        assert "Traceback" not in said, said


def test_one_line_brings_it_up_and_the_same_line_does_it_again(here):
    dry = subprocess.run([*UP, "--dry-run"], capture_output=True, text=True, check=True)
    assert dry.stdout.count("make") == 2 and not (here / "build").exists()
    seen = []
    first = up("--events")
    for event in first:
        seen.append(event)
        if event["event"] == "ready":
            break
    ask = [sys.executable, "-m", "nemobuild", "chat", "Hello", "--max-tokens", "3", "--url", seen[-1]["grpc"], "--json"]
    answered = subprocess.run(ask, capture_output=True, text=True, check=False)
    first.close()
    assert answered.returncode == 0 and json.loads(answered.stdout)["completion_tokens"] == 3, answered.stderr
    steps = [(e["stage"], e["action"], e["report"] is None) for e in seen if e["event"] == "step"]
    assert steps == [(s, "make", begins) for s in ("checkpoint", "repository") for begins in (True, False)]
    progress = [e for e in seen if e["event"] == "progress"]
    assert progress and progress[-1]["done_bytes"] == progress[-1]["total_bytes"] > 0
    published = next(e for e in seen if e["event"] == "published")
    assert published["version"] == 1 and Store().current("tiny").keys == published["keys"]
    assert seen[-1]["version"] == 1 and Store().current("tiny").gates == "not run"

    before = {
        p: p.stat().st_mtime_ns for p in (here / "build").rglob("*") if p.is_file() and not p.name.endswith("log")
    }
    second = up("--events")
    again = next(second)
    second.close()
    assert again == published, "no step was worth a word"
    assert {p: p.stat().st_mtime_ns for p in before} == before

    (here / "tiny.yaml").write_text((here / "tiny.yaml").read_text().replace("default: 'on'", "default: 'off'"))
    third = up("--events")
    changed = next_published(third)
    third.close()
    assert changed["version"] == 2 and changed["keys"]["checkpoint"] == published["keys"]["checkpoint"]


def next_published(events):
    return next(event for event in events if event["event"] == "published")


def test_what_is_in_the_store_is_not_served_damaged(here):
    first = up("--events")
    published = next_published(first)
    first.close()
    file = Store().path("repository", published["keys"]["repository"]) / "chat" / "1" / "model.py"
    file.write_bytes(file.read_bytes().replace(b"import", b"imporT", 1))
    done = subprocess.run(UP, capture_output=True, text=True, check=False)
    assert done.returncode == 5 and "chat/1/model.py has other bytes" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
