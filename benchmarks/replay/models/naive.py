"""A front of the engine era in Python: one thread per request, all tokens decoded again at each step."""

import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        self.tokenizer = Tokenizer.from_file(str(Path(__file__).resolve().parent / "tokenizer.json"))
        self.kept = []

    def execute(self, requests):
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            threading.Thread(target=self._serve, args=(inputs, request.get_response_sender()), daemon=True).start()

    def _serve(self, inputs, sender):
        prompt = self.tokenizer.encode(inputs["text_input"].item().decode(), add_special_tokens=False).ids
        tensors = [
            pb_utils.Tensor("input_ids", np.array([prompt], np.int32)),
            pb_utils.Tensor("input_lengths", np.array([[len(prompt)]], np.int32)),
            pb_utils.Tensor("request_output_len", inputs["max_tokens"].astype(np.int32)),
            pb_utils.Tensor("streaming", np.array([[True]])),
            pb_utils.Tensor("exclude_input_in_output", np.array([[True]])),
        ]
        call = pb_utils.InferenceRequest(
            model_name="tensorrt_llm", requested_output_names=["output_ids", "sequence_length"], inputs=tensors
        )
        ids, sent = [], ""
        iterator = call.exec(decoupled=True)
        self.kept.append(iterator)
        for response in iterator:
            arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if not arrays:
                continue
            ids += arrays["output_ids"].reshape(-1)[: int(arrays["sequence_length"].item())].tolist()
            text = self.tokenizer.decode(ids)
            if not text.endswith("�"):
                sender.send(_response(text[len(sent) :]))
                sent = text
        sender.send(_response(self.tokenizer.decode(ids)[len(sent) :]), flags=FINAL)


def _response(text):
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", np.array([[text.encode()]], np.object_))])
