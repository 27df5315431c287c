"""A bound on the reasoning: when to end it for the model, and with which words.

Past the bound the reasoning may finish its line or sentence, for a tenth more tokens at most; then it is ended where
it stands. The closing tag that the model did not write is appended to what it wrote, and the generation goes on from
there as a raw continuation: the engine has the common beginning in its cache.
"""

from __future__ import annotations

import re

from .splitter import overlap

GRACE_SHARE = 10  # of the budget: one tenth
WAIT_TOKENS = 12  # at most, past the grace, for half a character or half a closing tag to be completed
_TAG_TOKENS = 32  # both tags and the line ends around them, one token for each byte
_TAIL_CHARACTERS = 16
# A full stop after a digit may be the decimal point of a number that goes on, or the mark of a list.
_RESTING_PLACE = re.compile(r"""(?:\n|[。！？।؟…]|(?<!\d)[.!?]["'”’)\]*]{0,3}) {0,2}\Z""")


def longest_reasoning(max_tokens: int) -> int:
    """The most tokens before an answer when ``max_tokens`` of reasoning are allowed, tags included."""
    return max_tokens + max_tokens // GRACE_SHARE + WAIT_TOKENS + _TAG_TOKENS


class ThinkingBudget:
    """Watches the reasoning of one answer. ``max_tokens`` is the bound; with 0 the reasoning ends as it begins."""

    def __init__(self, max_tokens: int, close_tag: str) -> None:
        self.max_tokens = max_tokens
        self._last = max_tokens + max_tokens // GRACE_SHARE
        self._close_tag = close_tag
        self._tail = ""
        self._blank = True

    def take(self, text: str) -> None:
        """Reasoning text that is certain now."""
        self._tail = (self._tail + text)[-_TAIL_CHARACTERS:]
        self._blank = self._blank and not text.strip()

    def is_over(self, tokens: int, held: str, *, in_character: bool) -> bool:
        """End the reasoning after ``tokens`` of it, the bound or more? ``held``: its end that is not certain yet."""
        if in_character or self._close_tag in held or overlap(held, self._close_tag):
            return tokens >= self._last + WAIT_TOKENS
        return tokens >= self._last or _RESTING_PLACE.search(self._tail + held) is not None

    def closing(self, held: str) -> str:
        """What to append: the closing tag on a line of its own, as the model and its template write it."""
        tail = self._tail + held
        line_ends = len(tail) - len(tail.rstrip("\n"))
        blank = self._blank and not held.strip()
        return "\n" * max(0, (2 if blank else 1) - line_ends) + self._close_tag + "\n\n"
