"""One response out of the decoupled ``tensorrt_llm``: the middle step of ``ensemble``.

Triton does not let a step of an ensemble take tensors of a decoupled model together with earlier ones, and
``postprocessing`` needs both. This step waits for the last response, so the ensemble is an ordinary model: plain
``infer`` works, on gRPC and HTTP.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils

from .common import FINAL, parameter, refusal, respond
from .engine_calls import EngineCalls


class TritonPythonModel:
    def initialize(self, args):
        self.calls = EngineCalls(parameter(args, "engine_way"))
        self.pool = ThreadPoolExecutor(max_workers=256, thread_name_prefix="collect")

    def execute(self, requests):
        for request in requests:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            names = request.requested_output_names()
            self.pool.submit(self._one, arrays, names, request.get_response_sender())

    def finalize(self):
        self.calls.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, arrays, names, sender):
        try:
            response = respond(names, self._collect(arrays, sender))
        except Exception as error:
            response = refusal(error)
        sender.send(response, flags=FINAL)

    def _collect(self, arrays, sender):
        ids, log_probs = [], []
        with self.calls.call(sender) as call:
            for more_ids, more_log_probs in call.responses(arrays):
                ids += more_ids
                log_probs += more_log_probs
        return [
            pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
            pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
            pb_utils.Tensor("output_log_probs", np.array([[log_probs]], np.float32)),
        ]
