"""In-flight batching: requests join and leave a running batch, and every step reads the weights once for all of them.

One thread runs the loop. Each turn it drops cancelled requests, admits waiting ones in the order of their arrival,
runs one packed step (a token of every running stream, and a bounded piece of the prompts that are still being read,
so that a long prompt does not hold the streams up), samples, and hands out the tokens.

A request is admitted when its prompt and all the tokens it may generate fit into the KV pool. The first in the queue
is never overtaken. So there is no eviction, no deadlock and no starvation; the price is room reserved for tokens that
are never made. Callbacks run on the loop's thread: they must be quick, and one that raises ends its own request only.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...errors import UsageError
from ...model.forward import Segment
from ..request import Chunk, FinishReason, Generation, Limits, QueueFull, RequestError, check
from .checkpoint import open_checkpoint
from .runner import Layout, RowPool, Runner
from .sampler import Sampler

log = logging.getLogger(__name__)

OnChunk = Callable[[Chunk], None]
_CLOSED = "The engine was closed."


@dataclass(slots=True, eq=False)
class _Sequence:
    request_id: str
    generation: Generation
    sampler: Sampler
    on_chunk: OnChunk
    is_cancelled: Callable[[], bool] | None
    cancelled: bool = False
    row: int = -1
    past: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens that are not in the cache yet: the rest of the prompt, then the last generated one."""

    @property
    def reserved(self) -> int:
        return len(self.generation.input_ids) + self.generation.max_new_tokens


