"""One response out of the decoupled ``tensorrt_llm``: the middle steps of ``ensemble``.

Triton does not let a step of an ensemble take tensors of a decoupled model together with earlier ones, and
``postprocessing`` needs both. These steps wait for the last response, so the ensemble is an ordinary model: plain
``infer`` works, on gRPC and HTTP.

There are several, because Triton tells a step of an ensemble only when it begins that the client has left (seen in
2.51), or does not begin it. The first step begins the generation and hands out a ticket, each further one waits with it
for as long as the generation has taken by then, and the last one to its end. So what an abandoned request costs is
bounded by what it had cost until then.
"""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor, TimeoutError

import numpy as np
import triton_python_backend_utils as pb_utils

from .common import FINAL, deadline, field_values, parameter, refusal, respond, too_late
from .engine_calls import EngineCalls, EngineError

_FIRST_WAIT_S = 1.0
_GRACE_S = 2.0  # for Triton, to begin the next step


class TritonPythonModel:
    def initialize(self, args):
        self.calls = EngineCalls(parameter(args, "engine_way"))
        self.running = {}
        self.pool = ThreadPoolExecutor(max_workers=256, thread_name_prefix="collect")
        self.waiters = ThreadPoolExecutor(max_workers=256, thread_name_prefix="wait")

    def execute(self, requests):
        for request in requests:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            names, sender = request.requested_output_names(), request.get_response_sender()
            self.waiters.submit(self._one, arrays, field_values(request), names, sender)

    def finalize(self):
        self.calls.close()
        for pool in (self.pool, self.waiters):
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, arrays, values, names, sender):
        try:
            response = respond(names, self._step(arrays, values, sender, is_last="ticket" not in names))
        except Exception as error:
            response = refusal(error)
        sender.send(response, flags=FINAL)

    def _step(self, arrays, values, sender, is_last):
        ticket = arrays["ticket"].item().decode() if "ticket" in arrays else self._begin(arrays, values)
        generation = self.running.get(ticket)
        if generation is None:
            raise EngineError("the generation was given up: nobody asked for its result")
        generation.left = sender.is_cancelled()
        try:
            ids, log_probs = generation.wait(is_last)
        except TimeoutError:
            return [_ticket(ticket)]
        except Exception:
            self.running.pop(ticket, None)
            raise
        if not is_last:
            return [_ticket(ticket)]
        self.running.pop(ticket, None)
        return [
            pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
            pb_utils.Tensor("output_log_probs", np.array([[log_probs]], np.float32)),
        ]

    def _begin(self, arrays, values):
        for ticket, generation in list(self.running.items()):
            if generation.is_cancelled():
                self.running.pop(ticket, None)
        ticket = uuid.uuid4().hex
        generation = self.running[ticket] = Generation()
        generation.result = self.pool.submit(self._collect, arrays, values, generation)
        return ticket

    def _collect(self, arrays, values, generation):
        arrays.pop("timeout_ms", None)
        ids, log_probs = [], []
        with self.calls.call(generation, deadline(values, generation.began)) as call:
            for more_ids, more_log_probs in call.responses(arrays):
                ids += more_ids
                log_probs += more_log_probs
        if call.expired and not call.cancelled:
            raise too_late(values)
        return ids, log_probs


class Generation:
    """A generation that steps wait for, one after another. To ``EngineCalls`` it is who waits for the answer."""

    def __init__(self):
        self.result = None
        self.left = False  # as Triton says
        self.began = self._waited = time.monotonic()
        self._waits = True

    def wait(self, to_the_end):
        """What was generated. Raises ``TimeoutError`` when this step's time is over, and what ended the generation."""
        self._waits = True
        try:
            elapsed_s = time.monotonic() - self.began
            return self.result.result(None if to_the_end else max(_FIRST_WAIT_S, elapsed_s))
        finally:
            self._waited, self._waits = time.monotonic(), False

    def is_cancelled(self):
        """Whether the client left, or no further step was begun."""
        return self.left or (not self._waits and time.monotonic() > self._waited + _GRACE_S)


def _ticket(ticket):
    return pb_utils.Tensor("ticket", np.array([[ticket.encode()]], np.object_))
