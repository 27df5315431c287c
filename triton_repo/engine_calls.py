"""Calls from a step of this repository to the ``tensorrt_llm`` model: stream its responses, and stop it."""

import contextlib
import threading
from collections import deque

import numpy as np
import triton_python_backend_utils as pb_utils

ENGINE = "tensorrt_llm"
OUTPUTS = ["output_ids", "sequence_length", "output_log_probs"]


# Triton drops its own reference to a finished iterator in a thread that does not hold Python's lock. Were that the
# last one, the interpreter would crash (seen on Python 3.12), so ours outlive it.
_FINISHED = deque(maxlen=1024)


class EngineError(RuntimeError):
    """The engine refused or failed; the text is the engine's own."""


class Call:
    """One running generation. ``cancelled`` turns true when its client went away."""

    def __init__(self, request_id):
        self.request_id = request_id
        self.cancelled = False
        self._stopping = False

    def responses(self, arrays):
        """Engine responses with tensors, in order. ``arrays``: name -> array with its batch axis."""
        for response in self._run(arrays):
            if response.has_error():
                raise EngineError(response.error().message())
            if response.output_tensors():
                yield response

    def stop(self):
        """End the generation early; the engine then sends its last response as usual."""
        if self._stopping:
            return
        self._stopping = True
        one = np.ones((1, 1), np.int32)
        arrays = {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.ones((1, 1), np.bool_)}
        for _ in self._run(arrays):
            pass

    def _run(self, arrays):
        request = pb_utils.InferenceRequest(
            model_name=ENGINE,
            request_id=self.request_id,
            requested_output_names=OUTPUTS,
            inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
        )
        iterator = request.exec(decoupled=True)
        _FINISHED.append(iterator)
        return iterator


class ClientWatch:
    """Looks for clients that went away, and stops what still runs for them.

    A step waits inside the engine's iterator and cannot look for itself; one thread looks for all. It never asks
    about a sender that may have sent its last response: Triton frees that sender, and asking would crash the server.
    """

    def __init__(self, period_s=0.05):
        self._period_s = period_s
        self._calls = {}
        self._asking = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def call(self, sender, request_id):
        """A ``Call`` that is stopped if ``sender``'s client goes away."""
        call = Call(request_id)
        self._calls[request_id] = (call, sender)
        try:
            yield call
        finally:
            with self._asking:
                del self._calls[request_id]

    def close(self):
        """Before the interpreter ends: afterwards Triton's memory is gone, and with it what these would touch."""
        self._closed.set()
        self._thread.join()
        _FINISHED.clear()

    def _run(self):
        while not self._closed.wait(self._period_s):
            for request_id in list(self._calls):
                call = self._find_left(request_id)
                if call is not None:
                    try:
                        call.stop()
                    except Exception as error:
                        pb_utils.Logger.log_error(f"cannot stop {request_id}: {error}")

    def _find_left(self, request_id):
        """The call of that id, if its client has just been found to be gone."""
        with self._asking:
            call, sender = self._calls.get(request_id, (None, None))
            if call is None or call.cancelled or not sender.is_cancelled():
                return None
            call.cancelled = True
            return call
