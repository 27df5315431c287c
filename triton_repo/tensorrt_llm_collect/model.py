"""One response out of the decoupled ``tensorrt_llm``: the middle step of ``ensemble``.

Triton does not let a step of an ensemble take tensors of a decoupled model together with earlier ones, and
``postprocessing`` needs both. This step waits for the last response, so the ensemble is an ordinary model: plain
``infer`` works, on gRPC and HTTP.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils

from .common import FINAL, refusal, respond
from .engine_calls import ClientWatch
from .lib.runtime.wire import output_tokens

_OUTPUTS = ["output_ids", "sequence_length", "output_log_probs"]


class TritonPythonModel:
    def initialize(self, args):
        self.watch = ClientWatch()
        self.pool = ThreadPoolExecutor(max_workers=256, thread_name_prefix="collect")

    def execute(self, requests):
        for request in requests:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            names = request.requested_output_names()
            self.pool.submit(self._one, arrays, names, request.get_response_sender())

    def finalize(self):
        self.watch.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, arrays, names, sender):
        try:
            response = respond(names, self._collect(arrays, sender))
        except Exception as error:
            response = refusal(error)
        sender.send(response, flags=FINAL)

    def _collect(self, arrays, sender):
        ids, log_probs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        with self.watch.call(sender) as call:
            for tensors in call.responses(arrays, _OUTPUTS):
                got = {tensor.name(): tensor.as_numpy() for tensor in tensors}
                tokens = output_tokens(got["output_ids"], got["sequence_length"])
                ids.append(np.array(tokens, np.int32))
                log_probs.append(got["output_log_probs"].reshape(-1)[: len(tokens)])
        tokens, probabilities = np.concatenate(ids), np.concatenate(log_probs).astype(np.float32)
        return [
            pb_utils.Tensor("output_ids", tokens[None, None]),
            pb_utils.Tensor("sequence_length", np.array([[tokens.size]], np.int32)),
            pb_utils.Tensor("output_log_probs", probabilities[None, None]),
        ]
