"""First step of the stateless ensemble: raw text to token ids, as the engine-era templates had it."""

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
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy().item().decode()
        wanted = pb_utils.get_input_tensor_by_name(request, "max_tokens").as_numpy()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        arrays = {
            "input_ids": np.array([ids], np.int32),
            "input_lengths": np.array([[len(ids)]], np.int32),
            "request_output_len": wanted.astype(np.int32),
            "streaming": np.array([[True]]),
            "exclude_input_in_output": np.array([[True]]),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])
