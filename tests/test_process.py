"""Running a foreign program: its lines, its memory, its time, and the end of everything that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemobuild.engine import process
from nemobuild.engine.process import run
from nemobuild.errors import UsageError

CHILD_THAT_IGNORES_TERM = "trap '' TERM; echo $$ > {pid}; while :; do sleep 1; done"


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_lines_log_status_and_command(tmp_path):
    lines = []
    done = run(
        ["sh", "-c", "printf 'one\\ntw'; sleep 0.3; printf 'o\\n10%%\\r20%%\\r\\nlast'; exit 3"],
        log=tmp_path / "deep" / "log",
        timeout_s=20,
        on_line=lines.append,
    )
    assert done.status == 3 and not done.timed_out and not done.killed
    assert lines[1:] == ["one", "two", "10%", "20%"] and lines[0].startswith("$ sh -c ")
    assert (tmp_path / "deep" / "log").read_text().endswith("last")


def test_peak_memory_is_that_of_all_processes(tmp_path):
    held = "x = bytearray(80 << 20); import time; time.sleep(1.5)"
    done = run(
        ["sh", "-c", f"{sys.executable} -c '{held}' & {sys.executable} -c '{held}'; wait"],
        log=tmp_path / "log",
        timeout_s=20,
    )
    assert 160 << 20 < done.peak_memory_bytes < 400 << 20


def test_gpu_memory_is_what_came_on_top(tmp_path):
    readings = iter([5 << 30, 6 << 30, 9 << 30, 7 << 30, *[5 << 30] * 100])
    done = run(["sleep", "1.6"], log=tmp_path / "log", timeout_s=20, gpu_bytes=lambda: next(readings))
    assert done.peak_gpu_bytes == 4 << 30
    done = run(["true"], log=tmp_path / "log", timeout_s=20, gpu_bytes=lambda: None)
    assert done.peak_gpu_bytes is None


def test_a_timeout_ends_children_that_ignore_the_request(tmp_path):
    pid = tmp_path / "pid"
    # A process group of its own, as mpirun makes one for every rank.
    script = f'set -m; sh -c "{CHILD_THAT_IGNORES_TERM.format(pid=pid).replace("$", chr(92) + "$")}" & wait'
    done = run(["sh", "-c", script], log=tmp_path / "log", timeout_s=1, grace_s=0.5)
    assert done.timed_out and done.elapsed_s < 5
    wait_for(lambda: not alive(int(pid.read_text())))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_when_we_end_it_ends(tmp_path, number):
    pid = tmp_path / "pid"
    program = f"""
        import sys
        from pathlib import Path
        from nemobuild.engine.process import run
        try:
            run(["sh", "-c", "echo $$ > {pid}; exec sleep 60"], log=Path("{tmp_path}/log"), timeout_s=60)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    ours = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    wait_for(lambda: pid.exists() and pid.read_text())
    time.sleep(0.1)
    ours.send_signal(number)
    assert ours.wait(10) == (-9 if number == signal.SIGKILL else 130)
    wait_for(lambda: not alive(int(pid.read_text())))


def test_a_second_interrupt_does_not_wait(tmp_path):
    pid = tmp_path / "pid"
    program = f"""
        import sys
        from pathlib import Path
        from nemobuild.engine.process import run
        try:
            stubborn = "{CHILD_THAT_IGNORES_TERM.format(pid=pid)}"
            run(["sh", "-c", stubborn], log=Path("{tmp_path}/log"), timeout_s=60, grace_s=60)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    ours = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    wait_for(lambda: pid.exists() and pid.read_text())
    for _ in range(2):
        time.sleep(0.3)
        ours.send_signal(signal.SIGINT)
    assert ours.wait(10) == 130
    wait_for(lambda: not alive(int(pid.read_text())))


def test_a_kill_is_told_from_a_failure(tmp_path):
    assert run(["sh", "-c", "kill -9 $$"], log=tmp_path / "log", timeout_s=20).killed
    assert run(["sh", "-c", "exit 137"], log=tmp_path / "log", timeout_s=20).killed
    assert not run(["sh", "-c", "exit 1"], log=tmp_path / "log", timeout_s=20).killed


def test_what_cannot_start(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        run([str(tmp_path / "nowhere")], log=tmp_path / "log", timeout_s=1)
    with pytest.raises(UsageError, match="log"):
        run(["true"], log=Path("/proc/nowhere/log"), timeout_s=1)
    assert os.path.exists(tmp_path / "log")


def test_a_second_interrupt_does_not_wait_for_what_stops_a_container(tmp_path):
    """What was asked to stop it goes on, and all that is ours ends at once."""
    pid, stopped = tmp_path / "pid", tmp_path / "stopped"
    program = f"""
        import sys
        from pathlib import Path
        from nemobuild.engine.process import run
        try:
            stubborn, stop = "{CHILD_THAT_IGNORES_TERM.format(pid=pid)}", "sleep 3; touch {stopped}"
            run(["sh", "-c", stubborn], log=Path("{tmp_path}/log"), timeout_s=60, grace_s=0.2, stop=["sh", "-c", stop])
        except KeyboardInterrupt:
            sys.exit(130)
    """
    ours = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], start_new_session=True)
    wait_for(lambda: pid.exists() and pid.read_text())
    for _ in range(2):
        time.sleep(0.5)
        os.killpg(ours.pid, signal.SIGINT)  # as a terminal does, to all of them
    assert ours.wait(10) == 130 and not stopped.exists()
    wait_for(lambda: not alive(int(pid.read_text())))
    wait_for(stopped.exists)


@pytest.mark.parametrize("stop", [["sleep", "5"], ["/nowhere/docker"]])
def test_what_stops_a_container_may_hang_or_be_gone(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(process, "_STOP_S", 0.3)
    pid = tmp_path / "pid"
    done = run(
        ["sh", "-c", CHILD_THAT_IGNORES_TERM.format(pid=pid)],
        log=tmp_path / "log",
        timeout_s=0.5,
        grace_s=0.2,
        stop=stop,
    )
    assert done.timed_out and done.elapsed_s < 4 and not alive(int(pid.read_text()))
