"""The interactive entry: streams answer and reasoning as deltas and keeps the state of each request.

Each request runs in a thread of its own that follows the engine's responses. That is the only hop of a token in
Python: one look-up and a few string operations. See ``outbox`` for how it leaves.
"""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils

from .common import FINAL, Busy, TextSide, TooLate, deadline, field_values, parameter, refusal, too_late
from .engine_calls import EngineBusy, EngineCalls
from .lib.runtime.answer import Answer
from .lib.runtime.engine_io import generation_tensors
from .lib.runtime.fields import BY_NAME, RequestError
from .metrics import Metrics
from .outbox import Outbox, Sender
from .watchdog import Watchdog, one_token

# The engine streams even when the client wants one response: a stop string must end the work early.
_STREAMING = {"streaming": np.ones((1, 1), np.bool_)}
_CAUGHT_UP_S = 0.0002  # a reader that waited so long for the engine has read all that there was
_REASONS = {RequestError: "request", Busy: "busy", TooLate: "timeout"}


class TritonPythonModel:
    def initialize(self, args):
        self.text = TextSide()
        self.metrics = Metrics()
        self.calls = EngineCalls(parameter(args, "engine_way"))
        self.sender = Sender()
        period_s, timeout_s = (float(parameter(args, f"watchdog_{name}_s")) for name in ("period", "timeout"))
        self.watchdog = Watchdog(self._probe, self.calls.progress, self._report, period_s, timeout_s)
        limit = self.text.settings.limits.max_concurrent_requests
        self.slots = threading.BoundedSemaphore(limit)
        self.pool = ThreadPoolExecutor(max_workers=limit, thread_name_prefix="chat")

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            arrived = time.monotonic()
            try:
                values = field_values(request)
                if not self.watchdog.healthy:
                    raise Busy("chat: the engine does not answer at present, try again later")
                if not self.slots.acquire(blocking=False):
                    raise Busy("chat: the server is busy, try again later")
            except Exception as error:
                sender.send(self._refused(request.request_id(), error), flags=FINAL)
                continue
            outbox = Outbox(sender, request.requested_output_names())
            self.pool.submit(self._serve, values, outbox, sender, request.request_id(), arrived)

    def finalize(self):
        self.watchdog.close()
        self.calls.close()
        self.sender.close()
        self.metrics.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, values, outbox, sender, name, arrived):
        pace = _Pace(self.metrics, self.watchdog, arrived)
        try:
            with self.calls.call(sender, deadline(values, arrived)) as call:
                request = self.text.parse(values)
                answer = self._follow(request, outbox, call, pace)
            if call.expired and not call.cancelled:
                raise too_late(values)
            last = outbox.close(self._ended(name, request, answer, call, pace))
        except Exception as error:
            outbox.close()
            last = self._refused(name, Busy(f"chat: {error}") if isinstance(error, EngineBusy) else error)
        finally:
            pace.close()
            self.slots.release()
        sender.send(last, flags=FINAL)

    def _follow(self, request, outbox, call, pace):
        """Put what the engine's tokens mean into ``outbox``, until the last; return the answer's state."""
        answer = Answer(
            self.text.vocabulary,
            self.text.settings.reasoning,
            start=request.prompt.start,
            stops=request.stop_words,
            end_ids=request.end_ids,
            tools=request.tools,
            max_tokens=request.max_tokens,
            max_thinking_tokens=request.max_thinking_tokens,
        )
        if request.echo_prompt:
            outbox.put_text(request.prompt.text)
        self._generate(request, answer, outbox, call, pace)
        if answer.cut and not call.over:
            self.metrics.add("budget_cuts")
            before = len(answer.ids)
            delta = answer.close_reasoning()
            added = answer.ids[before:] if request.return_log_probs else ()
            outbox.put(delta, [0.0] * len(added), added)
            self._generate(request, answer, outbox, call, pace)
        # An engine may also stop at a stop word that the text does not show: a control token, or one that began in the
        # prompt. An engine that fails says so.
        outbox.put(answer.finish())
        return answer

    def _generate(self, request, answer, outbox, call, pace):
        """One generation of the engine, from the prompt and what the answer has already."""
        tensors = generation_tensors(request, self.text.tokenizer, answer.ids) | _STREAMING
        read_at = 0.0
        for ids, log_probs in call.responses(tensors):
            now = time.monotonic()
            if answer.stopped or answer.cut:
                continue  # what the engine had under way when it was told to stop
            before = len(answer.ids)
            delta = answer.push(ids)
            pace.tokens(len(ids), now)
            log_probs = log_probs[: len(answer.ids) - before]
            if answer.stopped or answer.cut:
                call.stop()
            if delta or log_probs:
                outbox.put(delta, log_probs, answer.ids[before:] if log_probs else ())
                if request.stream and not call.over and not self.sender.wake(outbox) and now - read_at > _CAUGHT_UP_S:
                    outbox.idle.wait(timeout=1)
            read_at = time.monotonic()

    def _ended(self, name, request, answer, call, pace):
        """Outputs of the last response; counted and logged."""
        outputs = {
            "finish_reason": answer.finish_reason(
                cancelled=call.cancelled, limit=answer.completion_tokens >= request.max_tokens
            ),
            "prompt_tokens": len(request.prompt.ids),
            "reasoning_tokens": answer.reasoning_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        self.metrics.add("tokens", "prompt", outputs["prompt_tokens"])
        self.metrics.add("tokens", "reasoning", answer.reasoning_tokens)
        self.metrics.add("tokens", "answer", answer.completion_tokens - answer.reasoning_tokens)
        if call.cancelled:
            self.metrics.add("cancellations")
        else:
            self.metrics.add("answers", outputs["finish_reason"])
        _log("answer", request_id=name, **outputs, **pace.milliseconds())
        if not request.stream:
            outputs["tool_calls"] = json.dumps(answer.calls, ensure_ascii=False) if answer.calls else None
        return outputs | {"unparsed_tool_call": answer.unparsed_tool_call}

    def _refused(self, name, error):
        reason = _REASONS.get(type(error), "internal")
        self.metrics.add("refusals", reason)
        field = re.split(r"[.\[]", getattr(error, "field", ""))[0]  # what follows may be a user's own word
        _log("refusal", request_id=name, reason=reason, field=field if field in BY_NAME else None)
        return refusal(error)

    def _probe(self):
        token = self.text.settings.end_token_ids[0] if self.text.settings.end_token_ids else 0
        before = self.calls.progress()
        try:
            with self.calls.call() as call:
                for _ in call.responses(one_token(token)):
                    pass
        except EngineBusy:  # full: it works if those who fill it get on
            time.sleep(1)
            if self.calls.progress() in (None, before):
                raise

    def _report(self, healthy):
        self.metrics.put("healthy", int(healthy))
        if not healthy:
            self.calls.give_up("the engine does not answer")


class _Pace:
    """When the tokens of one request came."""

    def __init__(self, metrics, watchdog, arrived):
        self._metrics, self._watchdog = metrics, watchdog
        self._arrived, self._first, self._last = arrived, None, arrived
        self._between = []
        metrics.add("requests", "waiting")

    def tokens(self, count, now):
        self._watchdog.saw_token()
        if self._first is None:
            self._first = now
            self._metrics.took("first_token", [now - self._arrived])
            self._metrics.add("requests", "waiting", -1)
            self._metrics.add("requests", "running")
            self._between += [0.0] * (count - 1)
        else:
            self._between += [(now - self._last) / count] * count
        self._last = now
        if len(self._between) >= 32:
            self._hand_over()

    def close(self):
        self._hand_over()
        self._metrics.add("requests", "waiting" if self._first is None else "running", -1)

    def milliseconds(self):
        first = self._last if self._first is None else self._first
        return {"first_token_ms": _ms(first - self._arrived), "total_ms": _ms(time.monotonic() - self._arrived)}

    def _hand_over(self):
        self._metrics.took("inter_token", self._between)
        self._between = []


def _ms(seconds):
    return round(1000 * seconds, 1)


def _log(event, **values):
    """One line of JSON. Nothing that a user wrote goes in."""
    pb_utils.Logger.log_info(json.dumps({"event": f"chat.{event}"} | values))
