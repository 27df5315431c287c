"""What one ``serve`` owns: the Triton that answers, during a roll another one, and the gateway before them.

All of it is started by the main thread and watched by it: a program that is to end with its starter ends with the
*thread* that started it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nemobuild.errors import UsageError
from nemobuild.gateway import Target
from nemobuild.gateway.process import GatewayProcess, target_of, url_of
from nemobuild.places import is_profile, place, profile_name
from nemobuild.store import Publication, Store
from nemobuild.triton.launch import Endpoint, Launch, Where, choose_launch, read_emitted
from nemobuild.triton.server import choose_endpoint, died, running

_PERIOD_S = 0.1
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Served:
    """A repository to serve. ``number`` is that of the publication it belongs to, of ``profile``."""

    repository: Path
    profile: str | None = None
    number: int | None = None

    def __str__(self) -> str:
        return str(self.repository) if self.number is None else f"version {self.number}"


@dataclass(frozen=True, slots=True)
class Front:
    """The gateway that a service keeps alive. ``on_restart`` is called when it had died."""

    bound: socket.socket
    api_keys: Path | None
    log: Path
    on_restart: Callable[[], None]

    @property
    def url(self) -> str:
        return url_of(self.bound)


@dataclass(slots=True)
class Server:
    """A Triton that has given a token."""

    served: Served
    endpoint: Endpoint
    log: Path
    cards: tuple[int, ...]
    target: Target
    process: subprocess.Popen[bytes]
    ends: contextlib.ExitStack = field(repr=False)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """Stop it with all that it started. Once is enough."""
        self.ends.close()


def find_served(what: str) -> Served:
    """What ``serve`` serves for ``what``: a folder, or a profile's current publication, or its place without one.

    Raises ``IntegrityError`` when the publication is not as it was stored.
    """
    if Path(what).is_dir() or not is_profile(what):
        return Served(Path(what))
    current = Store().current(profile_name(what))
    return published(what, current) if current else Served(place(what, "repository"), what)


def published(profile: str, publication: Publication) -> Served:
    """The repository of a publication, verified. Raises ``IntegrityError`` when it is not as it was stored."""
    store, key = Store(), publication.keys["repository"]
    store.verify("repository", key)
    return Served(store.path("repository", key), profile, publication.number)


class Service:
    """``server`` is the one that answers; ``None`` only before the first, and while a roll has stopped it."""

    def __init__(
        self,
        where: Where,
        ready_timeout_s: float,
        log: Path,
        on_start: Callable[[Launch, Path], None],
        stop: threading.Event,
        front: Front | None,
    ) -> None:
        self.server: Server | None = None
        self.gateway: GatewayProcess | None = None
        self._where, self._ready_timeout_s, self._log, self._on_start = where, ready_timeout_s, log, on_start
        self._stop, self._front = stop, front
        self._first_ports = (0, 0, 0)
        self._starts = 0
        self._ends = contextlib.ExitStack()

    def begin(self, served: Served, endpoint: Endpoint) -> None:
        """Start the first server, and the gateway. Raises what ``running`` and ``GatewayProcess`` do."""
        self._first_ports = endpoint.ports
        self.server = self.start(served, endpoint)
        if self._front is not None:
            front, assets = self._front, _assets(served)
            self.gateway = GatewayProcess(front.bound, endpoint, assets, front.api_keys, front.log)

    def check(self, served: Served, cards: tuple[int, ...] = ()) -> None:
        """Raise what keeps ``served`` from being started here, as far as that can be seen before."""
        assert self.server is not None
        choose_launch(
            read_emitted(served.repository), served.repository, self.server.endpoint, "check", self._where, cards
        )

    def start(self, served: Served, endpoint: Endpoint, cards: tuple[int, ...] = ()) -> Server:
        """A server that gives tokens, and that nobody is sent to yet. Raises what ``running`` does."""
        self._starts += 1
        log = self._log if self._starts == 1 else self._log.with_name(f"{self._log.stem}-{self._starts}.log")
        ends = self._ends.enter_context(contextlib.ExitStack())
        process = ends.enter_context(
            running(
                served.repository,
                endpoint,
                log,
                where=self._where,
                cards=cards,
                ready_timeout_s=self._ready_timeout_s,
                on_start=lambda launch: self._on_start(launch, log),
                on_wait=lambda _: self.watch(),
            )
        )
        # The first is what the gateway was started with.
        target = target_of(self._starts - 1, endpoint, _assets(served))
        return Server(served, endpoint, log, cards, target, process, ends)

    def other_ports(self) -> Endpoint:
        """Ports for a server beside this one: those that were asked for first, when an earlier roll has freed them."""
        assert self.server is not None
        host, first = self.server.endpoint.host, self._first_ports
        with contextlib.suppress(UsageError):
            return choose_endpoint(host, first)
        return choose_endpoint(host, (0, 0, 0))

    def steer(self, server: Server, *, held: bool = False) -> int:
        """Send the gateway's new requests to ``server``, or refuse them; how many earlier ones are not over."""
        return 0 if self.gateway is None else self.gateway.steer(server.target, held=held)

    def drain(self, server: Server, limit_s: float, *, held: bool = False) -> int:
        """``steer``, and wait until the earlier requests are over; how many still are not after ``limit_s``."""
        end_s = time.monotonic() + limit_s
        while (left := self.steer(server, held=held)) and time.monotonic() < end_s:
            self.watch()
            time.sleep(_PERIOD_S)
        return left

    def aside(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which may take long; meanwhile everything is watched."""
        pool = ThreadPoolExecutor(1)
        try:
            future = pool.submit(work)
            while not future.done():
                self.watch()
                wait([future], _PERIOD_S)
            return future.result()
        finally:
            pool.shutdown(wait=False)

    def watch(self) -> None:
        """Start a gateway again that has died.

        Raises ``KeyboardInterrupt`` when everything is to stop, and what ``died`` says when Triton has ended.
        """
        if self._stop.is_set():
            raise KeyboardInterrupt
        server = self.server
        if self.gateway is not None and self.gateway.check() and self._front is not None:
            self._front.on_restart()
        if server is not None and not server.lives:
            raise died(server.process.returncode, read_emitted(server.served.repository), server.log)

    def close(self) -> None:
        """Stop the gateway, then every Triton."""
        try:
            if self.gateway is not None:
                self.gateway.stop()
        finally:
            self._ends.close()


def _assets(served: Served) -> Path:
    return served.repository.resolve() / "chat" / "1" / "assets"
