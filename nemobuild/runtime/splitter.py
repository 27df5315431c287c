"""Split a model's raw text into reasoning, answer and tool calls while it streams.

The tags of this family are ordinary text of several tokens, and their last character often shares a token with what
follows, so the split works on text, never on token ids. The law: the parts, joined in order, are the raw text, for
every way to cut the stream. Tags are parts too.

The caller says how the prompt ended: ``answer`` (reasoning is off, or the model has none), ``maybe`` (the model
writes the opening tag itself if it reasons) or ``reasoning`` (the prompt already opened it). A tool-call tag counts
only in the answer; quoted inside the reasoning it is reasoning. The first closing tag ends a part, quoted or not.
"""

from __future__ import annotations

from typing import NamedTuple

from .settings import ReasoningPolicy

REASONING, ANSWER, TOOL, TAG = "reasoning", "answer", "tool", "tag"
MAYBE = "maybe"


class Part(NamedTuple):
    kind: str
    text: str


class Splitter:
    """State machine of one answer. ``tools`` says whether tool-call blocks are looked for."""

    def __init__(self, policy: ReasoningPolicy, start: str, *, tools: bool = False) -> None:
        # State -> the tag that ends it, and the state after it.
        self._ends = {REASONING: (policy.close_tag, ANSWER), TOOL: (policy.tool_close_tag, ANSWER)}
        self._ends[ANSWER] = (policy.tool_open_tag if tools else "", TOOL)
        self._open_tag = policy.open_tag
        self.held = ""
        self.state = start if policy.open_tag else ANSWER

    def push(self, text: str) -> list[Part]:
        """Parts that are certain now. A possible beginning of a tag is held back."""
        self.held += text
        parts: list[Part] = []
        while self.held and self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest, when no more text will come: half a tag is kept as what it stands in."""
        text, self.held = self.held, ""
        kind = ANSWER if self.state == MAYBE else self.state
        return [Part(kind, text)] if text else []

    def _step(self, parts: list[Part]) -> bool:
        """Consume from the held text; ``False`` when more text is needed first."""
        if self.state == MAYBE:
            return self._open(parts)
        text = self.held
        tag, after = self._ends[self.state]
        if not tag or tag[0] not in text:  # by far the most frequent case
            parts.append(Part(self.state, text))
            self.held = ""
            return False
        at = text.find(tag)
        if at < 0:
            certain = len(text) - overlap(text, tag)
            if certain:
                parts.append(Part(self.state, text[:certain]))
            self.held = text[certain:]
            return False
        if at:
            parts.append(Part(self.state, text[:at]))
        parts.append(Part(TAG, tag))
        self.held = text[at + len(tag) :]
        self.state = after
        return True

    def _open(self, parts: list[Part]) -> bool:
        """White space before the opening tag belongs to the tag; anything else means there is no reasoning."""
        tag = self._open_tag
        body = self.held.lstrip()
        if body.startswith(tag):
            length = len(self.held) - len(body) + len(tag)
            parts.append(Part(TAG, self.held[:length]))
            self.held = self.held[length:]
            self.state = REASONING
            return True
        if tag.startswith(body):  # also when body is empty
            return False
        self.state = ANSWER
        return True


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    at = text.find(tag[0], max(0, len(text) - len(tag) + 1))
    while at >= 0 and not tag.startswith(text[at:]):
        at = text.find(tag[0], at + 1)
    return len(text) - at if at >= 0 else 0
