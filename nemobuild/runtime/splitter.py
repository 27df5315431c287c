"""Split a model's raw text into reasoning, answer and tool calls while it streams.

The tags of this family are ordinary text of several tokens, and their last character often shares a token with what
follows, so the split works on text, never on token ids. The law: the parts, joined in order, are the raw text, for
every way to cut the stream. Tags are parts too.

The caller says how the prompt ended: ``answer`` (reasoning is off, or the model has none), ``maybe`` (the model
writes the opening tag itself if it reasons) or ``reasoning`` (the prompt already opened it). A tool-call tag counts
only in the answer; quoted inside the reasoning it is reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass

from .settings import ReasoningPolicy

REASONING, ANSWER, TOOL, TAG = "reasoning", "answer", "tool", "tag"
MAYBE = "maybe"


@dataclass(frozen=True, slots=True)
class Part:
    kind: str
    text: str


class Splitter:
    """State machine of one answer. ``tools`` says whether tool-call blocks are looked for."""

    def __init__(self, policy: ReasoningPolicy, start: str, *, tools: bool = False) -> None:
        self._policy = policy
        self._tools = tools and bool(policy.tool_open_tag)
        self._held = ""
        self.state = start if policy.open_tag else ANSWER

    def push(self, text: str) -> list[Part]:
        """Parts that are certain now. A possible beginning of a tag is held back."""
        self._held += text
        parts: list[Part] = []
        while self._held and self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The rest, when no more text will come: an unclosed tool call or half a tag is kept as what it is."""
        text, self._held = self._held, ""
        kind = ANSWER if self.state == MAYBE else self.state
        return [Part(kind, text)] if text else []

    def _step(self, parts: list[Part]) -> bool:
        """Consume from the held text; ``False`` when more text is needed first."""
        if self.state == MAYBE:
            return self._open(parts)
        tag, after = self._next_tag()
        if not tag:
            parts.append(Part(self.state, self._held))
            self._held = ""
            return False
        at = self._held.find(tag)
        if at >= 0:
            self._emit(parts, self._held[:at])
            parts.append(Part(TAG, tag))
            self._held = self._held[at + len(tag) :]
            self.state = after
            return True
        if self.state == TOOL:
            return False  # a tool call is given whole, so that it can be parsed and repaired
        keep = _overlap(self._held, tag)
        self._emit(parts, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _open(self, parts: list[Part]) -> bool:
        """White space before the opening tag belongs to the tag; anything else means there is no reasoning."""
        tag = self._policy.open_tag
        body = self._held.lstrip()
        if body.startswith(tag):
            length = len(self._held) - len(body) + len(tag)
            parts.append(Part(TAG, self._held[:length]))
            self._held = self._held[length:]
            self.state = REASONING
            return True
        if tag.startswith(body):  # also when body is empty
            return False
        self.state = ANSWER
        return True

    def _next_tag(self) -> tuple[str, str]:
        """The tag that ends the present part, and the part after it."""
        if self.state == REASONING:
            return self._policy.close_tag, ANSWER
        if self.state == TOOL:
            return self._policy.tool_close_tag, ANSWER
        return (self._policy.tool_open_tag, TOOL) if self._tools else ("", ANSWER)

    def _emit(self, parts: list[Part], text: str) -> None:
        if text:
            parts.append(Part(self.state, text))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[len(text) - length :]):
            return length
    return 0
