"""Start a Triton on an emitted repository, wait until it really answers, and stop it with all that it started.

The server gets a session of its own, so that it ends together with its Python stubs and its ranks, and it dies with us
if we are killed; a container, which belongs to Docker, is removed by name. It listens on loopback unless told
otherwise. Ready means that a token was generated through the chat model, not that a port is open.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nemobuild.engine.foreign import explain, tail
from nemobuild.engine.process import end_group, with_us
from nemobuild.errors import ChildFailed, NemobuildError, UsageError, from_os_error
from nemobuild.local import open_local
from nemobuild.triton.client import stream
from nemobuild.triton.guard import guard_reason, guarded
from nemobuild.triton.launch import DEFAULT_PORTS, Emitted, Endpoint, Launch, Where, choose_launch, read_emitted

_FAILURES = (
    re.compile(r"failed to load '(?P<model>\w+)' version \d+: \w+(?: \w+)*: (?P<why>[^\\\"]+)"),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<why>[^\"]+)"),
    re.compile(r"(?P<why>[^\"]*[Aa]ddress already in use[^\"]*)"),
    re.compile(r"error: (?P<why>.+)"),
)
# Triton 2.51 copies the body of an HTTP request to the stack; with the usual 8 MiB, 4 MiB of text crash it.
_STACK_BYTES = 256 << 20
_FIRST_TOKEN_TIMEOUT_S = 60.0
_GRACE_S = 15.0
_REMOVAL_TIMEOUT_S = 30.0
# On a loaded machine Triton 2.51 now and then loses a race with its own Python processes as they start, and aborts; or
# another process looked for free ports at the very moment when it opened one of them.
_START_RACES = ("boost::interprocess::lock_exception", "already in use", "Signal (11) received")
_NO_METRICS = "failed to start Metrics service"
_STARTS = 3


def choose_endpoint(
    host: str = "127.0.0.1", ports: tuple[int | None, int | None, int | None] = (None,) * 3
) -> Endpoint:
    """Ports for HTTP, gRPC and metrics: those asked for (0: any free one), else 8000 to 8002, else any free ones.

    Raises ``UsageError`` when a port that was asked for is in use, or the host is not an address of this machine.
    """
    asked = [port for port in ports if port]
    if len(set(asked)) < len(asked):
        raise UsageError("port-twice", f"The ports {', '.join(map(str, asked))} must differ.")
    chosen: list[int] = []
    with contextlib.ExitStack() as held:  # hold each port until all are chosen, so that no two are equal
        for wanted, default in zip(ports, DEFAULT_PORTS, strict=True):
            candidates = (wanted,) if wanted is not None else (default, 0)
            chosen.append(_first_free(host, candidates, held))
    return Endpoint(host, *chosen)


def _first_free(host: str, candidates: tuple[int, ...], held: contextlib.ExitStack) -> int:
    for port in candidates:
        probe = held.enter_context(socket.socket())
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            last = error
    if last.errno != errno.EADDRINUSE:
        raise UsageError("bad-address", f"Cannot listen on {host}:{candidates[0]}.", why=f"{last.strerror or last}.")
    raise UsageError(
        "port-in-use",
        f"Cannot listen on {host}:{candidates[0]}.",
        why=f"{last.strerror or last}.",
        next="Stop what listens there, or leave the port out to get a free one.",
    )


@contextlib.contextmanager
def running(
    repository: Path,
    endpoint: Endpoint,
    log: Path,
    *,
    where: Where = "auto",
    cards: Sequence[int] = (),
    ready_timeout_s: float = 600.0,
    on_start: Callable[[Launch], None] | None = None,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A Triton that answered a real request; stopped with all that it started when the block ends.

    When a process of one of its Python models dies later, the server is ended (see ``guard``).
    ``cards`` are the GPUs to use, ``on_start`` gets the line that is about to run. Raises what ``choose_launch`` does,
    and when the server ends before it is ready the error that its log tells of, else ``ChildFailed``.
    """
    made = read_emitted(repository)
    server_id = f"nemobuild_{os.getpid()}_{endpoint.grpc_port}_"
    launch = choose_launch(made, repository, endpoint, server_id, where, cards)
    if on_start:
        on_start(launch)
    for start in range(1, _STARTS + 1):
        process = _start(launch, repository, log)
        try:
            _wait_ready(process, made, endpoint, server_id, log, ready_timeout_s, on_wait)
            break
        except BaseException as error:
            _stop(process, launch, server_id)
            if not isinstance(error, ChildFailed) or start == _STARTS or not any(r in tail(log) for r in _START_RACES):
                raise
    try:
        with guarded(process, log):
            yield process
    finally:
        _stop(process, launch, server_id)


