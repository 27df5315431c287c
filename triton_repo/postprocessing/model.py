"""Engine tokens to text, reasoning, tool calls and counts. Last step of ``ensemble``; whole answers only."""

import json

import triton_python_backend_utils as pb_utils

from .common import TextSide, output_tensor, refusal, respond
from .lib.runtime.answer import Answer
from .lib.runtime.wire import output_tokens

_INPUTS = ("output_ids", "sequence_length", "output_log_probs", "answer_context")


class TritonPythonModel:
    def initialize(self, args):
        self.text = TextSide()

    def execute(self, requests):
        return [self._one(request) for request in requests]

    def _one(self, request):
        try:
            arrays = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in _INPUTS}
            context = json.loads(arrays["answer_context"].reshape(-1)[0])
            ids = output_tokens(arrays["output_ids"], arrays["sequence_length"])
            log_probs = arrays["output_log_probs"].reshape(-1).tolist()
            return respond(request.requested_output_names(), self._outputs(ids, log_probs, context))
        except Exception as error:
            return refusal(error)

    def _outputs(self, ids, log_probs, context):
        answer = Answer(
            self.text.vocabulary,
            self.text.settings.reasoning,
            start=context["start"],
            stops=context["stops"],
            end_ids=context["end_ids"],
            tools=context["tools"],
        )
        first, last = answer.push(ids), answer.finish()
        log_probs = log_probs[: answer.completion_tokens]  # the engine may have gone on after a stop string
        values = {
            "text_output": context["echo"] + first.answer + last.answer,
            "reasoning_output": first.reasoning + last.reasoning,
            "tool_calls": json.dumps(answer.calls, ensure_ascii=False),
            "unparsed_tool_call": answer.unparsed_tool_call,
            "finish_reason": answer.finish_reason(limit=len(ids) >= context["max_tokens"]),
            "prompt_tokens": context["prompt_tokens"],
            "reasoning_tokens": answer.reasoning_tokens,
            "completion_tokens": answer.completion_tokens,
            "cum_log_probs": sum(log_probs),
            "output_log_probs": log_probs,
            "token_ids": answer.ids if log_probs else [],
        }
        return [output_tensor(name, value) for name, value in values.items()]
