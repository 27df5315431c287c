"""Tokens of one answer to the parts that a client sees: detokenise, stop, split, read tool calls, count, bound.

Used the same way by ``chat`` (a push for every chunk) and by ``postprocessing`` (one push, then the end), so that a
whole answer equals the joined deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .budget import ThinkingBudget
from .detokenizer import Vocabulary
from .settings import ReasoningPolicy
from .splitter import ANSWER, REASONING, TOOL, Part, Splitter
from .stops import StopMatcher
from .tools import ToolDelta, ToolReader


@dataclass(slots=True)
class Delta:
    """What became certain with one push."""

    answer: str = ""
    reasoning: str = ""
    tool_calls: list[ToolDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.answer or self.reasoning or self.tool_calls)


class Answer:
    """State of one answer. After ``finish``, ``finish_reason`` and the counts are final.

    With ``max_thinking_tokens``, look at ``cut`` after each push. When it is true, stop the engine, call
    ``close_reasoning`` and generate on from the prompt and ``ids``, for what is left of ``max_tokens``.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        policy: ReasoningPolicy,
        *,
        start: str,
        stops: Sequence[str],
        end_ids: Sequence[int],
        tools: bool = False,
        max_tokens: int = 0,
        max_thinking_tokens: int | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = vocabulary.stream()
        self._stops = StopMatcher(stops)
        self._splitter = Splitter(policy, start, tools=tools)
        self._policy = policy
        self._end_ids = frozenset(end_ids)
        self._max_tokens = max_tokens
        self._budget = None if max_thinking_tokens is None else ThinkingBudget(max_thinking_tokens, policy.close_tag)
        self._closing = ""
        self._closing_ids: list[int] = []
        self._reader: ToolReader | None = None
        self._next_call = 0
        self._half_call = False
        self.ids: list[int] = []  # what the model wrote, and what was appended for it
        self.calls: list[dict[str, str]] = []  # the whole ones
        self.unparsed_tool_call = False  # text of a call that cannot be read is in the answer
        self.reasoning_tokens = 0
        self.ended = False
        self.cut = False

    @property
    def completion_tokens(self) -> int:
        return len(self.ids)

    @property
    def stopped(self) -> bool:
        """True once a stop string or an end token was met: nothing more is taken."""
        return self.ended or self._stops.hit is not None

    def push(self, ids: Sequence[int]) -> Delta:
        """Take newly generated ``ids``. An end token ends the answer; it counts as generated, but is not text."""
        delta, splitter, stops = Delta(), self._splitter, self._stops
        for token in ids:
            if self.ended or self.cut or stops.hit is not None:
                break
            self.ids.append(token)
            if token in self._end_ids:
                self.ended = True
                break
            before = splitter.state
            text = stops.push(self._detokenizer.push_one(token))
            if text:
                self._take(splitter.push(text), delta)
            if REASONING in (before, splitter.state):
                self.reasoning_tokens += 1
                if self._budget is not None and self.reasoning_tokens >= self._budget.max_tokens:
                    self._watch(self._budget)
        return delta

    def close_reasoning(self) -> Delta:
        """End the reasoning after a ``cut``, in place of the model: the closing tag is now at the end of ``ids``."""
        delta = Delta()
        self.cut, self._budget = False, None
        self._take(self._splitter.push(self._stops.finish() + self._detokenizer.finish()), delta)
        if self._splitter.state == REASONING:  # what was held back may have been the model's own closing tag
            self._detokenizer.push(self._closing_ids)  # their text is known
            self._take(self._splitter.push(self._closing), delta)
            self.ids += self._closing_ids
            self.reasoning_tokens += len(self._closing_ids)
        return delta

    def finish(self) -> Delta:
        """Release all that was held back."""
        delta = Delta()
        if self._stops.hit is None:
            tail = self._stops.push(self._detokenizer.finish()) + self._stops.finish()
            self._take(self._splitter.push(tail), delta)
        self._take(self._splitter.finish(), delta)
        self._end_tool_call(delta, closing_tag="")
        return delta

    def finish_reason(self, *, cancelled: bool = False, limit: bool = False) -> str:
        """``stop``, ``length``, ``tool_calls`` or ``cancelled``. ``limit``: the engine ran out of ``max_tokens``."""
        if cancelled:
            return "cancelled"
        cut_short = limit and not self.stopped
        if self.calls and not (cut_short and self._half_call):
            return "tool_calls"
        return "length" if cut_short else "stop"

    def _watch(self, budget: ThinkingBudget) -> None:
        """Cut if the budget is used up, unless ``max_tokens`` leaves no room for an answer anyway."""
        held = self._splitter.held + self._stops.held
        if self._splitter.state != REASONING or self.stopped:
            return
        if not budget.is_over(self.reasoning_tokens, held, in_character=self._detokenizer.midway):
            return
        self._closing = budget.closing(held)
        self._closing_ids = self._vocabulary.encode(self._closing)
        if len(self.ids) + len(self._closing_ids) < self._max_tokens:
            self.cut = True
        else:
            self._budget = None

    def _take(self, parts: Sequence[Part], delta: Delta) -> None:
        for kind, text in parts:
            if kind == ANSWER:
                delta.answer += text
            elif kind == REASONING:
                delta.reasoning += text
                if self._budget is not None:
                    self._budget.take(text)
            elif kind == TOOL:
                self._read_tool_call(text, delta)
            elif text == self._policy.tool_open_tag:
                self._reader = ToolReader(self._next_call)
            elif self._reader is not None:
                self._end_tool_call(delta, closing_tag=text)

    def _read_tool_call(self, text: str, delta: Delta) -> None:
        """Text of a block as pieces of calls; from where it cannot be read on, it stays in the answer as it is."""
        if self._reader is None or self._reader.broken:
            delta.answer += text
            return
        self._reader.push(text, delta.tool_calls)
        self._show_if_broken(self._reader, delta)

    def _end_tool_call(self, delta: Delta, closing_tag: str) -> None:
        reader, self._reader = self._reader, None
        if reader is None:
            return
        if not reader.broken:
            reader.finish(closed=bool(closing_tag))
            self._show_if_broken(reader, delta)
        if reader.broken:
            delta.answer += closing_tag
            self._half_call = not closing_tag
        self._next_call = reader.next_index
        self.calls += reader.calls

    def _show_if_broken(self, reader: ToolReader, delta: Delta) -> None:
        if reader.broken:
            self.unparsed_tool_call = True
            delta.answer += self._policy.tool_open_tag + reader.unread
