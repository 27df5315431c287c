"""The ``tensorrt_llm`` model on the ``llmapi`` runtime: ``tensorrt_llm.LLM`` on token ids.

``model.yaml`` beside this file holds the arguments of ``LLM`` and, under ``triton_config``, our own. One event loop in
a thread follows all requests. With more than one GPU ``nemobuild serve`` starts this Triton through
``trtllm-llmapi-launch``: the other ranks wait under it, and TLLM_SPAWN_PROXY_PROCESS tells ``LLM`` to use them. In a
Triton that was started without it ``LLM`` starts workers of its own.
"""

import asyncio
import os
import threading
from pathlib import Path

import yaml

from .engine_model import EngineModel
from .lib.engine.request import Chunk, Limits, QueueFull, RequestError, check

# What a launcher's mpirun leaves in the environment. With it, LLM would take itself for a rank of that job.
_MPI_JOB = tuple("OMPI_COMM_WORLD_ OMPI_UNIVERSE_ OMPI_FIRST_ OMPI_APP_CTX_ OMPI_MCA_orte_ ORTE_ PMIX_ PMI_".split())
_MPI_SETTINGS = ("PMIX_MCA_",)  # these say how, not who


class TritonPythonModel(EngineModel):
    def load(self, config):
        folder = Path(__file__).resolve().parent
        arguments = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
        ours = arguments.pop("triton_config")
        if config["model_transaction_policy"]["decoupled"] != ours["decoupled"]:
            raise ValueError("decoupled differs between config.pbtxt and model.yaml")
        arguments["model"] = str(folder / arguments["model"])
        return LlmEngine(arguments, ours)


class LlmEngine:
    """``tensorrt_llm.LLM(**arguments)`` as an engine; ``ours`` is what ``engine_model`` promises beyond it."""

    def __init__(self, arguments, ours):
        for name in list(os.environ):
            if name.startswith(_MPI_JOB) and not name.startswith(_MPI_SETTINGS):
                del os.environ[name]
        # Not before: the import opens the GPUs that are visible now, and its workers inherit that.
        from tensorrt_llm import LLM, SamplingParams

        self._params, self._log_probs = SamplingParams, ours["logprobs"]
        longest = arguments["max_seq_len"]
        self._limits = Limits(ours["vocab_size"], longest, arguments["kv_cache_config"].get("max_tokens", longest))
        self._slots, self._queue = arguments["max_batch_size"], ours["max_queue_size"]
        try:
            self._llm = LLM(**arguments)
        except Exception as error:  # Triton reports one line, and what was wrong often stands in the second
            raise RuntimeError(" ".join(str(error).split())) from error
        self._tasks = {}
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm-loop", daemon=True)
        self._thread.start()

    def submit(self, generation, on_chunk, request_id):
        wanted = check(generation, self._limits)
        if any(len(word) > 1 for word in wanted.bad_words):
            raise RequestError("bad_words", "a word of several tokens is not supported by the llmapi runtime")
        with self._lock:
            if request_id in self._tasks:
                raise RequestError("request_id", f"{request_id!r} is running already")
            if len(self._tasks) >= self._slots + self._queue:
                raise QueueFull(len(self._tasks) - self._slots)
            self._tasks[request_id] = None
            self._loop.call_soon_threadsafe(self._begin, wanted, on_chunk, request_id)

    def cancel(self, request_id):
        """End a request with ``cancelled``; nothing happens when there is none of that id."""
        self._loop.call_soon_threadsafe(self._cancel, request_id)

    def close(self):
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._llm.shutdown()

    def _begin(self, wanted, on_chunk, request_id):
        task = self._loop.create_task(self._follow(wanted, on_chunk))
        self._tasks[request_id] = task
        task.add_done_callback(lambda done: self._end(done, on_chunk, request_id))

    def _cancel(self, request_id):
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    async def _cancel_all(self):
        tasks = [task for task in self._tasks.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, task, on_chunk, request_id):
        # Released first: whoever hears of the end finds the place free.
        with self._lock:
            del self._tasks[request_id]
        if task.cancelled():
            on_chunk(Chunk((), finished=True, finish_reason="cancelled"))
        elif task.exception() is not None:
            on_chunk(Chunk((), finished=True, finish_reason="error", error=f"The engine failed: {task.exception()}."))
        else:
            on_chunk(task.result())

    async def _follow(self, wanted, on_chunk):
        """Hand out all chunks but the last, which is the result."""
        phrases = _Phrases(wanted)
        sent = 0
        result = self._llm.generate_async(list(wanted.input_ids), self._sampling(wanted), streaming=True)
        try:
            async for _ in result:
                output = result.outputs[0]
                new = output.token_ids[sent:]
                log_probs = output.logprobs[sent:] if wanted.return_log_probs else []
                stopped, new = phrases.cut(new)
                sent += len(new)
                values = tuple(_log_prob(entry, token) for token, entry in zip(new, log_probs, strict=False))
                if stopped:
                    return Chunk(tuple(new), values, finished=True, finish_reason="stop_word")
                if result.finished:
                    return _last_chunk(new, values, output)
                if new:
                    on_chunk(Chunk(tuple(new), values))
            raise RuntimeError("the stream ended before its last token")
        finally:
            if not result.finished:
                result.abort()

    def _sampling(self, wanted):
        """Every value is given: where one is missing, newer versions take the model's own default.

        Greedy is top_k 1 at temperature 1, which all versions read so.
        """
        greedy = wanted.temperature == 0
        end_id = wanted.end_ids[0] if wanted.end_ids else -1
        return self._params(
            end_id=end_id,
            pad_id=max(end_id, 0),
            max_tokens=wanted.max_new_tokens,
            min_tokens=wanted.min_new_tokens or None,
            stop_token_ids=[word[0] for word in wanted.stop_words if len(word) == 1] or None,
            bad_token_ids=[word[0] for word in wanted.bad_words] or None,
            include_stop_str_in_output=True,
            temperature=1.0 if greedy else wanted.temperature,
            top_k=1 if greedy else wanted.top_k,
            top_p=1.0 if greedy else wanted.top_p,
            repetition_penalty=wanted.repetition_penalty,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            seed=wanted.seed,
            logprobs=self._log_probs if wanted.return_log_probs else None,
            detokenize=False,
        )


class _Phrases:
    """Stop words of several tokens, which ``LLM`` takes as text only. They may begin in the prompt."""

    def __init__(self, wanted):
        self._phrases = [word for word in wanted.stop_words if len(word) > 1]
        self._longest = max(map(len, self._phrases), default=0)
        self._tail = tuple(wanted.input_ids)

    def cut(self, new):
        """Whether a phrase ends in the ``new`` tokens, and these up to there."""
        for count, token in enumerate(new, 1):
            self._tail = (*self._tail, token)[-self._longest :] if self._phrases else ()
            if any(self._tail[-len(phrase) :] == phrase for phrase in self._phrases):
                return True, new[:count]
        return False, new


def _last_chunk(tokens, log_probs, output):
    if output.finish_reason not in ("stop", "length", "cancelled"):
        raise RuntimeError(f"the request ended with {output.finish_reason!r}")
    ended = "end" if output.stop_reason is None else "stop_word"
    reason = ended if output.finish_reason == "stop" else output.finish_reason
    return Chunk(tuple(tokens), log_probs, finished=True, finish_reason=reason)


def _log_prob(entry, token):
    """Of the sampled token: versions give a number, or a table of the likeliest tokens with it."""
    return float(entry[token].logprob if isinstance(entry, dict) else entry)
