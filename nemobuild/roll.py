"""``roll`` and ``rollback``: what they want of the process that serves, and of the store.

A rollback changes the pointer of the store last. Whatever kills it, typing it again does the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemobuild.config import load_profile
from nemobuild.errors import UsageError
from nemobuild.pipeline import restore
from nemobuild.places import check_owner, profile_name
from nemobuild.serving.control import give_order, running_services
from nemobuild.serving.rolling import Wanted
from nemobuild.serving.run import folder_of
from nemobuild.store import Publication, Store

DRAIN_LIMIT_S = 300.0
OnEvent = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RolledBack:
    """``rolled`` is what the running service did, if there is one."""

    before: int
    now: int
    rolled: Mapping[str, Any] | None


def roll(
    profile: str,
    *,
    room: Wanted = "auto",
    drain_limit_s: float = DRAIN_LIMIT_S,
    on_event: OnEvent = lambda text: None,
) -> Mapping[str, Any]:
    """Bring the running service of ``profile`` to its current publication; what it did, see ``serving.rolling``.

    Raises ``UsageError`` when there is no publication or no such service, ``VerificationFailed`` when the version is
    broken and the one before serves again.
    """
    load_profile(profile)
    check_owner(profile)
    pid = service_of(profile)
    if pid is None:
        raise UsageError(
            "not-serving", f"No service of {profile} runs.", next=f"Start one: `nemobuild serve {profile} --openai`."
        )
    return _order(pid, _current(profile), room, drain_limit_s, on_event)


def rollback(
    profile: str,
    number: int | None = None,
    *,
    room: Wanted = "auto",
    drain_limit_s: float = DRAIN_LIMIT_S,
    on_event: OnEvent = lambda text: None,
) -> RolledBack:
    """Go back to publication ``number``, by default the one before the current: service, places, store, in this order.

    Raises as ``roll`` does; then store and places are as they were.
    """
    load_profile(profile)
    check_owner(profile)
    name, store, current = profile_name(profile), Store(), _current(profile)
    chosen = _earlier(store, current) if number is None else _numbered(store, name, number)
    pid = service_of(profile)
    rolled = None if pid is None else _order(pid, chosen, room, drain_limit_s, on_event)
    on_event(f"restoring {', '.join(chosen.keys)} of version {chosen.number}")
    restore(profile, chosen)
    store.make_current(name, chosen.number)
    return RolledBack(current.number, chosen.number, rolled)


def service_of(profile: str) -> int | None:
    """Process id of the service of ``profile``, if one runs. Raises ``UsageError`` when there are several."""
    found = running_services(folder=folder_of(profile))
    if len(found) > 1:
        raise UsageError(
            "several-services",
            f"{len(found)} services of {profile} run.",
            why=f"Their process ids are {', '.join(map(str, found))}.",
            next="Stop all but one, then run the same command again.",
        )
    return next(iter(found), None)


def _order(pid: int, chosen: Publication, room: Wanted, drain_limit_s: float, on_event: OnEvent) -> Mapping[str, Any]:
    order = {"number": chosen.number, "room": room, "drain_limit_s": drain_limit_s}
    return give_order(pid, order, on_event)


def _current(profile: str) -> Publication:
    current = Store().current(profile_name(profile))
    if current is None:
        raise UsageError(
            "nothing-published",
            f"No version of {profile} was published.",
            next=f"Type `nemobuild up {profile}` or `nemobuild rebuild {profile}`.",
        )
    return current


def _earlier(store: Store, current: Publication) -> Publication:
    found = [one for one in store.publications(current.profile) if one.number < current.number]
    if not found:
        raise UsageError(
            "nothing-before",
            f"Version {current.number} of {current.profile} is the first.",
            next="See `nemobuild store ls`.",
        )
    return max(found, key=lambda one: one.number)


def _numbered(store: Store, name: str, number: int) -> Publication:
    known = {one.number: one for one in store.publications(name)}
    if number not in known:
        raise UsageError(
            "no-publication",
            f"{name} has no version {number}.",
            why=f"It has {', '.join(map(str, known)) or 'none'}.",
        )
    return known[number]
