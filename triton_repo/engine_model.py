"""The ``tensorrt_llm`` model over an engine in Python: the tensors of the C++ backend in, the same tensors out.

An engine has ``submit(generation, on_chunk, request_id)``, ``cancel(request_id)`` and ``close()``, and calls
``on_chunk`` from a thread of its own. Clients of Triton get responses; the models beside this one take the shorter way
of ``lane``. Inputs that would change the result and are not implemented here (beams, LoRA, speculation, guided
decoding, multimodal) are refused when given.
"""

import json
import threading
import uuid

import numpy as np
import triton_python_backend_utils as pb_utils

from .lane import Lane
from .lib.engine.request import Generation, QueueFull, RequestError
from .lib.runtime.wire import unpack_words

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CLIENT_CHECK_PERIOD_S = 0.2

# Input tensor -> argument of ``Generation``.
_ARGUMENTS = {
    "request_output_len": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "temperature": "temperature",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "return_log_probs": "return_log_probs",
}
_OTHERS = {"input_ids", "input_lengths", "end_id", "stop_words_list", "bad_words_list", "stop", "streaming"}
_NO_EFFECT = {"pad_id", "len_penalty", "exclude_input_in_output"}  # one sequence: nothing is padded or ranked
_ONLY_ONE = {"beam_width", "num_return_sequences"}


class EngineModel:
    """Base of the models; ``load`` gives the engine."""

    def load(self, config):
        """The engine of this model, whose Triton configuration is ``config``."""
        raise NotImplementedError

    def initialize(self, args):
        self.engine = self.load(json.loads(args["model_config"]))
        self.lane = Lane(self._submit, self.engine.cancel)
        self.running = set()
        self.closed = threading.Event()
        self.watch = threading.Thread(target=self._watch_clients, name="client-watch", daemon=True)
        self.watch.start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._start(request, sender)
            except QueueFull as error:
                sender.send(_error(error.what, pb_utils.TritonError.UNAVAILABLE), flags=FINAL)
            except RequestError as error:
                sender.send(_error(error.what, pb_utils.TritonError.INVALID_ARG), flags=FINAL)
            except Exception as error:
                sender.send(_error(str(error), pb_utils.TritonError.INTERNAL), flags=FINAL)

    def finalize(self):
        self.closed.set()
        self.watch.join()
        self.lane.close()
        self.engine.close()

    def _submit(self, arrays, on_chunk, request_id):
        self.engine.submit(_generation(arrays), on_chunk, request_id)

    def _start(self, request, sender):
        arrays = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        request_id = request.request_id()
        if "stop" in arrays and arrays["stop"][0]:
            if not request_id:
                raise RequestError("stop", "it needs the id of the request that is to be stopped")
            self.engine.cancel(request_id)
            sender.send(flags=FINAL)
            return
        generation = _generation(arrays)
        echo = () if bool(arrays.get("exclude_input_in_output", [False])[0]) else generation.input_ids
        stream = _Stream(
            sender,
            request_id or uuid.uuid4().hex,
            request.requested_output_names(),
            self.running,
            echo,
            streaming=bool(arrays.get("streaming", [False])[0]),
        )
        self.running.add(stream)
        try:
            self.engine.submit(generation, stream.take, stream.request_id)
        except Exception:
            self.running.discard(stream)
            raise

    def _watch_clients(self):
        """The engine's loop must not ask Triton at every step whether a client is still there."""
        while not self.closed.wait(CLIENT_CHECK_PERIOD_S):
            for stream in list(self.running):
                if stream.client_left():
                    self.engine.cancel(stream.request_id)


class _Stream:
    """Chunks of one request to responses: each as it comes when streaming, else all as one."""

    def __init__(self, sender, request_id, names, running, echo, *, streaming):
        self.sender, self.request_id, self.names, self.running = sender, request_id, names, running
        self.streaming = streaming
        self.tokens, self.log_probs, self.total = list(echo), [], 0.0
        self.lock = threading.Lock()

    def client_left(self):
        """Is the client gone? Never asked after the last response: Triton frees the sender, and would crash."""
        with self.lock:
            return self in self.running and self.sender.is_cancelled()

    def take(self, chunk):
        self.tokens += chunk.tokens
        self.log_probs += chunk.log_probs
        self.total += sum(chunk.log_probs)
        if chunk.finished:
            with self.lock:
                self.running.discard(self)
            if chunk.finish_reason == "error":
                # Apart from the end: Triton loses an error in the middle of a stream on its way to another model, and
                # with it that this was the last response.
                self.sender.send(_error(chunk.error, pb_utils.TritonError.INTERNAL))
                self.sender.send(flags=FINAL)
            else:
                self.sender.send(self._response(), flags=FINAL)
        elif self.streaming:
            self.sender.send(self._response())

    def _response(self):
        tokens, log_probs, self.tokens, self.log_probs = self.tokens, self.log_probs, [], []
        values = {
            "output_ids": ([[tokens]], np.int32),
            "sequence_length": ([[len(tokens)]], np.int32),
            "cum_log_probs": ([[self.total]], np.float32),
            "output_log_probs": ([[log_probs]], np.float32),
        }
        # Only what was asked for: Triton drops the rest without holding Python's lock, which crashes the interpreter.
        wanted = {name: np.array(*values[name]) for name in values if name in self.names}
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in wanted.items()])


def _generation(arrays):
    for name, array in arrays.items():
        if name in _ONLY_ONE and array[0] != 1:
            raise RequestError(name, f"{array[0]} is not supported, only 1")
        if name not in _OTHERS | _NO_EFFECT | _ONLY_ONE and name not in _ARGUMENTS:
            raise RequestError(name, "this input is not supported by this runtime")
    if "input_ids" not in arrays:
        raise RequestError("input_ids", "missing")
    length = int(arrays["input_lengths"][0])
    if not 0 <= length <= arrays["input_ids"].size:
        raise RequestError("input_lengths", f"{length} does not fit {arrays['input_ids'].size} input_ids")
    values = {argument: arrays[name][0].item() for name, argument in _ARGUMENTS.items() if name in arrays}
    end_id = int(arrays["end_id"][0]) if "end_id" in arrays else -1
    return Generation(
        input_ids=arrays["input_ids"][:length].tolist(),
        end_ids=() if end_id < 0 else (end_id,),
        stop_words=unpack_words(arrays["stop_words_list"]) if "stop_words_list" in arrays else (),
        bad_words=unpack_words(arrays["bad_words_list"]) if "bad_words_list" in arrays else (),
        **values,
    )


def _error(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
