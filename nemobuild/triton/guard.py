"""End a Triton when the process of one of its Python models has died.

Triton 2.51 starts such a process again at the next request, but never answers those that the dead one was working on:
their clients wait for ever, and a model that waits for its tokens waits with them. When the server ends, every client
gets an error at once, and whoever started it can start it again.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

_STUB = "triton_python_backend_stub"
_PERIOD_S = 0.5
_MARK = "nemobuild: "


@contextlib.contextmanager
def guarded(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """While the block runs, kill ``process``, a Triton that is ready, if one of its stubs ends; say so in ``log``."""
    closed = threading.Event()

    def watch() -> None:
        known = stubs(process.pid)
        while not closed.wait(_PERIOD_S):
            lost = known.keys() - stubs(process.pid).keys()
            if lost and process.poll() is None:
                process.send_signal(signal.SIGKILL)
                with log.open("ab") as stream:
                    stream.write(f"\n{_MARK}The process of model {known[min(lost)]!r} ended\n".encode())
                return

    thread = threading.Thread(target=watch, name="triton-guard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def guard_reason(log: Path) -> str:
    """What ``guarded`` wrote when it ended the server, or nothing."""
    with contextlib.suppress(OSError):
        last = log.read_bytes()[-200:].decode("utf-8", "replace").rstrip().rpartition("\n")[2]
        if last.startswith(_MARK):
            return last.removeprefix(_MARK)
    return ""


def stubs(session: int) -> dict[int, str]:
    """Pid of each living stub in a session -> its model."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):  # it may end while we look
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
            state, _, _, number = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
            if words[0].endswith(_STUB) and int(number) == session and state != "Z":
                found[int(folder.name)] = next((Path(w).parts[-3] for w in words if w.endswith("/model.py")), "?")
    return found
