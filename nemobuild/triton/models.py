"""The six models of an emitted repository as typed records: what goes in, what comes out, how they are wired."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace

from nemobuild.plan.planner import Plan
from nemobuild.runtime.fields import INPUTS, OUTPUTS, Field
from nemobuild.triton.contract import (
    CPP_PARAMETERS,
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    GENERATION_INPUTS,
    GENERATION_OUTPUTS,
    Tensor,
    by_name,
)
from nemobuild.triton.pbtxt import Step, TritonModel

_CONTEXT = Tensor("answer_context", "STRING")
_TICKET = Tensor("ticket", "STRING")
# Each step of the ensemble may wait as long as all before it, from a second on; the last one to the end. Triton looks
# only between steps whether the client is still there: for answers of up to 17 minutes, and then no more.
_COLLECT_STEPS = 12


def repository_models(plan: Plan) -> tuple[TritonModel, ...]:
    """Records of the entry models ``chat`` and ``ensemble``, of what the ensemble's steps run, and of the engine."""
    request = tuple(_field(field, optional=True) for field in INPUTS)
    answer = tuple(_field(field) for field in OUTPUTS)
    # The steps always pass every tensor of a generation, one request at a time.
    generation = tuple(
        replace(t, optional=False, ragged=False, scalar=False) for t in by_name(ENGINE_INPUTS, GENERATION_INPUTS)
    )
    tokens = by_name(ENGINE_OUTPUTS, GENERATION_OUTPUTS)
    timeout = tuple(t for t in request if t.name == "timeout_ms")
    collected = (*(replace(t, optional=True) for t in (*generation, _TICKET)), *timeout)  # a ticket, or all others
    to_text = (*tokens, _CONTEXT)
    way = {"engine_way": "grpc" if plan.profile.runtime == "tensorrt" else "lane"}
    watchdog = {"watchdog_period_s": "10", "watchdog_timeout_s": "30"}
    return (
        TritonModel("chat", request, answer, decoupled=True, parameters=way | watchdog),
        TritonModel("preprocessing", request, (*generation, _CONTEXT)),
        TritonModel("tensorrt_llm_collect", collected, (_TICKET, *tokens), parameters=way),
        TritonModel("postprocessing", to_text, answer),
        TritonModel(
            "ensemble",
            request,
            answer,
            steps=(
                Step("preprocessing", _wires(request), _wires((*generation, _CONTEXT), inner="_")),
                *_collect_steps(_wires(generation, inner="_") | _wires(timeout), tokens),
                Step("postprocessing", _wires(to_text, inner="_"), _wires(answer)),
            ),
        ),
        _engine(plan),
    )


def _collect_steps(fed: dict[str, str], tokens: tuple[Tensor, ...]) -> Iterator[Step]:
    """The steps that wait for one generation: the first is fed with it, the last has its tokens."""
    for at in range(1, _COLLECT_STEPS):
        yield Step("tensorrt_llm_collect", fed, {"ticket": f"_ticket_{at}"})
        fed = {"ticket": f"_ticket_{at}"}
    yield Step("tensorrt_llm_collect", fed, _wires(tokens, inner="_"))


def _engine(plan: Plan) -> TritonModel:
    """The same tensors in all runtimes; what differs is who computes, and where the limits are written."""
    profile = plan.profile
    backend, queue, parameters = "python", None, {}
    if profile.runtime == "cpu":
        engine_limits = {
            "max_batch_size": plan.max_batch_size,
            "max_context_tokens": profile.limits.max_context_tokens,
            "kv_cache_tokens": profile.limits.kv_pool_tokens,
            "max_queue_size": profile.limits.max_queue_size,
        }
        parameters = {"cpu_engine": json.dumps(engine_limits)}
    elif profile.runtime == "tensorrt":
        backend, queue, parameters = "tensorrtllm", profile.limits.max_queue_size, cpp_parameters(plan)
    return TritonModel(
        "tensorrt_llm",
        ENGINE_INPUTS,
        ENGINE_OUTPUTS,
        backend=backend,
        max_batch_size=plan.max_batch_size,
        decoupled=True,
        max_queue_size=queue,
        parameters=parameters,
    )


def cpp_parameters(plan: Plan) -> dict[str, str]:
    """``CPP_PARAMETERS`` and those that the plan decides."""
    parameters = dict(CPP_PARAMETERS)
    if plan.profile.build.kv_cache_fraction is not None:
        parameters["kv_cache_free_gpu_mem_fraction"] = f"{plan.profile.build.kv_cache_fraction:g}"
    if plan.kv_cache_bound is not None:
        parameters["max_tokens_in_paged_kv_cache"] = str(plan.kv_cache_bound)
    if plan.profile.build.weight_streaming:
        parameters["gpu_weights_percent"] = f"{plan.weights_on_gpu:g}"
    return parameters


def _field(field: Field, *, optional: bool = False) -> Tensor:
    return Tensor(field.name, field.type, (-1,) if field.is_list else (1,), optional=optional)


def _wires(tensors: Iterable[Tensor], inner: str = "") -> dict[str, str]:
    """Step tensor -> ensemble tensor; ``inner`` marks names that are not the ensemble's own inputs or outputs."""
    return {tensor.name: inner + tensor.name for tensor in tensors}
