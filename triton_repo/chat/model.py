"""The interactive entry: streams answer and reasoning as deltas and keeps the state of each request.

Each request runs in a thread of its own that follows the engine's responses; the work per token is one look-up and a
few string operations.
"""

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .common import FINAL, TextSide, field_values, output_array, output_tensor, refusal, respond
from .engine_calls import ClientWatch
from .lib.runtime.answer import Answer
from .lib.runtime.engine_io import generation_tensors
from .lib.runtime.fields import RequestError
from .lib.runtime.wire import output_tokens

# The engine streams even when the client wants one response: a stop string must end the work early.
_STREAMING = {"streaming": np.ones((1, 1), np.bool_)}


class TritonPythonModel:
    def initialize(self, args):
        self.text = TextSide()
        self.watch = ClientWatch()
        limit = self.text.settings.limits.max_concurrent_requests
        self.slots = threading.BoundedSemaphore(limit)
        self.pool = ThreadPoolExecutor(max_workers=limit, thread_name_prefix="chat")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                values = field_values(request)
                if not self.slots.acquire(blocking=False):
                    raise RequestError("chat", "the server is busy, try again later")
            except Exception as error:
                sender.send(refusal(error), flags=FINAL)
                continue
            self.pool.submit(self._serve, values, request.requested_output_names(), sender)

    def finalize(self):
        self.watch.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, values, names, sender):
        try:
            with self.watch.call(sender, uuid.uuid4().hex) as call:
                last = self._follow(self.text.parse(values), names, call, sender)
        except Exception as error:
            last = refusal(error)
        finally:
            self.slots.release()
        sender.send(last, flags=FINAL)

    def _follow(self, request, names, call, sender):
        """Send a delta for each engine response that brings one; return the last response."""
        answer = Answer(
            self.text.vocabulary,
            self.text.settings.reasoning,
            start=request.prompt.start,
            stops=request.stop_words,
            end_ids=request.end_ids,
            tools=request.tools,
        )
        held = _Outputs(names, request.prompt.text if request.echo_prompt else "")
        generated = 0
        for response in call.responses(generation_tensors(request, self.text.tokenizer) | _STREAMING):
            ids = output_tokens(output_array(response, "output_ids"), output_array(response, "sequence_length"))
            generated += len(ids)
            if answer.stopped:
                continue  # what the engine had under way when it was told to stop
            held.add(answer.push(ids), output_array(response, "output_log_probs") if request.return_log_probs else None)
            if answer.stopped:
                call.stop()
            if request.stream and held and not call.cancelled:
                sender.send(held.take())
        held.add(answer.finish())
        reason = answer.finish_reason(cancelled=call.cancelled, limit=generated >= request.max_tokens)
        counts = {
            "finish_reason": reason,
            "prompt_tokens": len(request.prompt.ids),
            "reasoning_tokens": answer.reasoning_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        return held.take(counts | ({"cum_log_probs": held.cum_log_probs} if request.return_log_probs else {}))


class _Outputs:
    """What is ready for the client and not sent yet."""

    def __init__(self, names, text):
        self.names = names
        self.answer, self.reasoning, self.tool_calls, self.log_probs = text, "", [], []
        self.cum_log_probs = 0.0

    def __bool__(self):
        return bool(self.answer or self.reasoning or self.tool_calls)

    def add(self, delta, log_probs=None):
        self.answer += delta.answer
        self.reasoning += delta.reasoning
        self.tool_calls += delta.tool_calls
        if log_probs is not None:
            self.log_probs += log_probs.reshape(-1).tolist()
            self.cum_log_probs += float(log_probs.sum())

    def take(self, more=None):
        values = {"text_output": self.answer, "reasoning_output": self.reasoning, **(more or {})}
        if self.tool_calls:
            values["tool_calls"] = json.dumps(self.tool_calls, ensure_ascii=False)
        if self.log_probs:
            values["output_log_probs"] = self.log_probs
        self.answer, self.reasoning, self.tool_calls, self.log_probs = "", "", [], []
        return respond(self.names, [output_tensor(name, value) for name, value in values.items()])