def _start(launch: Launch, repository: Path, log: Path) -> subprocess.Popen[bytes]:
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            return subprocess.Popen(
                with_us(launch.command, _STACK_BYTES),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(launch.env),
                cwd=repository,
                start_new_session=True,
            )
    except OSError as error:
        raise from_os_error(error, error.filename or log, "starting Triton, log") from error


def died(status: int, made: Emitted, log: Path) -> NemobuildError:
    """Why the server ended by itself: what TensorRT-LLM, CUDA or Docker are known to say, else Triton's own words."""
    known = explain(tail(log)) if made.runtime != "cpu" else None
    if known is not None:
        return type(known)(known.code, known.what, why=known.why, next=f"{known.next} The whole log is in {log}.")
    killed = status in (-signal.SIGKILL, 128 + signal.SIGKILL)  # by the kernel, most often for memory
    why = guard_reason(log) or ("It was killed; the machine may be out of memory" if killed else log_failure(log))
    return ChildFailed(
        "triton-died", f"Triton ended (status {status}).", why=f"{why}.", next=f"The whole log is in {log}."
    )


def log_failure(log: Path) -> str:
    """One sentence from Triton's log that says why it failed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for pattern in _FAILURES:
        for found in pattern.finditer(text):
            model = found.groupdict().get("model")
            why = found["why"].strip().rstrip(".")
            return f"model {model!r}: {why}" if model else why
    return "its log gives no reason"


def _wait_ready(
    process: subprocess.Popen[bytes],
    made: Emitted,
    endpoint: Endpoint,
    server_id: str,
    log: Path,
    timeout_s: float,
    on_wait: Callable[[float], None] | None,
) -> None:
    begin = time.monotonic()
    while not _says_ready(endpoint, server_id):
        waited_s = time.monotonic() - begin
        if process.poll() is not None:
            raise died(process.returncode, made, log)
        if waited_s > timeout_s:
            raise ChildFailed(
                "triton-slow", f"Triton was not ready after {timeout_s:.0f} s.", next=f"See its log, {log}."
            )
        if on_wait:
            on_wait(waited_s)
        time.sleep(0.1)
    fields = {"text_input": "Hello", "max_tokens": 1, "temperature": 0.0}
    try:
        for _ in stream(endpoint.grpc_url, fields, timeout_s=_FIRST_TOKEN_TIMEOUT_S):
            pass
    except NemobuildError as error:
        raise ChildFailed(
            "no-first-token", "Triton started, but did not generate a token.", why=str(error), next=f"See {log}."
        ) from error
    if _NO_METRICS in tail(log):  # it goes on for a while, and then crashes
        raise ChildFailed(
            "no-metrics",
            f"Triton could not open its port {endpoint.metrics_port} for metrics.",
            why="Another process has it.",
            next=f"Choose another with --metrics-port. See {log}.",
        )


def _says_ready(endpoint: Endpoint, server_id: str) -> bool:
    """Whether the server at the endpoint is the one that we started, and says that its models are loaded."""
    try:
        with open_local(f"{endpoint.http_url}/v2", timeout_s=1) as response:
            if json.loads(response.read(1 << 16)).get("name") != server_id:
                return False
        with open_local(f"{endpoint.http_url}/v2/health/ready", timeout_s=1) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def _stop(process: subprocess.Popen[bytes], launch: Launch, server_id: str) -> None:
    """End it with all that it started, and remove what a killed server leaves: its container, its shared memory."""
    try:
        end_group(process, _GRACE_S)
    finally:
        if launch.removal:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    launch.removal, stdin=subprocess.DEVNULL, capture_output=True, timeout=_REMOVAL_TIMEOUT_S
                )
        for leftover in Path("/dev/shm").glob(f"{server_id}*"):
            leftover.unlink(missing_ok=True)
