"""Run one long foreign program: its log kept, its memory sampled, its end under our control.

The program writes straight into its log file, which is therefore complete whatever happens to us; we read the file as
it grows. It gets a session of its own, so that it ends together with all its workers: on a timeout, on Ctrl-C, and
when we are killed. Memory is the sum over that session; a container's processes belong to the Docker daemon, and are
found by the container's id in their control group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemobuild.errors import from_os_error

_PR_SET_PDEATHSIG = 1
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_POLL_S = 0.1
_SAMPLE_S = 0.5
_STOP_S = 30.0
_MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended. ``status`` is its exit status, negative for the signal that ended it.

    ``peak_memory_bytes`` is host memory over all its processes, ``peak_gpu_bytes`` what the GPUs held beyond what they
    held before (``None`` where no GPU can be read). ``oom_killed`` when the kernel killed something for want of memory.
    """

    status: int
    elapsed_s: float
    timed_out: bool
    oom_killed: bool
    peak_memory_bytes: int
    peak_gpu_bytes: int | None

    @property
    def killed(self) -> bool:
        """Whether it was killed; a shell and a container report that as 128 + 9."""
        return self.status in (-signal.SIGKILL, 128 + signal.SIGKILL)


def run(
    argv: Sequence[str],
    *,
    log: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    gpu_bytes: Callable[[], int | None] | None = None,
    container_id: Path | None = None,
    stop: Sequence[str] | None = None,
    grace_s: float = 10.0,
) -> Finished:
    """Run ``argv`` to its end, with itself and what it says in ``log``; gives how it ended, whatever its exit status.

    ``on_line`` gets its lines as they come, ``gpu_bytes`` tells the memory in use on the GPUs, ``container_id`` is the
    file in which Docker notes the container, and ``stop`` a command that stops what a signal does not reach. On
    Ctrl-C and SIGTERM everything it started is stopped before ``KeyboardInterrupt`` goes on. Raises ``NemobuildError``
    when it cannot be started or the log not be written.
    """
    tell = on_line or (lambda line: None)
    before_gpu_bytes = gpu_bytes() if gpu_bytes else None
    before_ooms = _oom_kills()
    started_s = time.monotonic()
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as sink:
            sink.write(f"$ {shlex.join(argv)}\n".encode())
            sink.flush()
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
    except OSError as error:
        raise from_os_error(error, error.filename or log, "starting a program, log") from error
    timed_out, peak_bytes, peak_gpu_bytes, next_sample_s = False, 0, before_gpu_bytes, 0.0
    with _lines_of(log) as lines, _sigterm_interrupts():
        try:
            while process.poll() is None:
                for line in lines:
                    tell(line)
                elapsed_s = time.monotonic() - started_s
                if elapsed_s >= next_sample_s:
                    next_sample_s = elapsed_s + _SAMPLE_S
                    peak_bytes = max(peak_bytes, session_bytes(process.pid, container_id))
                    now_bytes = gpu_bytes() if gpu_bytes else None
                    if now_bytes is not None:
                        peak_gpu_bytes = max(peak_gpu_bytes or 0, now_bytes)
                if elapsed_s > timeout_s:
                    timed_out = True
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            try:
                if stop is not None and process.poll() is None:
                    _ask(stop)
            finally:  # also after a second Ctrl-C
                end_group(process, grace_s)
        for line in lines:
            tell(line)
    return Finished(
        status=process.returncode,
        elapsed_s=time.monotonic() - started_s,
        timed_out=timed_out,
        oom_killed=_oom_kills() > before_ooms,
        peak_memory_bytes=peak_bytes,
        peak_gpu_bytes=None if peak_gpu_bytes is None else max(0, peak_gpu_bytes - (before_gpu_bytes or 0)),
    )


def _ask(stop: Sequence[str]) -> None:
    """Run ``stop`` and wait for it, in a session of its own: a second Ctrl-C ends our waiting, and not its work."""
    quiet = subprocess.DEVNULL
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.Popen(list(stop), stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
        asked.wait(_STOP_S)


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask a program that leads a session to end, wait for ``grace_s``, then kill all that is left of the session.

    Not only of its process group: ``mpirun`` puts every rank into a group of its own.
    """
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
    finally:  # also after a second Ctrl-C
        for pid, session, _ in _processes():
            if session == process.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()


def with_us(argv: Sequence[str], stack_bytes: int = 0) -> list[str]:
    """The line that runs ``argv`` so that it ends when we end, however that happens; for starters with threads.

    It ends with the *thread* that starts it. ``stack_bytes`` is the stack it may use; 0: the usual.
    """
    child = Path(__file__).with_name("child.py")
    return [sys.executable, "-I", "-S", str(child), str(os.getpid()), str(stack_bytes), *argv]


def die_with_parent() -> None:
    """In the child, before it becomes the program: end when nemobuild ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _lines_of(log: Path) -> Iterator[Iterator[str]]:
    """An iterator over the lines that are there now; go through it again for those that came since.

    A carriage return ends a line as well: that is how progress bars are drawn.
    """
    with log.open("rb") as stream:
        yield _Lines(stream.read)


class _Lines:
    """Cuts what ``read`` gives into lines, and keeps the unfinished rest for the next time."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._rest, self._ready = read, b"", list[str]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._ready:
            more = self._read(_MAX_LINE_BYTES)
            if not more:
                raise StopIteration
            *whole, self._rest = (self._rest + more).replace(b"\r", b"\n").split(b"\n")
            self._rest = self._rest[-_MAX_LINE_BYTES:]
            self._ready = [line.decode("utf-8", "replace").strip() for line in whole if line.strip()]
        return self._ready.pop(0)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does: by the way that stops the program. Only the main thread can have it so."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def session_bytes(session: int, container_id: Path | None = None) -> int:
    """Resident memory of all processes of a session, and of a container once Docker has noted its id."""
    marker = ""
    if container_id is not None:
        with contextlib.suppress(OSError):
            marker = container_id.read_text().strip()
    return sum(size for pid, owner, size in _processes() if owner == session or (marker and _in_group(pid, marker)))


def _processes() -> Iterator[tuple[int, int, int]]:
    """(process, session, resident bytes) of everything that runs. Zombies have no memory."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):  # it may end while we look
                # The name stands in brackets and may hold anything; see proc(5) for the numbers after it.
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                yield int(folder.name), int(fields[3]), int(fields[21]) * _PAGE_BYTES


def _in_group(pid: int, marker: str) -> bool:
    try:
        return marker in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


def _oom_kills() -> int:
    """Processes that the kernel has killed for want of memory since it started."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
