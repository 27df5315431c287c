"""What the adapters of this repository share: tensors to plain values and back, and the text side loaded from disk."""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from .lib.runtime.detokenizer import Vocabulary
from .lib.runtime.fields import INPUTS, OUTPUTS, RequestError
from .lib.runtime.prompt import PromptBuilder
from .lib.runtime.request import parse_request, with_parameters
from .lib.runtime.settings import load_settings
from .lib.runtime.template import ChatTemplate

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_NUMPY = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}
_OUTPUT = {field.name: field for field in OUTPUTS}


class TextSide:
    """Tokenizer, template and settings of the model, from ``assets/`` beside this file."""

    def __init__(self):
        assets = Path(__file__).resolve().parent / "assets"
        self.settings = load_settings(assets / "runtime.json")
        self.tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocabulary = Vocabulary(self.tokenizer)
        template = assets / "chat_template.jinja"
        chat = ChatTemplate(template.read_text(encoding="utf-8")) if template.exists() else None
        self.builder = PromptBuilder(self.tokenizer, self.settings, chat)

    def parse(self, values):
        return parse_request(values, self.settings, self.builder)


def parameter(args, name):
    """A parameter of the model's configuration, as text."""
    return json.loads(args["model_config"])["parameters"][name]["string_value"]


def field_values(request):
    """Plain values of the fields that the client sent, as tensors or as request parameters."""
    values = {}
    for field in INPUTS:
        tensor = pb_utils.get_input_tensor_by_name(request, field.name)
        if tensor is None:
            continue
        flat = tensor.as_numpy().reshape(-1)
        if field.is_list:
            values[field.name] = [_text(field.name, item) for item in flat]
        elif flat.size != 1:
            raise RequestError(field.name, f"{flat.size} values, one is needed")
        else:
            values[field.name] = _text(field.name, flat[0]) if field.type == "STRING" else flat[0].item()
    values = with_parameters(values, json.loads(request.parameters() or "{}"))
    if request.timeout():  # Triton's own, in microseconds
        values.setdefault("timeout_ms", -(-request.timeout() // 1000))
    return values


def deadline(values, arrived):
    """When the answer must be whole (``time.monotonic``), if ever."""
    return arrived + values["timeout_ms"] / 1000 if "timeout_ms" in values else None


def too_late(values):
    return TooLate(f"timeout_ms: the answer was not whole after {values['timeout_ms']} ms")


def respond(request_names, tensors):
    """A response with those of ``tensors`` that the client asked for.

    Triton would drop the others itself, but without holding Python's lock, which crashes the interpreter.
    """
    return pb_utils.InferenceResponse([tensor for tensor in tensors if tensor.name() in request_names])


def output_tensor(name, value):
    """A response tensor of shape (1, 1), or (1, n) for a list."""
    field = _OUTPUT[name]
    items = value if isinstance(value, list) else [value]
    if field.type == "STRING":
        return pb_utils.Tensor(name, np.array([[item.encode("utf-8") for item in items]], dtype=np.object_))
    return pb_utils.Tensor(name, np.array([items], dtype=_NUMPY[field.type]))


class Busy(Exception):
    """All places are taken; the same request may pass later."""


class TooLate(Exception):
    """The request's deadline passed."""


# Kind of error -> name of Triton's code; the codes themselves are not there yet while modules load.
_CODES = {RequestError: "INVALID_ARG", Busy: "UNAVAILABLE", TooLate: "UNAVAILABLE"}


def refusal(error):
    """A response that tells the client what is wrong: its own fault, no place or time for it, or else our failure."""
    if type(error) in _CODES:
        code = getattr(pb_utils.TritonError, _CODES[type(error)])
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))
    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"internal error: {error}"))


def _text(name, item):
    if isinstance(item, str):
        return item
    try:
        return bytes(item).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(name, f"not valid UTF-8 ({error.reason} at byte {error.start})") from error
