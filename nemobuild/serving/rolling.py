"""Roll a running service to another version, and back by itself when that one is broken.

With room for two, no request fails: the candidate starts beside, is asked the canary's questions, gets all new
requests of the gateway, and the old server is stopped when it has given its last answer. With room for one, the
gateway refuses requests with 503 and Retry-After from the beginning of the drain until the candidate, or the old
version again, answers; that is the downtime. What can be refused is refused before the old server is touched.

Whatever is killed meanwhile: a gateway is started again and does what the last one did; a candidate that ends gives way
to the old server; an old one that ends before the switch ends the service, as always; and all end with the service.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from nemobuild.errors import NemobuildError, UsageError, VerificationFailed
from nemobuild.gates.prompts import Answer
from nemobuild.places import profile_name
from nemobuild.serving.canary import ask_canary, judge_canary
from nemobuild.serving.room import Room, find_room
from nemobuild.serving.service import Served, Server, Service
from nemobuild.store import Store

Wanted = Literal["auto", "one", "two"]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Rolled:
    """What a roll did. ``cut`` requests were not over when ``drain_limit_s`` was, and ended with an error.

    ``downtime_s`` is how long the gateway refused requests; without one, how long no Triton answered.
    """

    before: int | None
    now: int | None
    repository: str
    room: Literal["one", "two", "none"]
    why: str
    start_s: float = 0.0
    drain_s: float = 0.0
    cut: int = 0
    downtime_s: float = 0.0
    log: str = ""


def roll(service: Service, new: Served, wanted: Wanted, drain_limit_s: float, tell: Tell) -> Rolled:
    """Serve ``new`` from now on; ``tell`` hears of each step.

    Raises ``VerificationFailed`` when ``new`` is broken and the version before serves again, which then is the current
    one in the store too; ``UsageError`` when there is not the room that is ``wanted``, and what ``running`` raises when
    nothing serves any more.
    """
    old = _present(service)
    known = Rolled(old.served.number, new.number, str(new.repository), "none", "it is served already")
    if new.repository.resolve() == old.served.repository.resolve():
        return known
    room = _room(service, new, wanted)
    service.check(new, room.cards or old.cards)
    known = replace(known, room=room.slots, why=room.why)
    tell(f"{old.served} -> {new}: room for {room.slots}, since {room.why}")
    before = service.aside(lambda: ask_canary(old.endpoint.grpc_url, old.served.repository))
    steps = _beside if room.slots == "two" else _in_place
    try:
        return steps(service, new, room, before, drain_limit_s, tell, known)
    except _Broken as broken:
        _make_current(old.served, new)
        cause = broken.cause
        downtime = f" Requests were refused for {broken.downtime_s:.1f} s." if broken.downtime_s else ""
        raise VerificationFailed(
            "rolled-back",
            f"The roll to {new} failed; {old.served} serves again.{downtime}",
            why=f"{cause.what} {cause.why}".strip(),
            next=cause.next,
        ) from cause


class _Broken(Exception):
    """The candidate is, for the reason ``cause``; the old server answers."""

    def __init__(self, cause: NemobuildError, downtime_s: float = 0.0) -> None:
        super().__init__(cause)
        self.cause, self.downtime_s = cause, downtime_s


def _beside(
    service: Service, new: Served, room: Room, before: list[Answer], limit_s: float, tell: Tell, known: Rolled
) -> Rolled:
    old, candidate = _present(service), None
    began_s = time.monotonic()
    try:
        candidate = service.start(new, service.other_ports(), room.cards)
        _try(service, candidate, before)
        started_s = time.monotonic()
        tell(f"{new} answers on {candidate.endpoint.grpc_url}; new requests go to it")
        service.steer(candidate)
        service.server = candidate
        cut = service.drain(candidate, limit_s)
    except NemobuildError as error:
        if candidate is not None:
            if old.lives:
                service.steer(old)
                service.server = old
            candidate.stop()
        if not old.lives:
            raise
        raise _Broken(error) from error
    drained_s = time.monotonic()
    tell(f"{old.served} has given its last answer" if not cut else f"{cut} requests to {old.served} are cut off")
    old.stop()
    return replace(known, start_s=started_s - began_s, drain_s=drained_s - started_s, cut=cut, log=str(candidate.log))


def _in_place(
    service: Service, new: Served, room: Room, before: list[Answer], limit_s: float, tell: Tell, known: Rolled
) -> Rolled:
    old, candidate = _present(service), None
    began_s = time.monotonic()
    try:
        cut = service.drain(old, limit_s, held=True)
        drained_s = time.monotonic()
        tell(f"{old.served} stops; until {new} answers, requests are refused")
        service.server = None
        old.stop()
        candidate = service.start(new, old.endpoint, old.cards)
        _try(service, candidate, before)
        service.steer(candidate)
    except NemobuildError as error:
        if candidate is not None:
            candidate.stop()
        if not old.lives:
            tell(f"{new} is broken: {error.what} {old.served} starts again")
            old = service.server = service.start(old.served, old.endpoint, old.cards)
        service.steer(old)
        raise _Broken(error, time.monotonic() - began_s) from error
    service.server = candidate
    downtime_s = time.monotonic() - began_s
    return replace(
        known,
        start_s=downtime_s - (drained_s - began_s),
        drain_s=drained_s - began_s,
        cut=cut,
        downtime_s=downtime_s,
        log=str(candidate.log),
    )


def _try(service: Service, candidate: Server, before: list[Answer]) -> None:
    """The canary. A candidate that ends meanwhile refuses the connection, which is as good a reason."""
    answers = service.aside(lambda: ask_canary(candidate.endpoint.grpc_url, candidate.served.repository))
    judge_canary(answers, before)


def _room(service: Service, new: Served, wanted: Wanted) -> Room:
    old = _present(service)
    if service.gateway is None:
        if wanted == "two":
            raise UsageError(
                "no-gateway",
                "Two servers at once need the gateway before them.",
                why="Clients of Triton itself know its ports, and only one server can have them.",
                next="Serve with --openai, or roll with --room one.",
            )
        return Room("one", "there is no gateway that could lead clients to another port")
    if wanted == "one":
        return Room("one", "it was asked for")
    room = find_room(str(new.profile), new.repository, old.served.repository, old.process.pid)
    return replace(room, slots="two", why=f"it was asked for; {room.why}") if wanted == "two" else room


def _make_current(good: Served, broken: Served) -> None:
    """The version that serves is the one that a later ``serve`` starts."""
    store, name = Store(), profile_name(str(good.profile))
    current = store.current(name)
    if good.number is not None and current is not None and current.number == broken.number:
        store.make_current(name, good.number)


def _present(service: Service) -> Server:
    assert service.server is not None
    return service.server
