"""Calls from a step of this repository to the ``tensorrt_llm`` model: stream its responses, and stop it."""

import contextlib
import threading
import time
import uuid
from collections import deque

import numpy as np
import triton_python_backend_utils as pb_utils

ENGINE = "tensorrt_llm"
_ONE = np.ones((1, 1), np.int32)
_STOP = {"input_ids": _ONE, "input_lengths": _ONE, "request_output_len": _ONE, "stop": np.ones((1, 1), np.bool_)}
# What engines say when they take no more: those in Python, and Triton's own queue in front of the C++ backend.
_BUSY = ("the engine is busy", "maximum queue size")

# Triton drops its own reference to a finished iterator in a thread that does not hold Python's lock. Were that the
# last one, the interpreter would crash (seen on Python 3.12), so ours outlive it. Not by much: an iterator holds all
# of its responses, in shared memory.
_OUTLIVED_S = 5.0
_FINISHED = deque()


class EngineError(RuntimeError):
    """The engine failed; the text is the engine's own."""


class EngineBusy(EngineError):
    """The engine takes no more requests at present."""


class Call:
    """The generations of one request, one after another. ``cancelled``: its client went away. ``expired``: too late."""

    def __init__(self, sender, deadline):
        self.sender, self.deadline = sender, deadline
        self.cancelled = self.expired = False
        self._running = self._stopped = None

    @property
    def over(self):
        """Nobody waits for more."""
        return self.cancelled or self.expired

    def responses(self, arrays, outputs):
        """Output tensors of each engine response, in order. ``arrays``: name -> array with its batch axis."""
        self._running = uuid.uuid4().hex
        iterator = _exec(self._running, arrays, outputs)
        try:
            for response in iterator:
                tensors = response.output_tensors()
                if tensors:
                    yield tensors
                elif response.has_error():
                    raise _explained(response.error().message())
        finally:
            _outlive(iterator)

    def stop(self):
        """End the present generation early, once; the engine then sends its last response as usual."""
        running = self._running
        if running in (None, self._stopped):
            return
        self._stopped = running
        iterator = _exec(running, _STOP, ["output_ids"])
        for _ in iterator:
            pass
        _outlive(iterator)


def _exec(request_id, arrays, outputs):
    request = pb_utils.InferenceRequest(
        model_name=ENGINE,
        request_id=request_id,
        requested_output_names=outputs,
        inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
    )
    return request.exec(decoupled=True)


def _outlive(iterator):
    now = time.monotonic()
    _FINISHED.append((now, iterator))
    with contextlib.suppress(IndexError):  # another thread was faster
        while _FINISHED[0][0] < now - _OUTLIVED_S:
            _FINISHED.popleft()


def _explained(message):
    return EngineBusy(message) if any(words in message for words in _BUSY) else EngineError(message)


class ClientWatch:
    """Looks for clients that went away and for deadlines that passed, and stops what still runs for them.

    A step waits inside the engine's iterator and cannot look for itself; one thread looks for all. It never asks
    about a sender that may have sent its last response: Triton frees that sender, and asking would crash the server.
    """

    def __init__(self, period_s=0.2):
        self._period_s = period_s
        self._calls = set()
        self._asking = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def call(self, sender, deadline=None):
        """A ``Call`` that is stopped if ``sender``'s client goes away, or at ``deadline`` (``time.monotonic``)."""
        call = Call(sender, deadline)
        with self._asking:
            self._calls.add(call)
        try:
            yield call
        finally:
            with self._asking:
                self._calls.discard(call)

    def close(self):
        """Before the interpreter ends: afterwards Triton's memory is gone, and with it what these would touch."""
        self._closed.set()
        self._thread.join()
        _FINISHED.clear()

    def _run(self):
        while not self._closed.wait(self._period_s):
            with self._asking:
                calls = list(self._calls)
            for call in calls:
                try:
                    self._look(call)
                except Exception as error:
                    pb_utils.Logger.log_error(f"cannot stop a generation: {error}")

    def _look(self, call):
        with self._asking:
            if call not in self._calls:
                return
            call.expired = call.expired or (call.deadline is not None and time.monotonic() > call.deadline)
            call.cancelled = call.cancelled or call.sender.is_cancelled()
        if call.over:  # asked each time: a further generation may have begun just before
            call.stop()
