"""A conversion that is killed, interrupted or doubled: nothing half-made, and --resume gives the same bytes."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemobuild.convert import executor, planning, workers
from nemobuild.convert.executor import Report, convert
from nemobuild.convert.journal import Journal
from nemobuild.convert.workers import Progress
from nemobuild.errors import IntegrityError, NemobuildError, UsageError
from nemobuild.weights.snapshot import Snapshot, open_snapshot
from tests.tiny import tiny_config, write_model

ROOT = Path(__file__).parents[1]
TP = 2

# Slow and flushed after every job, so that a kill finds it anywhere and the journal has something to tell.
CHILD = """
import sys, time
from pathlib import Path
from nemobuild.convert import executor, workers
from nemobuild.errors import NemobuildError
from nemobuild.weights.snapshot import open_snapshot
executor.SYNC_BYTES = 1
workers.CHUNK_BYTES = 4096
def slow(progress):
    print(progress.done_bytes, flush=True)
    time.sleep(0.01)
try:
    executor.convert(open_snapshot(Path(sys.argv[1])), Path(sys.argv[2]), tp=2, workers=2, progress=slow,
                     resume=sys.argv[3] == "resume")
except KeyboardInterrupt:
    sys.exit(130)
except NemobuildError as error:
    print(error.code)
    sys.exit(error.exit_status)
"""


def start(source: Path, output: Path, how: str = "fresh") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(output), how]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "m")


@pytest.fixture
def snapshot(source: Path) -> Snapshot:
    return open_snapshot(source)


@pytest.mark.parametrize("seed", range(3))
def test_kill_and_resume_give_the_same_bytes(seed: int, source: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    total_bytes, output = snapshot.weight_bytes, tmp_path / "out"
    rng = random.Random(seed)
    kills, resumed = 0, False
    for point in sorted(rng.uniform(0.05, 0.95) for _ in range(3)):
        child = start(source, output, "resume" if resumed else "fresh")
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) >= point * total_bytes:
                # Not at the line itself: anywhere in the work that follows it.
                time.sleep(rng.uniform(0, 0.02))
                child.kill()
                break
        assert child.wait(timeout=30) == -signal.SIGKILL
        assert not output.exists()
        kills, resumed = kills + 1, True
    report = convert(snapshot, output, tp=TP, resume=True)
    assert kills == 3
    assert 0 < report.resumed_bytes < total_bytes
    convert(snapshot, tmp_path / "whole", tp=TP)
    assert read_folder(output) == read_folder(tmp_path / "whole")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out", "whole"]


def test_what_was_done_is_not_done_again(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(snapshot, tmp_path / "out", 0.5, monkeypatch)
    seen: list[Progress] = []
    report = convert(snapshot, tmp_path / "out", tp=TP, resume=True, progress=seen.append)
    assert seen[0].resumed_bytes == report.resumed_bytes > 0.3 * snapshot.weight_bytes
    assert seen[0].done_bytes > report.resumed_bytes
    assert seen[-1].done_bytes == snapshot.weight_bytes


def interrupt_at(snapshot: Snapshot, output: Path, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a partial folder behind, with the journal up to date."""
    monkeypatch.setattr(executor, "SYNC_BYTES", 1)

    def stop(progress: Progress) -> None:
        time.sleep(0.002)
        if progress.done_bytes >= part * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(snapshot, output, tp=TP, workers=1, progress=stop)
    assert (output.parent / f".{output.name}.partial" / "journal").exists()


def test_ctrl_c_stops_at_once_and_keeps_the_work(source: Path, tmp_path: Path) -> None:
    child = start(source, tmp_path / "out")
    assert child.stdout is not None
    for _ in range(5):
        child.stdout.readline()
    sent_s = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=10) == 130
    assert time.monotonic() - sent_s < 2
    assert [f.name for f in tmp_path.iterdir()] == [".out.partial"]
    assert start(source, tmp_path / "out", "resume").wait(timeout=30) == 0


