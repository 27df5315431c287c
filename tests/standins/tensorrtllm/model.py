"""A stand-in for the C++ backend ``tensorrtllm``: loads what its parameters name, answers every request with one token.

An engine file that says "built by VERSION" is refused as TensorRT refuses it.
"""

import json
import os
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

TENSORRT = "10.14.1.48"


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        for unguarded in ("executor_worker_path", "guided_decoding_backend", "xgrammar_tokenizer_info_path"):
            parameters[unguarded]["string_value"]
        # A relative path counts from the working folder of the server, which is the parent of this process.
        folder = Path(f"/proc/{os.getppid()}/cwd").resolve() / parameters["gpt_model_path"]["string_value"]
        engine = (folder / "rank0.engine").read_bytes()
        if engine.startswith(b"built by "):
            raise RuntimeError(
                "[TensorRT-LLM][ERROR] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (The engine plan "
                f"file is not compatible with this version of TensorRT, expecting library version {TENSORRT} got "
                f"{engine[9:].decode()}, please rebuild.)"
            )

    def execute(self, requests):
        for request in requests:
            end_id = pb_utils.get_input_tensor_by_name(request, "end_id").as_numpy().reshape(-1)[:1]
            arrays = {
                "output_ids": end_id.astype(np.int32).reshape(1, 1, 1),
                "sequence_length": np.ones((1, 1), np.int32),
                "output_log_probs": np.zeros((1, 1, 1), np.float32),
            }
            names = request.requested_output_names()
            tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items() if name in names]
            request.get_response_sender().send(
                pb_utils.InferenceResponse(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
