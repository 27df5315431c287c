"""Last step of the stateless ensemble: each response decoded for itself, as the engine-era templates had it."""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        self.tokenizer = Tokenizer.from_file(str(Path(__file__).resolve().parent / "tokenizer.json"))

    def execute(self, requests):
        return [self._one(request) for request in requests]

    def _one(self, request):
        ids = pb_utils.get_input_tensor_by_name(request, "output_ids").as_numpy().reshape(-1)
        length = int(pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy().item())
        text = self.tokenizer.decode(ids[:length].tolist())
        return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([[text.encode()]], np.object_))])