def test_a_stop_is_seen_between_chunks(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker has hundreds of chunks before it when the first one fails."""
    monkeypatch.setattr(workers, "CHUNK_BYTES", 256)
    monkeypatch.setattr(workers, "PROGRESS_INTERVAL_S", 0)
    seen: list[int] = []
    failed_at = 0

    def fail(_: Progress) -> None:
        nonlocal failed_at
        time.sleep(0.0005)
        seen.append(threading.get_ident())
        # Both workers are in the middle of a job: one tensor takes 265 chunks.
        if not failed_at and len(set(seen)) == 2 and len(seen) > 20:
            failed_at = len(seen)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(snapshot, tmp_path / "out", tp=TP, workers=2, progress=fail)
    assert len(seen) <= failed_at + 2


def test_a_torn_line_does_not_run_into_the_next(tmp_path: Path) -> None:
    """A kill in the middle of writing 12 leaves 1: neither job 1 nor, with the next line, job 17 is done."""
    journal = Journal(tmp_path / "out", {"what": "this"}, resume=False)
    journal.add([3, 12])
    journal.close()
    with (tmp_path / ".out.partial" / "journal").open("ab") as stream:
        stream.write(b"1")
    journal = Journal(tmp_path / "out", {"what": "this"}, resume=True)
    assert journal.done == {3, 12}
    journal.add([7])
    journal.close()
    journal = Journal(tmp_path / "out", {"what": "this"}, resume=True)
    assert journal.done == {3, 7, 12}
    journal.close()


def refusal(snapshot: Snapshot, output: Path, *, tp: int = TP, resume: bool) -> NemobuildError:
    with pytest.raises(NemobuildError) as caught:
        convert(snapshot, output, tp=tp, resume=resume)
    return caught.value


def test_a_leftover_is_neither_replaced_nor_continued_unasked(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(snapshot, tmp_path / "out", 0.3, monkeypatch)
    before = read_folder(tmp_path / ".out.partial")
    error = refusal(snapshot, tmp_path / "out", resume=False)
    assert (error.code, error.exit_status) == ("partial-exists", 2)
    assert "--resume" in error.next
    assert "delete" in error.next
    assert read_folder(tmp_path / ".out.partial") == before


def test_resume_of_something_else_is_refused(
    source: Path, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(snapshot, tmp_path / "out", 0.3, monkeypatch)
    before = read_folder(tmp_path / ".out.partial")
    error = refusal(snapshot, tmp_path / "out", tp=4, resume=True)
    assert error.code == "resume-mismatch"
    assert "tp" in error.what
    other = open_snapshot(write_model(tmp_path / "other", tiny_config(), seed=9))
    error = refusal(other, tmp_path / "out", resume=True)
    assert error.code == "resume-mismatch"
    assert "source files" in error.what
    monkeypatch.setattr(planning, "_version", lambda: "99")
    assert "version" in refusal(snapshot, tmp_path / "out", resume=True).what
    assert read_folder(tmp_path / ".out.partial") == before


def test_resume_without_a_leftover_starts(snapshot: Snapshot, tmp_path: Path) -> None:
    assert convert(snapshot, tmp_path / "out", resume=True).resumed_bytes == 0


@pytest.mark.parametrize("damage", ["torn-line", "torn-head", "no-journal", "file-gone", "file-short", "garbage"])
def test_resume_from_a_damaged_leftover(
    damage: str, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(snapshot, tmp_path / "out", 0.6, monkeypatch)
    partial = tmp_path / ".out.partial"
    journal = partial / "journal"
    if damage == "torn-line":
        # The number of the last job lost its end: 1 of 12 must not be taken for job 1 and the next line.
        journal.write_bytes(journal.read_bytes() + b"1")
    elif damage == "torn-head":
        journal.write_bytes(journal.read_bytes()[:20])
    elif damage == "no-journal":
        journal.unlink()
    elif damage == "file-gone":
        (partial / "rank1.safetensors").unlink()
    elif damage == "file-short":
        os.truncate(partial / "rank1.safetensors", 100)
    else:
        journal.write_bytes(b"garbage\n" + journal.read_bytes())
        assert refusal(snapshot, tmp_path / "out", resume=True).code == "resume-mismatch"
        return
    report = convert(snapshot, tmp_path / "out", tp=TP, resume=True)
    assert (report.resumed_bytes > 0) == (damage == "torn-line")
    convert(snapshot, tmp_path / "whole", tp=TP)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


def test_a_file_that_was_lost_is_not_taken_for_done_by_the_run_after_next(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(snapshot, tmp_path / "out", 0.9, monkeypatch)
    (tmp_path / ".out.partial" / "rank1.safetensors").unlink()

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(snapshot, tmp_path / "out", tp=TP, resume=True, workers=1, progress=stop)
    convert(snapshot, tmp_path / "out", tp=TP, resume=True)
    convert(snapshot, tmp_path / "whole", tp=TP)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


def test_two_converters_of_one_target(source: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    child = start(source, tmp_path / "out")
    assert child.stdout is not None
    child.stdout.readline()
    try:
        for resume in (False, True):
            error = refusal(snapshot, tmp_path / "out", resume=resume)
            assert (error.code, error.exit_status) == ("busy", 2)
    finally:
        child.stdout.read()
    # The first one was not disturbed, and now its result is in the way.
    assert child.wait(timeout=30) == 0
    convert(snapshot, tmp_path / "whole", tp=TP)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")
    assert refusal(snapshot, tmp_path / "out", resume=True).code == "output-exists"


def test_the_lock_of_a_folder_that_was_renamed_meanwhile_does_not_count(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our open of the journal and our lock the other converter finishes."""
    interrupt_at(snapshot, tmp_path / "out", 0.3, monkeypatch)
    real = fcntl.flock

    def late(fd: int, how: int) -> None:
        (tmp_path / ".out.partial" / "journal").unlink()
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert refusal(snapshot, tmp_path / "out", resume=True).code == "busy"
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_bad_data_after_a_resume_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m")
    snapshot = open_snapshot(folder)
    interrupt_at(snapshot, tmp_path / "out", 0.2, monkeypatch)
    file = snapshot.tensors["lm_head.weight"].file
    times = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(b"\xff\x7f")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(IntegrityError):
        convert(snapshot, tmp_path / "out", tp=TP, resume=True)
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


FULL = """
import sys
from pathlib import Path
from nemobuild.convert import executor, workers
from nemobuild.errors import NemobuildError
from nemobuild.weights.snapshot import open_snapshot
if sys.argv[3] != "0":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    executor.convert(open_snapshot(Path(sys.argv[1])), Path(sys.argv[2]))
except NemobuildError as error:
    print(error.code, error.exit_status)
"""


@pytest.mark.parametrize("limit_bytes", [100_000, 20_000])
def test_a_disk_that_turns_out_full_leaves_nothing(limit_bytes: int, source: Path, tmp_path: Path) -> None:
    """The kernel refuses space although the file system reported enough: as with a quota."""
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "out"), str(limit_bytes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["file-too-large", "3"], result.stderr
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_resumed_run(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(snapshot, tmp_path / "out", 0.5, monkeypatch)
    resumed: Report = convert(snapshot, tmp_path / "out", tp=TP, resume=True)
    whole = convert(snapshot, tmp_path / "whole", tp=TP)
    assert (resumed.key, resumed.files, resumed.target_bytes) == (whole.key, whole.files, whole.target_bytes)
    with pytest.raises(UsageError):
        convert(snapshot, tmp_path / "whole", tp=TP)
