"""Fields of a request to engine tensors: check, render, tokenise. First step of ``ensemble``."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils

from .common import TextSide, field_values, refusal, respond
from .lib.runtime.engine_io import generation_tensors
from .lib.runtime.fields import RequestError


class TritonPythonModel:
    def initialize(self, args):
        self.text = TextSide()

    def execute(self, requests):
        return [self._one(request) for request in requests]

    def _one(self, request):
        try:
            parsed = self.text.parse(field_values(request) | {"stream": False})
            if parsed.max_thinking_tokens is not None:
                raise RequestError("max_thinking_tokens", "ensemble runs the engine once and cannot cut; use chat")
            tensors = [pb_utils.Tensor(k, v) for k, v in generation_tensors(parsed, self.text.tokenizer).items()]
            tensors.append(pb_utils.Tensor("answer_context", _context(parsed)))
            return respond(request.requested_output_names(), tensors)
        except Exception as error:
            return refusal(error)


def _context(parsed):
    """What ``postprocessing`` must know of the request, as one JSON string: it keeps no state of its own."""
    context = {
        "start": parsed.prompt.start,
        "stops": parsed.stop_words,
        "end_ids": parsed.end_ids,
        "tools": parsed.tools,
        "max_tokens": parsed.max_tokens,
        "prompt_tokens": len(parsed.prompt.ids),
        "echo": parsed.prompt.text if parsed.echo_prompt else "",
    }
    return np.array([[json.dumps(context).encode()]], dtype=np.object_)
