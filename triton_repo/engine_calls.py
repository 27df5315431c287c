"""Calls from a step of this repository to the ``tensorrt_llm`` model: follow a generation, and stop it.

An engine in Python is called by the direct way of ``lane``. Any other, such as the backend in C++, is called as every
client of this server calls it, over gRPC.
"""

import contextlib
import itertools
import os
import queue
import socket
import threading
import time
import uuid
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from .lane import Messages, address, end_with_server

ENGINE = "tensorrt_llm"
# What engines say when they take no more: those in Python, and Triton's own queue in front of the C++ backend.
_BUSY = ("the engine is busy", "maximum queue size")
_GRACE_S = 2.0  # for an engine that was told to stop
_PROGRESS_TIMEOUT_S = 10.0
_TRITON_TYPES = {"int32": "INT32", "uint64": "UINT64", "float32": "FP32", "bool": "BOOL"}
_GONE = {"error": "the engine ended"}


class EngineError(RuntimeError):
    """The engine failed; the text is the engine's own."""


class EngineBusy(EngineError):
    """The engine takes no more requests at present."""


class EngineCalls:
    """The way to the engine, ``lane`` or ``grpc``, and a look at the clients of all calls that run.

    A step waits for tokens and cannot look for itself; one thread looks for all. It never asks about a sender that may
    have sent its last response: Triton frees that sender, and asking would crash the server.
    """

    def __init__(self, way, period_s=0.2):
        end_with_server()
        self._engine = {"lane": LaneEngine, "grpc": GrpcEngine}[way]()
        self._period_s = period_s
        self._calls = set()
        self._asking = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="client-watch", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def call(self, sender=None, deadline=None):
        """A ``Call`` that is stopped if ``sender``'s client goes away, or at ``deadline`` (``time.monotonic``)."""
        call = Call(self._engine, sender, deadline)
        with self._asking:
            self._calls.add(call)
        try:
            yield call
        finally:
            with self._asking:
                self._calls.discard(call)

    def give_up(self, why):
        """End all calls with an ``EngineError``: the engine hangs."""
        with self._asking:
            calls = list(self._calls)
        for call in calls:
            call.end({"error": why})

    def progress(self):
        """A value that changes while the engine works, for whomever; ``None`` when it does not answer."""
        try:
            return self._engine.progress(_PROGRESS_TIMEOUT_S)
        except Exception:
            return None

    def close(self):
        """Before the interpreter ends: afterwards Triton's memory is gone, and with it what this would touch."""
        self._closed.set()
        self._thread.join()
        self._engine.close()

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
        now = time.monotonic()
        with self._asking:
            if call not in self._calls:
                return
            call.expired = call.expired or (call.deadline is not None and now > call.deadline)
            call.cancelled = call.cancelled or (call.sender is not None and call.sender.is_cancelled())
        if call.over:  # asked each time: a further generation may have begun just before
            call.over_since = call.over_since or now
            call.stop()
            if now > call.over_since + _GRACE_S:
                call.end({})


class Call:
    """The generations of one request, one after another. ``cancelled``: its client went away. ``expired``: too late."""

    def __init__(self, engine, sender, deadline):
        self.sender, self.deadline = sender, deadline
        self.cancelled = self.expired = False
        self.over_since = None
        self._engine = engine
        self._events = self._running = self._stopped = None

    @property
    def over(self):
        """Nobody waits for more."""
        return self.cancelled or self.expired

    def responses(self, arrays):
        """New ids and their log-probabilities (none if not asked for), what came together at once.

        ``arrays``: name -> array with its batch axis. Raises ``EngineError`` when the engine fails or is gone.
        """
        events = self._events = queue.SimpleQueue()
        running = self._running = self._engine.begin(arrays, events)
        try:
            while True:
                got = [events.get() for _ in range(events.qsize() or 1)]
                ids = [token for tokens, _, _ in got for token in tokens]
                if ids:
                    yield ids, [value for _, log_probs, _ in got for value in log_probs]
                for _, _, end in got:
                    if end is not None:
                        if "error" in end:
                            raise _explained(end["error"])
                        if end.get("reason") == "cancelled" and running != self._stopped:
                            raise EngineError("the engine ended the generation early")
                        return
        finally:
            self._engine.leave(running)

    def stop(self):
        """End the present generation early, once; what it has under way still comes."""
        running = self._running
        if running not in (None, self._stopped):
            self._stopped = running
            self._engine.stop(running)

    def end(self, how):
        """Do not wait for the engine any longer."""
        if self._events is not None:
            self._events.put(((), (), how))