@dataclass(frozen=True, slots=True)
class Stats:
    """A moment of the engine. ``kv_tokens_used`` counts reserved rows; ``generated_tokens`` since the start."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    generated_tokens: int


class Engine:
    """A checkpoint folder, loaded and running until ``close``."""

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        max_batch_size: int,
        max_context_tokens: int,
        kv_cache_tokens: int,
        max_queue_size: int,
        prefill_chunk_tokens: int = 64,
        layout: Layout = "auto",
    ) -> None:
        """Load the checkpoint and start the loop.

        ``max_batch_size`` requests run at once and ``max_queue_size`` more may wait. ``max_context_tokens`` bounds the
        prompt and the new tokens of one request, ``kv_cache_tokens`` those of all running ones.
        ``prefill_chunk_tokens`` is the most prompt tokens in one step. ``layout`` is how weights are held (``panels``).

        Raises ``IntegrityError`` for a damaged checkpoint, ``DoesNotFit`` for too little memory, ``UsageError`` for a
        limit that the model cannot keep.
        """
        checkpoint = open_checkpoint(Path(checkpoint_dir))
        sizes = {
            "max_batch_size": max_batch_size,
            "max_context_tokens": max_context_tokens,
            "kv_cache_tokens": kv_cache_tokens,
            "prefill_chunk_tokens": prefill_chunk_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise UsageError("bad-limit", f"{name} is {size}; it must be at least 1.")
        if max_queue_size < 0:
            raise UsageError("bad-limit", f"max_queue_size is {max_queue_size}; it must not be negative.")
        longest = checkpoint.spec.max_context_tokens
        if max_context_tokens > longest:
            raise UsageError("bad-limit", f"max_context_tokens is {max_context_tokens}, the model ends at {longest}.")
        self.spec = checkpoint.spec
        self.limits = Limits(checkpoint.spec.vocab_size, max_context_tokens, kv_cache_tokens)
        self.max_batch_size, self.max_queue_size = max_batch_size, max_queue_size
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._runner = Runner(checkpoint, kv_cache_tokens, layout)
        self._pool = RowPool(kv_cache_tokens)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._by_id: dict[str, _Sequence] = {}
        self._ids = itertools.count(1)
        self._generated_tokens = 0
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="nemobuild-cpu-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        generation: Generation,
        on_chunk: OnChunk,
        request_id: str | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> str:
        """Queue a request and return its id. ``on_chunk`` gets its chunks, ``is_cancelled`` is asked every step.

        Raises ``RequestError`` for a bad field, ``QueueFull`` when no more may wait.
        """
        checked = check(generation, self.limits)
        sampler = Sampler(checked, self.limits.vocab_size)
        with self._changed:
            if self._closing:
                raise RequestError("request", "the engine is closed", "engine-closed")
            if len(self._by_id) >= self.max_batch_size + self.max_queue_size:
                raise QueueFull(len(self._waiting))
            name = request_id if request_id is not None else f"request-{next(self._ids)}"
            if name in self._by_id:
                raise RequestError("request_id", f"{name!r} is running already")
            sequence = _Sequence(name, checked, sampler, on_chunk, is_cancelled, pending=list(checked.input_ids))
            self._by_id[name] = sequence
            self._waiting.append(sequence)
            self._changed.notify()
        return name

    def cancel(self, request_id: str) -> bool:
        """End a request with ``cancelled`` at the next step. False when there is none of that id."""
        with self._changed:
            sequence = self._by_id.get(request_id)
            if sequence is not None:
                sequence.cancelled = True
            return sequence is not None

    def stats(self) -> Stats:
        with self._changed:
            used, total = self._pool.used, self._pool.rows
            return Stats(len(self._running), len(self._waiting), used, total, self._generated_tokens)

    def close(self) -> None:
        """Stop the loop after the step it is in. Requests that are left end with ``cancelled``."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._work_left():
                try:
                    self._turn()
                except Exception as error:
                    log.exception("a step of the CPU engine failed; its requests end with an error")
                    for sequence in list(self._running) or list(self._by_id.values()):
                        self._finish(sequence, "error", error=f"The engine failed: {error!r}.")
        finally:
            with self._changed:
                self._closing = True
                left = list(self._by_id.values())
            for sequence in left:
                self._finish(sequence, "cancelled", error=_CLOSED)

    def _work_left(self) -> bool:
        """Wait for work; False when the engine closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._by_id)
            return not self._closing

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        segments: list[Segment] = []
        token_ids: list[int] = []
        last_tokens: list[int] = []
        complete: list[_Sequence] = []
        prefill_left = self._prefill_chunk_tokens
        for sequence in self._running:
            count = len(sequence.pending)
            if sequence.sampler.generated == 0:
                count = min(count, prefill_left)
                prefill_left -= count
            if count == 0:
                continue
            segments.append(Segment(sequence.row, sequence.past, count))
            token_ids += sequence.pending[:count]
            del sequence.pending[:count]
            sequence.past += count
            if not sequence.pending:
                last_tokens.append(len(token_ids) - 1)
                complete.append(sequence)
        if not segments:
            return
        logits = self._runner.step(segments, token_ids, last_tokens)
        for sequence, row in zip(complete, logits, strict=True):
            self._advance(sequence, row)

    def _drop_cancelled(self) -> None:
        with self._changed:
            sequences = list(self._by_id.values())
        for sequence in sequences:
            try:
                gone = sequence.cancelled or (sequence.is_cancelled is not None and sequence.is_cancelled())
            except Exception:
                log.exception("is_cancelled of %s raised; the request is cancelled", sequence.request_id)
                gone = True
            if gone:
                self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        with self._changed:
            while self._waiting and len(self._running) < self.max_batch_size:
                row = self._pool.take(self._waiting[0].reserved)
                if row is None:
                    return
                sequence = self._waiting.popleft()
                sequence.row = row
                self._running.append(sequence)

    def _advance(self, sequence: _Sequence, logits: NDArray[np.float32]) -> None:
        """Sample the next token of ``sequence`` and hand it out."""
        try:
            token, log_prob = sequence.sampler.pick(logits)
        except Exception as error:
            log.exception("sampling for %s failed", sequence.request_id)
            self._finish(sequence, "error", error=f"Sampling failed: {error}.")
            return
        reason = sequence.sampler.accept(token)
        sequence.pending = [token]
        log_probs = () if log_prob is None else (log_prob,)
        with self._changed:
            self._generated_tokens += 1
        if reason is not None:
            self._finish(sequence, reason, (token,), log_probs)
        elif not self._emit(sequence, Chunk((token,), log_probs)):
            self._release(sequence)

    def _finish(
        self,
        sequence: _Sequence,
        reason: FinishReason,
        tokens: tuple[int, ...] = (),
        log_probs: tuple[float, ...] = (),
        error: str = "",
    ) -> None:
        # Released first: whoever hears of the end finds the slot free.
        self._release(sequence)
        self._emit(sequence, Chunk(tokens, log_probs, True, reason, error))

    def _emit(self, sequence: _Sequence, chunk: Chunk) -> bool:
        try:
            sequence.on_chunk(chunk)
        except Exception:
            log.exception("on_chunk of %s raised; the request is cancelled", sequence.request_id)
            return False
        return True

    def _release(self, sequence: _Sequence) -> None:
        with self._changed:
            del self._by_id[sequence.request_id]
            if sequence.row < 0:
                self._waiting.remove(sequence)
            else:
                self._running.remove(sequence)
                self._pool.give(sequence.row, sequence.reserved)
