"""The life of a ``serve``: start, watch, obey, stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from nemobuild.errors import NemobuildError, UsageError
from nemobuild.places import place, profile_name
from nemobuild.serving.control import Control, Order, State, controlled
from nemobuild.serving.rolling import Rolled, roll
from nemobuild.serving.service import Front, Served, Service, published
from nemobuild.store import Store
from nemobuild.triton.launch import Endpoint, Launch, Where

_PERIOD_S = 0.2


def serve_until_stopped(
    served: Served,
    endpoint: Endpoint,
    log: Path,
    *,
    where: Where,
    ready_timeout_s: float,
    on_start: Callable[[Launch, Path], None],
    on_ready: Callable[[Endpoint], None],
    on_roll: Callable[[str], None] = lambda text: None,
    gateway: Front | None = None,
) -> None:
    """Run Triton, and the gateway before it, until SIGINT or SIGTERM; roll when ``nemobuild roll`` asks for it.

    ``on_start`` gets each line that is about to run, and its log; ``on_roll`` hears of each step of a roll. Raises as
    ``running`` does, also when Triton ends by itself later, and ``ChildFailed`` when the gateway cannot live.
    """
    stop, ready = threading.Event(), False
    service = Service(where, ready_timeout_s, log, on_start, stop, gateway)
    with _stopping(stop):
        try:
            service.begin(served, endpoint)
            with controlled(_state(service)) as control:
                on_ready(endpoint)
                ready = True
                while not stop.is_set():
                    service.watch()
                    if control is None:
                        time.sleep(_PERIOD_S)
                    elif order := control.wait(_PERIOD_S):
                        _obey(service, order, control, on_roll)
        except KeyboardInterrupt:
            if not ready:
                raise
        finally:
            service.close()


def folder_of(profile: str) -> str:
    """What two commands call the same profile by."""
    return str(place(profile, "repository").parent.resolve())


def _obey(service: Service, order: Order, control: Control, on_roll: Callable[[str], None]) -> None:
    """Carry out one order, and say how it went. Raises what ended the service."""

    def tell(event: str) -> None:
        on_roll(event)
        order.tell(event)

    with order.connection:
        try:
            rolled = _roll(service, order, tell)
        except NemobuildError as error:
            on_roll(str(error))
            order.failed(error)
            if service.server is None:
                raise
        else:
            control.remember(_state(service))
            order.done(asdict(rolled))


def _roll(service: Service, order: Order, tell: Callable[[str], None]) -> Rolled:
    assert service.server is not None
    served, fields = service.server.served, order.fields
    try:
        number, wanted, drain_limit_s = int(fields["number"]), fields["room"], float(fields["drain_limit_s"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError("bad-order", "The service does not understand the order.", why=f"{error!r}.") from error
    profile = str(served.profile)
    chosen = [one for one in Store().publications(profile_name(profile)) if one.number == number]
    if served.profile is None or not chosen:
        raise UsageError("no-publication", f"The service knows no version {number}.", why=f"It serves {served}.")
    new = service.aside(lambda: published(profile, chosen[0]))
    return roll(service, new, wanted, drain_limit_s, tell)


def _state(service: Service) -> State:
    """What is written down for other commands."""
    assert service.server is not None
    served = service.server.served
    where = {"folder": folder_of(served.profile) if served.profile else None, "number": served.number}
    return asdict(service.server.endpoint) | where | {"repository": str(served.repository.resolve())}


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
