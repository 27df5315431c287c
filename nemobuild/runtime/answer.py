"""Tokens of one answer to the parts that a client sees: detokenise, stop, split, count.

Used the same way by ``chat`` (a push for every chunk) and by ``postprocessing`` (one push, then the end), so that a
whole answer equals the joined deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .detokenizer import Vocabulary
from .settings import ReasoningPolicy
from .splitter import ANSWER, REASONING, TAG, TOOL, Part, Splitter
from .stops import StopMatcher
from .tools import parse_tool_calls


@dataclass(slots=True)
class Delta:
    """What became certain with one push."""

    answer: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.answer or self.reasoning or self.tool_calls)


class Answer:
    """State of one answer. After ``finish``, ``finish_reason`` and the counts are final."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        policy: ReasoningPolicy,
        *,
        start: str,
        stops: Sequence[str],
        end_ids: Sequence[int],
        tools: bool = False,
    ) -> None:
        self._detokenizer = vocabulary.stream()
        self._stops = StopMatcher(stops)
        self._splitter = Splitter(policy, start, tools=tools)
        self._policy = policy
        self._end_ids = frozenset(end_ids)
        self._tool_tag = ""
        self._calls = 0
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.ended = False

    @property
    def stopped(self) -> bool:
        """True once a stop string or an end token was met: nothing more is taken."""
        return self.ended or self._stops.hit is not None

    def push(self, ids: Sequence[int]) -> Delta:
        """Take newly generated ``ids``. An end token ends the answer; it counts as generated, but is not text."""
        delta = Delta()
        for token in ids:
            if self.stopped:
                break
            self.completion_tokens += 1
            reasoning = self._splitter.state == REASONING
            if token in self._end_ids:
                self.ended = True
                break
            text = self._detokenizer.push((token,))
            if text:
                self._take(self._splitter.push(self._stops.push(text)), delta)
            if reasoning or self._splitter.state == REASONING:
                self.reasoning_tokens += 1
        return delta

    def finish(self) -> Delta:
        """Release all that was held back."""
        delta = Delta()
        if self._stops.hit is None:
            tail = self._stops.push(self._detokenizer.finish()) + self._stops.finish()
            self._take(self._splitter.push(tail), delta)
        self._take(self._splitter.finish(), delta, last=True)
        return delta

    def finish_reason(self, *, cancelled: bool = False, limit: bool = False) -> str:
        """``stop``, ``length``, ``tool_calls`` or ``cancelled``. ``limit``: the engine ran out of ``max_tokens``."""
        if cancelled:
            return "cancelled"
        if self._calls:
            return "tool_calls"
        return "length" if limit and not self.stopped else "stop"

    def _take(self, parts: Sequence[Part], delta: Delta, *, last: bool = False) -> None:
        for part in parts:
            if part.kind == REASONING:
                delta.reasoning += part.text
            elif part.kind == ANSWER:
                delta.answer += part.text
            elif part.kind == TOOL:
                self._take_tool(part.text, delta, closed=not last)
            elif part.kind == TAG and part.text == self._policy.tool_open_tag:
                self._tool_tag = part.text

    def _take_tool(self, body: str, delta: Delta, *, closed: bool) -> None:
        """A tool-call block as calls; one that cannot be read stays in the answer, tags and all."""
        calls = parse_tool_calls(body)
        if calls is None:
            delta.answer += self._tool_tag + body + (self._policy.tool_close_tag if closed else "")
            return
        delta.tool_calls += calls
        self._calls += len(calls)
