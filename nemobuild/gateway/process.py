"""Run the gateway beside Triton: listen, start its process, start it again if it dies, stop it.

The socket is opened here, before Triton is started, so that a port in use is found first; and it outlives the process
that answers on it, so that a client who connects while that process is started again waits instead of being refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from nemobuild.engine.process import end_group, with_us
from nemobuild.errors import ChildFailed, IntegrityError, ToolchainError, UsageError, from_os_error
from nemobuild.gateway import GatewayConfig, Target
from nemobuild.gateway.keys import read_keys
from nemobuild.local import open_local
from nemobuild.triton.launch import Endpoint

DEFAULT_PORT = 8080
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")
_START_TIMEOUT_S = 60.0
_ORDER_TIMEOUT_S = 60.0
_GRACE_S = 8.0
_MIN_LIFE_S = 5.0
_MAX_QUICK_DEATHS = 3


@contextlib.contextmanager
def listening(host: str, port: int | None, api_keys: Path | None) -> Iterator[socket.socket]:
    """A listening socket: on ``port`` (0: any free one), else 8080, else any free one.

    Raises ``UsageError`` when the port is in use, the host is not ours, or the host is open to others and there are no
    keys; ``ToolchainError`` when the packages of the gateway are missing.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolchainError(
            "no-gateway",
            f"The gateway needs {', '.join(missing)}.",
            next="Install it with: pip install 'nemobuild[gateway]'",
        )
    if api_keys is not None:
        if not read_keys(api_keys):
            raise UsageError(
                "no-keys", f"{api_keys} holds no key.", next=f"Type `nemobuild key NAME --file {api_keys}`."
            )
    elif not _is_loopback(host):
        raise UsageError(
            "open-gateway",
            f"The gateway would listen on {host} without API keys.",
            why="Whoever reaches that address could use the model.",
            next="Make a key with `nemobuild key NAME --file keys.txt`, then add --api-keys keys.txt.",
        )
    with contextlib.closing(_bind(host, (DEFAULT_PORT, 0) if port is None else (port,))) as bound:
        yield bound


def url_of(bound: socket.socket) -> str:
    """Where clients on this machine find it."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _bind(host: str, ports: tuple[int, ...]) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
            bound.listen(socket.SOMAXCONN)  # at once, or another could; who comes early waits
            return bound
        except OSError as error:
            bound.close()
            last = error
    raise UsageError(
        "port-in-use",
        f"Cannot listen on {host}:{ports[0]}.",
        why=f"{last.strerror or last}.",
        next="Choose another with --openai-host and --openai-port.",
    )


def target_of(start: int, triton: Endpoint, assets: Path) -> Target:
    """``start`` counts the servers that one gateway was given."""
    return Target(start, triton.grpc_url, triton.metrics_url, str(assets))


class GatewayProcess:
    """The process that answers on ``bound``; ``check`` it now and then, ``stop`` it at the end."""

    def __init__(self, bound: socket.socket, triton: Endpoint, assets: Path, api_keys: Path | None, log: Path) -> None:
        self._config = GatewayConfig(
            fd=bound.fileno(),
            control_fd=-1,
            host=bound.getsockname()[0],
            target=target_of(0, triton, assets),
            held=False,
            api_keys=None if api_keys is None else str(api_keys.resolve()),
        )
        self._bound, self._log = bound, log
        self._deaths = 0
        log.write_bytes(b"")
        self._start()
        self._wait_live()

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> bool:
        """Start it again if it died; whether it had. Raises ``ChildFailed`` when it dies again and again."""
        status = self._process.poll()
        if status is None:
            return False
        lived_s = time.monotonic() - self._started_s
        self._deaths = self._deaths + 1 if lived_s < _MIN_LIFE_S else 0
        if self._deaths >= _MAX_QUICK_DEATHS:
            raise self._died(status)
        self._control.close()
        self._start()
        return True

    def steer(self, target: Target, *, held: bool = False) -> int:
        """Send new requests to ``target``, or refuse them while ``held``; how many earlier ones are not over.

        One that is started again does the same. Raises ``IntegrityError``, and changes nothing, when it cannot read the
        target's assets.
        """
        before, self._config = self._config, replace(self._config, target=target, held=held)
        order = json.dumps({"target": asdict(target), "held": held}).encode() + b"\n"
        try:
            self._control.sendall(order)
            with self._control.makefile("rb") as replies:
                reply = json.loads(replies.readline() or b"{}")
        except TimeoutError:  # it hangs; ``check`` starts another one, which begins as it should
            self._process.kill()
            return 0
        except (OSError, ValueError):  # it has just died, and all requests with it
            return 0
        if "error" in reply:
            self._config = before
            raise IntegrityError(
                "bad-assets", f"The gateway cannot serve {target.assets}.", why=f"It says: {reply['error']}."
            )
        return int(reply.get("left", 0))

    def stop(self) -> None:
        end_group(self._process, _GRACE_S)
        self._control.close()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_ORDER_TIMEOUT_S)
        config = replace(self._config, control_fd=theirs.fileno())
        try:
            with theirs, self._log.open("ab") as out:
                self._process = subprocess.Popen(
                    with_us([sys.executable, "-m", "nemobuild.gateway", json.dumps(asdict(config))]),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    pass_fds=[self._bound.fileno(), theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            raise from_os_error(error, error.filename or self._log, "starting the gateway, log") from error
        self._started_s = time.monotonic()

    def _wait_live(self) -> None:
        url = f"{url_of(self._bound)}/health/live"
        while True:
            if (status := self._process.poll()) is not None:
                raise self._died(status)
            with contextlib.suppress(OSError), open_local(url, timeout_s=1):
                return
            if time.monotonic() - self._started_s > _START_TIMEOUT_S:
                self.stop()
                raise ChildFailed("gateway-slow", f"The gateway did not start in {_START_TIMEOUT_S:.0f} s.")
            time.sleep(0.05)

    def _died(self, status: int) -> ChildFailed:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        why = "It was killed." if status == -signal.SIGKILL else f"Its last words: {lines[-1] if lines else 'none'}."
        return ChildFailed(
            "gateway-died", f"The gateway ended (status {status}).", why=why, next=f"Its log is {self._log}."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
