"""The six models of an emitted repository as typed records: what goes in, what comes out, how they are wired."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from nemobuild.config import EngineConfig
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


def repository_models(profile: EngineConfig) -> tuple[TritonModel, ...]:
    """Records of the entry models ``chat`` and ``ensemble``, of the ensemble's three steps, and of the engine."""
    request = tuple(_field(field, optional=True) for field in INPUTS)
    answer = tuple(_field(field) for field in OUTPUTS)
    # The steps always pass every tensor of a generation, one request at a time.
    generation = tuple(
        replace(t, optional=False, ragged=False, scalar=False) for t in by_name(ENGINE_INPUTS, GENERATION_INPUTS)
    )
    tokens = by_name(ENGINE_OUTPUTS, GENERATION_OUTPUTS)
    to_text = (*tokens, _CONTEXT)
    return (
        TritonModel("chat", request, answer, decoupled=True),
        TritonModel("preprocessing", request, (*generation, _CONTEXT)),
        TritonModel("tensorrt_llm_collect", generation, tokens),
        TritonModel("postprocessing", to_text, answer),
        TritonModel(
            "ensemble",
            request,
            answer,
            steps=(
                Step("preprocessing", _wires(request), _wires((*generation, _CONTEXT), inner="_")),
                Step("tensorrt_llm_collect", _wires(generation, inner="_"), _wires(tokens, inner="_")),
                Step("postprocessing", _wires(to_text, inner="_"), _wires(answer)),
            ),
        ),
        _engine(profile),
    )


def _engine(profile: EngineConfig) -> TritonModel:
    limits = profile.limits
    if profile.runtime == "cpu":
        engine_limits = {
            "max_batch_size": limits.max_batch_size,
            "max_context_tokens": limits.max_context_tokens,
            "kv_cache_tokens": limits.kv_pool_tokens,
            "max_queue_size": limits.max_queue_size,
        }
        return TritonModel(
            "tensorrt_llm",
            ENGINE_INPUTS,
            ENGINE_OUTPUTS,
            max_batch_size=limits.max_batch_size,
            decoupled=True,
            parameters={"cpu_engine": json.dumps(engine_limits)},
        )
    return TritonModel(
        "tensorrt_llm",
        ENGINE_INPUTS,
        ENGINE_OUTPUTS,
        backend="tensorrtllm",
        max_batch_size=limits.max_batch_size,
        decoupled=True,
        max_queue_size=limits.max_queue_size,
        parameters=CPP_PARAMETERS,
    )


def _field(field: Field, *, optional: bool = False) -> Tensor:
    return Tensor(field.name, field.type, (-1,) if field.is_list else (1,), optional=optional)


def _wires(tensors: Iterable[Tensor], inner: str = "") -> dict[str, str]:
    """Step tensor -> ensemble tensor; ``inner`` marks names that are not the ensemble's own inputs or outputs."""
    return {tensor.name: inner + tensor.name for tensor in tensors}
