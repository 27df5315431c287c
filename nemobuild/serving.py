"""Serve until told to stop, and remember where, so that ``nemobuild chat`` finds the server by itself."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nemobuild.gateway.process import GatewayProcess, url_of
from nemobuild.triton.launch import DEFAULT_PORTS, Endpoint, Launch, Where, read_emitted
from nemobuild.triton.server import died, running


@dataclass(frozen=True, slots=True)
class Front:
    """The gateway that ``serve_until_stopped`` keeps alive. ``on_restart`` is called when it had died."""

    bound: socket.socket
    api_keys: Path | None
    log: Path
    on_restart: Callable[[], None]

    @property
    def url(self) -> str:
        return url_of(self.bound)


def serve_until_stopped(
    repository: Path,
    endpoint: Endpoint,
    log: Path,
    *,
    where: Where,
    ready_timeout_s: float,
    on_start: Callable[[Launch], None],
    on_ready: Callable[[Endpoint], None],
    gateway: Front | None = None,
) -> None:
    """Run Triton, and the gateway before it, until SIGINT or SIGTERM.

    Raises as ``running`` does, also when Triton ends by itself later, and ``ChildFailed`` when the gateway cannot live.
    """
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    server = running(
        repository,
        endpoint,
        log,
        where=where,
        ready_timeout_s=ready_timeout_s,
        on_start=on_start,
        on_wait=lambda _: _leave_if(stop),
    )
    try:
        with server as process, _fronted(gateway, repository, endpoint) as front, _remembered(endpoint):
            on_ready(endpoint)
            while not stop.wait(0.2):
                if process.poll() is not None:
                    raise died(process.returncode, read_emitted(repository), log)
                if front is not None and front.check() and gateway is not None:
                    gateway.on_restart()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def present_endpoint() -> str:
    """gRPC address of the server that ``serve`` started last and that still runs, else the usual port."""
    files = sorted(_state_folder().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            os.kill(int(file.stem), 0)  # raises when that process is gone
            state = json.loads(file.read_text())
            return f"{state['host']}:{state['grpc_port']}"
    return f"127.0.0.1:{DEFAULT_PORTS[1]}"


def _leave_if(stop: threading.Event) -> None:
    if stop.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _fronted(front: Front | None, repository: Path, endpoint: Endpoint) -> Iterator[GatewayProcess | None]:
    if front is None:
        yield None
        return
    assets = repository.resolve() / "chat" / "1" / "assets"
    process = GatewayProcess(front.bound, endpoint, assets, front.api_keys, front.log)
    try:
        yield process
    finally:
        process.stop()


@contextlib.contextmanager
def _remembered(endpoint: Endpoint) -> Iterator[None]:
    file = _state_folder() / f"{os.getpid()}.json"
    with contextlib.suppress(OSError):  # a convenience only
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(endpoint)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()


def _state_folder() -> Path:
    """One file per running server, named by its process id."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "nemobuild" / "serving"
