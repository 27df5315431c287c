"""Start a Triton on an emitted repository, wait until it really answers, and stop it with all that it started.

The server gets a session of its own, so that it and its Python stubs end together by process group, and it dies
with us if we are killed. It listens on loopback unless told otherwise. Ready means that a token was generated through
the chat model, not that a port is open.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemobuild.errors import ChildFailed, NemobuildError, UsageError, from_os_error
from nemobuild.triton.carrier import TritonInstall, find_triton
from nemobuild.triton.client import stream

DEFAULT_PORTS = (8000, 8001, 8002)
_FAILURES = (
    re.compile(r"failed to load '(?P<model>\w+)' version \d+: \w+(?: \w+)*: (?P<why>[^\\\"]+)"),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<why>[^\"]+)"),
    re.compile(r"(?P<why>[^\"]*[Aa]ddress already in use[^\"]*)"),
    re.compile(r"error: (?P<why>.+)"),
)
_PR_SET_PDEATHSIG = 1
_STACK_BYTES = 256 << 20
_FIRST_TOKEN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{self.host}:{self.grpc_port}"


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
    install: TritonInstall | None = None,
    ready_timeout_s: float = 600.0,
    on_wait: Callable[[float], None] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A Triton that answered a real request; stopped with all its children when the block ends.

    Raises ``ChildFailed`` with the reason from its log when it ends before it is ready.
    """
    install = install or find_triton()
    if not any(repository.glob("*/config.pbtxt")):
        raise UsageError(
            "no-repository", f"{repository} is not a model repository.", next="Make one: `nemobuild repo`."
        )
    prefix = f"nemobuild_{os.getpid()}_{endpoint.grpc_port}_"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream_out:
            process = subprocess.Popen(
                _command(install, repository, endpoint, prefix),
                stdin=subprocess.DEVNULL,
                stdout=stream_out,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(install.env),
                cwd=repository,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
    except OSError as error:
        raise from_os_error(error, log, "starting Triton, log") from error
    try:
        _wait_ready(process, endpoint, prefix, log, ready_timeout_s, on_wait)
        yield process
    finally:
        _stop(process, prefix)


def log_failure(log: Path) -> str:
    """One sentence from Triton's log that says why it failed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for pattern in _FAILURES:
        for found in pattern.finditer(text):
            model = found.groupdict().get("model")
            why = found["why"].strip().rstrip(".")
            return f"model {model!r}: {why}" if model else why
    return "its log gives no reason"


def _command(install: TritonInstall, repository: Path, endpoint: Endpoint, prefix: str) -> list[str]:
    command = [
        str(install.binary),
        f"--model-repository={repository.resolve()}",
        "--disable-auto-complete-config",  # the emitted configs are complete
        "--exit-timeout-secs=5",
        f"--id={prefix}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",  # two servers on one machine stay apart
    ]
    for name in ("http", "grpc", "metrics"):
        port = getattr(endpoint, f"{name}_port")
        command += [f"--{name}-address={endpoint.host}", f"--{name}-port={port}"]
    if install.backend_directory is not None:
        command.append(f"--backend-directory={install.backend_directory}")
    return command


def _wait_ready(
    process: subprocess.Popen[bytes],
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
            raise ChildFailed(
                "triton-died",
                f"Triton ended at start (status {process.returncode}).",
                why=f"{log_failure(log)}.",
                next=f"The whole log is in {log}.",
            )
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


def _says_ready(endpoint: Endpoint, server_id: str) -> bool:
    """Whether the server at the endpoint is the one that we started, and says that its models are loaded."""
    try:
        with urllib.request.urlopen(f"{endpoint.http_url}/v2", timeout=1) as response:
            if json.loads(response.read(1 << 16)).get("name") != server_id:
                return False
        with urllib.request.urlopen(f"{endpoint.http_url}/v2/health/ready", timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):
        return False


def _stop(process: subprocess.Popen[bytes], prefix: str, grace_s: float = 15.0) -> None:
    """Ask, wait, then end the whole process group; remove the shared memory that a killed server leaves."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for leftover in Path("/dev/shm").glob(f"{prefix}*"):
        leftover.unlink(missing_ok=True)


def _die_with_parent() -> None:
    """In the child, before it becomes Triton: end when nemobuild ends, however that happens, and have enough stack.

    Triton 2.51 copies the body of an HTTP request to the stack; with the usual 8 MiB, 4 MiB of text crash it.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))
