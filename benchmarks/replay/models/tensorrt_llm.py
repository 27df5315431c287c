"""The ``tensorrt_llm`` model that says given tokens: as fast as it can or at a given pace, one response per token.

``replay.json`` beside this file: ``scripts`` by cue, each ``{"reasoning": ids, "answer": ids}``; ``closed``, the ids
after which the answer follows; ``tokens_per_s`` of each request, 0 for no limit; ``slots`` and ``queue``. The script is
that of the last cue in the prompt. Like an engine with in-flight batching, each step gives every running request one
token. A request whose first token is delayed can be had by a cue with ``delay_s``; one that fails, with ``fail_at``.
"""

import json
import threading
import time
from pathlib import Path

from .engine_model import EngineModel
from .lib.engine.request import Chunk, QueueFull, RequestError

_SILENT = {"reasoning": [], "answer": []}  # without a cue


class TritonPythonModel(EngineModel):
    def load(self, config):
        return ReplayEngine(json.loads((Path(__file__).resolve().parent / "replay.json").read_text()))


class ReplayEngine:
    def __init__(self, told):
        self._scripts = {int(cue): script for cue, script in told["scripts"].items()}
        self._closed, self._slots, self._queue = told["closed"], told["slots"], told["queue"]
        self._period_s = 1 / told["tokens_per_s"] if told["tokens_per_s"] else 0.0
        self._by_id, self._ending = {}, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self._thread.start()

    def submit(self, generation, on_chunk, request_id):
        ids = list(generation.input_ids)
        at = max((i for i, token in enumerate(ids) if token in self._scripts), default=None)
        with self._changed:
            if request_id in self._by_id:
                raise RequestError("request_id", f"{request_id!r} is running already")
            if len(self._by_id) >= self._slots + self._queue:
                raise QueueFull(len(self._by_id) - self._slots)
            script = _SILENT if at is None else self._scripts[ids[at]]
            self._by_id[request_id] = _Run(script, ids[at or 0 :], self._closed, generation, on_chunk)
            self._changed.notify()

    def cancel(self, request_id):
        run = self._by_id.get(request_id)
        if run is not None:
            run.cancelled = True

    def close(self):
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()

    def _run(self):
        due = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._by_id)
                if self._ending:
                    return
                running = list(self._by_id.items())[: self._slots]
            for request_id, run in running:
                chunk = run.step()
                if chunk is not None and chunk.finished:
                    with self._changed:
                        del self._by_id[request_id]
                if chunk is not None:
                    run.on_chunk(chunk)
            due = max(due + self._period_s, time.monotonic() - self._period_s)
            time.sleep(max(0.0, due - time.monotonic()))


class _Run:
    def __init__(self, script, prompt, closed, generation, on_chunk):
        said = any(prompt[i : i + len(closed)] == closed for i in range(len(prompt)))
        self._ids = script["answer"] if said else script["reasoning"] + script["answer"]
        self._ends, self._wanted, self._log_probs = (
            generation.end_ids,
            generation.max_new_tokens,
            generation.return_log_probs,
        )
        self._begin, self._fail_at = time.monotonic() + script.get("delay_s", 0), script.get("fail_at", -1)
        self._loop, self._at = script.get("loop", False), 0
        self.on_chunk, self.cancelled = on_chunk, False

    def step(self):
        if self.cancelled:
            return Chunk((), finished=True, finish_reason="cancelled")
        if time.monotonic() < self._begin:
            return None
        if self._at == self._fail_at:
            return Chunk((), finished=True, finish_reason="error", error="The engine failed: told to.")
        if not self._ids:
            return Chunk(self._ends[:1], (), finished=True, finish_reason="end")
        token = self._ids[self._at % len(self._ids)]
        self._at += 1
        over = self._at == len(self._ids) and not self._loop
        reason = "end" if token in self._ends else "length" if over or self._at == self._wanted else None
        return Chunk((token,), (-0.5,) if self._log_probs else (), finished=reason is not None, finish_reason=reason)
