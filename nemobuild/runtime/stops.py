"""Stop strings on text, across any cut of the stream: never emitted.

The stop string that is complete first counts, whatever chunks the text comes in; of two that end together, the one
that began first. Text is held back only while it could still be the beginning of a stop string, so the delay is at
most the longest stop string less one character.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Pass text through until the first stop string. ``hit`` is that string, or ``None``."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The part of all text so far that is newly known to lie before any stop string."""
        if not self._stops or self.hit is not None:
            return "" if self.hit is not None else text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self._held = ""
            return text[:at]
        keep = _held_length(text, self._stops, self._longest)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        text, self._held = self._held, ""
        return "" if self.hit is not None else text


def _held_length(text: str, stops: Sequence[str], longest: int) -> int:
    """Length of the longest end of ``text`` that begins some stop string."""
    for length in range(min(len(text), longest - 1), 0, -1):
        tail = text[len(text) - length :]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