class LaneEngine:
    """An engine in Python of the same server. An event is (ids, log-probabilities, None or how it ended)."""

    def __init__(self):
        self._connecting = threading.Lock()
        self._connection = None

    def begin(self, arrays, events):
        connection = self._connected()
        tensors = {name: array.ravel().tolist() for name, array in arrays.items()}
        return connection, connection.ask({"tensors": tensors}, events)

    def stop(self, running):
        connection, number = running
        connection.stop(number)

    def leave(self, running):
        connection, number = running
        connection.leave(number)

    def progress(self, timeout_s):
        events = queue.SimpleQueue()
        self._connected().ask({"progress": True}, events)
        (tokens,), _, _ = events.get(timeout=timeout_s)
        return tokens

    def close(self):
        if self._connection is not None:
            self._connection.close()

    def _connected(self):
        with self._connecting:
            if self._connection is None or self._connection.closed:
                self._connection = _Connection()
            return self._connection


class _Connection:
    def __init__(self):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address())
        except OSError as error:
            connection.close()
            raise EngineError(f"the engine is not there: {error}") from error
        self.closed = False
        self._messages, self._numbers = Messages(connection), itertools.count()
        self._events, self._changing = {}, threading.Lock()
        threading.Thread(target=self._read, name="lane", daemon=True).start()

    def ask(self, message, events):
        number = next(self._numbers)
        with self._changing:
            self._events[number] = events
        self._send({"id": number} | message)
        if self.closed:
            events.put(((), (), _GONE))
        return number

    def stop(self, number):
        if number in self._events:
            self._send({"id": number})

    def leave(self, number):
        self.stop(number)
        with self._changing:
            self._events.pop(number, None)

    def close(self):
        self._messages.close()

    def _send(self, message):
        with contextlib.suppress(OSError):  # the reader tells all
            self._messages.send(message)

    def _read(self):
        try:
            for events in self._messages:
                for number, ids, log_probs, end in events:
                    waiting = self._events.get(number)
                    if waiting is not None:
                        if end is not None:
                            with self._changing:
                                self._events.pop(number, None)
                        waiting.put((ids, log_probs, end))
        except (OSError, ValueError):
            pass  # closed, perhaps in the middle of a message
        self.closed = True
        with self._changing:
            for waiting in self._events.values():
                waiting.put(((), (), _GONE))
            self._events.clear()


class GrpcEngine:
    """Any engine of the same server, as a client of that server. Cancelling a call stops its generation."""

    def __init__(self):
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._grpc, self._messages = grpc, service_pb2
        self._channel = grpc.insecure_channel(_own_address(), [("grpc.enable_http_proxy", 0)])
        self._triton = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def begin(self, arrays, events):
        request = self._messages.ModelInferRequest(model_name=ENGINE, id=uuid.uuid4().hex)
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, array in arrays.items():
            request.inputs.add(name=name, datatype=_TRITON_TYPES[array.dtype.name], shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        names = ["output_ids", "output_log_probs"] if np.any(arrays.get("return_log_probs", False)) else ["output_ids"]
        for name in names:
            request.outputs.add(name=name)
        call = self._triton.ModelStreamInfer(iter([request]))
        threading.Thread(target=self._read, args=(call, events), name="engine", daemon=True).start()
        return call

    def stop(self, call):
        call.cancel()

    def leave(self, call):
        call.cancel()

    def progress(self, timeout_s):
        """Triton's own counts: of whole generations, and of single responses where the backend reports them."""
        request = self._messages.ModelStatisticsRequest(name=ENGINE)
        return self._triton.ModelStatistics(request, timeout=timeout_s).SerializeToString(deterministic=True)

    def close(self):
        self._channel.close()

    def _read(self, call, events):
        how = _GONE
        try:
            for response in call:
                if response.error_message:
                    how = {"error": response.error_message}
                    break
                result = response.infer_response
                raw = dict(zip((output.name for output in result.outputs), result.raw_output_contents, strict=True))
                if raw:
                    ids = np.frombuffer(raw["output_ids"], np.int32).tolist()
                    events.put((ids, np.frombuffer(raw.get("output_log_probs", b""), np.float32).tolist(), None))
                if result.parameters["triton_final_response"].bool_param:
                    how = {}
                    break
        except self._grpc.RpcError as error:
            cancelled = error.code() == self._grpc.StatusCode.CANCELLED
            how = {} if cancelled else {"error": f"the engine cannot be reached: {error.details()}"}
        call.cancel()
        events.put(((), (), how))


def _own_address():
    """Where this server listens for gRPC, by the command line that started it."""
    pid, given = os.getppid(), {}
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        given = dict(word.split("=", 1) for word in words if word.startswith("--grpc-") and "=" in word)
    host = given.get("--grpc-address", "127.0.0.1")
    if host == "0.0.0.0":
        host = "127.0.0.1"
    return f"{host}:{given.get('--grpc-port', 8001)}"


def _explained(message):
    return EngineBusy(message) if any(words in message for words in _BUSY) else EngineError(message)
