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
        self._beginnings = {stop[:length] for stop in self._stops for length in range(1, len(stop))}
        self._first_letters = {stop[0] for stop in self._stops}
        self._longest = max(map(len, self._stops), default=0)
        self.held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The part of all text so far that is newly known to lie before any stop string."""
        if self.hit is not None:
            return ""
        if not self.held and self._first_letters.isdisjoint(text):
            return text
        text = self.held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.hit = min(found)
            self.held = ""
            return text[:at]
        certain = len(text) - self._unsure_length(text)
        self.held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back and turned out not to be a stop string."""
        text, self.held = self.held, ""
        return text

    def _unsure_length(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins some stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if text[-length:] in self._beginnings:
                return length
        return 0
