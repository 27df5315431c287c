"""How other commands find a ``serve`` that runs, and speak with it.

Each has two files in a folder that only its user can open, named by its process id: what it serves and where, as JSON,
and a socket. An order is a line of JSON; lines of JSON come back, the last of which says ``done`` or ``error``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemobuild.errors import ChildFailed, NemobuildError
from nemobuild.triton.launch import DEFAULT_PORTS

_MAX_ORDER_BYTES = 1 << 16
_ORDER_TIMEOUT_S = 2.0
State = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """What somebody asks of this process. That he may have left meanwhile changes nothing."""

    fields: Mapping[str, Any]
    connection: socket.socket

    def tell(self, event: str) -> None:
        self._send({"event": event})

    def done(self, value: Mapping[str, object]) -> None:
        self._send({"done": value})

    def failed(self, error: NemobuildError) -> None:
        self._send(error.as_dict())

    def _send(self, value: Mapping[str, object]) -> None:
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(value).encode() + b"\n")


class Control:
    """The two files of this process; see ``controlled``."""

    def __init__(self, folder: Path) -> None:
        self._file, self._name = folder / f"{os.getpid()}.json", folder / f"{os.getpid()}.sock"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._name.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        with _reachable(self._name) as name:
            self._socket.bind(name)
        self._name.chmod(0o600)
        self._socket.listen()

    def remember(self, state: State) -> None:
        """What is served now, and where."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(state))
        fresh.rename(self._file)

    def wait(self, timeout_s: float) -> Order | None:
        """The next order, if one comes in time."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return None
        connection, _ = self._socket.accept()
        connection.settimeout(_ORDER_TIMEOUT_S)
        try:
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            with connection.makefile("rb") as lines:
                fields = json.loads(lines.readline(_MAX_ORDER_BYTES))
            if user in (0, os.getuid()) and isinstance(fields, dict):
                return Order(fields, connection)
        except (OSError, ValueError):
            pass
        connection.close()
        return None

    def close(self) -> None:
        self._socket.close()
        for file in (self._file, self._name):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def controlled(state: State) -> Iterator[Control | None]:
    """Make this process known while the block runs. Nothing where the user's folder cannot be written to."""
    try:
        control = Control(state_folder())
        control.remember(state)
    except OSError:
        yield None
        return
    try:
        yield control
    finally:
        with contextlib.suppress(OSError):
            control.close()


def running_services(**wanted: object) -> dict[int, State]:
    """State of every service that runs and has the ``wanted`` values, by process id; the newest first."""
    found: dict[int, State] = {}
    with contextlib.suppress(OSError):
        for file in sorted(state_folder().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.kill(int(file.stem), 0)  # raises when that process is gone
                state = json.loads(file.read_text())
                if all(state.get(name) == value for name, value in wanted.items()):
                    found[int(file.stem)] = state
    return found


def present_endpoint() -> str:
    """gRPC address of the server that ``serve`` started last and that still runs, else the usual port."""
    for state in running_services().values():
        with contextlib.suppress(KeyError):
            return f"{state['host']}:{state['grpc_port']}"
    return f"127.0.0.1:{DEFAULT_PORTS[1]}"


def give_order(pid: int, order: Mapping[str, object], on_event: Callable[[str], None]) -> Mapping[str, Any]:
    """What the service says when it has obeyed. Raises the error that it tells of, ``ChildFailed`` when it is gone."""
    file = state_folder() / f"{pid}.sock"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            with _reachable(file) as name:
                connection.connect(name)
            connection.sendall(json.dumps(order).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    said = json.loads(line)
                    if "event" in said:
                        on_event(said["event"])
                    elif "error" in said:
                        raise _error(said["error"])
                    else:
                        done: Mapping[str, Any] = said["done"]
                        return done
    except (OSError, ValueError):
        pass
    raise ChildFailed(
        "service-gone",
        f"The service with process id {pid} does not answer.",
        why="It ended, or was ended, before it had obeyed.",
        next="See its log, then start it again: `nemobuild serve`.",
    )


def state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "nemobuild" / "serving"


def _error(fields: Mapping[str, Any]) -> NemobuildError:
    kinds = {kind.exit_status: kind for kind in NemobuildError.__subclasses__()}
    kind = kinds.get(fields["exit_status"], NemobuildError)
    return kind(fields["code"], fields["what"], why=fields["why"], next=fields["next"])


@contextlib.contextmanager
def _reachable(file: Path) -> Iterator[str]:
    """A name of ``file`` that is short enough for a socket; 108 bytes are the limit."""
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{file.name}"
    finally:
        os.close(folder)
