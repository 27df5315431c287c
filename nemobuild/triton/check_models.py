"""Rules of ``repo check`` over the models' ``config.pbtxt``: each alone, and how they fit together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from nemobuild.errors import nearest
from nemobuild.triton.contract import (
    CPP_BATCHING,
    CPP_OPTIONAL,
    CPP_PARAMETERS,
    CPP_PRESENT,
    CPP_SET,
    ENGINE_INPUTS,
    ENGINE_OUTPUTS,
    Tensor,
)
from nemobuild.triton.opened import CONFIG, Opened

Found = Iterator[tuple[str, str]]
ENGINE = "tensorrt_llm"
CPP_BACKEND = "tensorrtllm"
_CALLERS = ("chat", "tensorrt_llm_collect")
_WAYS = ("lane", "grpc")
_CPU_KEYS = {"max_batch_size", "max_context_tokens", "kv_cache_tokens", "max_queue_size"}


def schema(repository: Opened) -> Found:
    """Every model folder has a configuration of Triton's schema, its own name, a version, and what runs it."""
    for folder in sorted(repository.folder.iterdir()):
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        name, file = folder.name, f"{folder.name}/{CONFIG}"
        if name in repository.broken:
            yield file, f"not of Triton's schema: {repository.broken[name]}"
        if name not in repository.models:
            if name not in repository.broken:
                yield name, f"a model folder without {CONFIG}"
            continue
        model = repository.models[name]
        if model.name != name:
            yield file, f"name is {model.name!r}, the folder {name!r}"
        versions = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
        if not versions:
            yield name, "no version folder"
        if _is_ensemble(model):
            if not model.ensemble_scheduling.step:
                yield file, "an ensemble without steps"
        elif not model.backend:
            yield file, "neither a backend nor an ensemble"
        elif model.backend == "python":
            for version in versions:
                if not (version / "model.py").is_file():
                    yield f"{name}/{version.name}", "no model.py"
        for tensors in (model.input, model.output):
            for tensor, times in Counter(t.name for t in tensors).items():
                if times > 1:
                    yield file, f"tensor {tensor!r} is listed {times} times"


def placeholder(repository: Opened) -> Found:
    """No ``${...}`` of a template is left. In a number it is an error, in a string a value that nobody meant."""
    for name in [*repository.names(f"*/{CONFIG}"), *repository.names("*/*/*.yaml")]:
        for number, line in enumerate(repository.text(name).splitlines(), 1):
            if "${" in line:
                yield name, f"line {number} holds the unfilled {line[line.index('${') :][:60].strip()!r}"


def parameters(repository: Opened) -> Found:
    """The engine's parameters and tensors are those that its backend reads, and who calls it knows how."""
    model = repository.models.get(ENGINE)
    if model is None:
        if ENGINE not in repository.broken:
            yield ENGINE, "there is no such model"
        return
    yield from _callers(repository, model.backend)
    file = f"{ENGINE}/{CONFIG}"
    if model.max_batch_size < 1:
        yield file, f"max_batch_size is {model.max_batch_size}; the tensors have a batch axis, so it must be 1 or more"
    yield from ((file, what) for what in _tensor_problems("input", model.input, ENGINE_INPUTS))
    yield from ((file, what) for what in _tensor_problems("output", model.output, ENGINE_OUTPUTS))
    values = {key: parameter.string_value for key, parameter in model.parameters.items()}
    if model.backend == CPP_BACKEND:
        if model.dynamic_batching.default_queue_policy.max_queue_size < 1:
            yield file, "dynamic_batching.default_queue_policy.max_queue_size is missing: the queue has no bound"
        yield from ((file, what) for what in _cpp_problems(values))
    elif repository.runtime == "cpu":
        try:
            limits = json.loads(values.get("cpu_engine", ""))
        except ValueError:
            limits = None
        if not isinstance(limits, dict) or set(limits) != _CPU_KEYS:
            yield file, f"the parameter cpu_engine must be a JSON object of {', '.join(sorted(_CPU_KEYS))}"


def _callers(repository: Opened, backend: str) -> Found:
    for name in _CALLERS:
        if name in repository.models:
            way = repository.models[name].parameters["engine_way"].string_value
            if way not in _WAYS:
                yield f"{name}/{CONFIG}", f"the parameter engine_way is {way!r}, not one of {', '.join(_WAYS)}"
            elif way == "lane" and backend != "python":
                yield f"{name}/{CONFIG}", f"the parameter engine_way is 'lane', which the backend {backend!r} has not"


def wiring(repository: Opened) -> Found:
    """Every step's model exists, its tensors are fed and read under the right names, types and shapes, once each."""
    for name, model in repository.models.items():
        if _is_ensemble(model):
            yield from ((f"{name}/{CONFIG}", what) for what in _ensemble_problems(model, repository.models))


def decoupled(repository: Opened) -> Found:
    """What streams says so, and no step of an ensemble mixes a stream with tensors from before it."""
    file = f"{ENGINE}/{CONFIG}"
    engine, chat = repository.models.get(ENGINE), repository.models.get("chat")
    for model, where in ((engine, file), (chat, f"chat/{CONFIG}")):
        if chat is not None and model is not None and not model.model_transaction_policy.decoupled:
            yield where, "model_transaction_policy.decoupled must be true: chat streams"
    for name, model in repository.models.items():
        streams: set[str] = set()
        for step in model.ensemble_scheduling.step:
            read = set(step.input_map.values())
            inner = repository.models.get(step.model_name)
            if streams & read and read - streams:
                mixed = sorted(read - streams)[0]
                yield f"{name}/{CONFIG}", f"step {step.model_name!r} takes {mixed!r} beside a stream; Triton refuses it"
            if streams & read or (inner is not None and inner.model_transaction_policy.decoupled):
                streams |= set(step.output_map.values())


def _cpp_problems(values: Mapping[str, str]) -> Iterator[str]:
    for key in (*CPP_PRESENT, *CPP_SET):
        if key not in values:
            yield f"the parameter {key} is missing"
        elif key in CPP_SET and not values[key]:
            yield f"the parameter {key} is empty"
    batching = values.get("gpt_model_type")
    if batching and batching not in CPP_BATCHING:
        yield f"the parameter gpt_model_type is {batching!r}; only {', '.join(CPP_BATCHING)} batch in flight"
    known = CPP_OPTIONAL | set(CPP_PARAMETERS)
    for key in sorted(set(values) - known):
        yield f"the parameter {key} is unknown to the backend, which would not say so. {nearest(key, known)}"


def _tensor_problems(kind: str, tensors: Any, wanted: tuple[Tensor, ...]) -> Iterator[str]:
    found = {tensor.name: tensor for tensor in tensors}
    for tensor in wanted:
        if tensor.name not in found:
            yield f"{kind} {tensor.name!r} is missing"
        elif _form(found[tensor.name]) != (f"TYPE_{tensor.type}", tensor.dims) and "logits" not in tensor.name:
            kind_found, dims = _form(found[tensor.name])
            yield f"{kind} {tensor.name!r} is {kind_found} {list(dims)}, not TYPE_{tensor.type} {list(tensor.dims)}"


def _ensemble_problems(ensemble: Any, models: Mapping[str, Any]) -> Iterator[str]:
    known: dict[str, tuple[str, Any]] = {t.name: ("the request", t) for t in ensemble.input}
    read: set[str] = set()
    for step in ensemble.ensemble_scheduling.step:
        inner = models.get(step.model_name)
        if inner is None:
            yield f"step {step.model_name!r}: there is no such model"
            continue
        inputs, outputs = ({t.name: t for t in tensors} for tensors in (inner.input, inner.output))
        for name in sorted(set(step.input_map) - set(inputs)):
            yield f"step {step.model_name!r} has no input {name!r}. {nearest(name, inputs)}"
        for name in sorted(set(step.output_map) - set(outputs)):
            yield f"step {step.model_name!r} has no output {name!r}. {nearest(name, outputs)}"
        for name, tensor in inputs.items():
            if name not in step.input_map:
                if not tensor.optional:
                    yield f"step {step.model_name!r} needs {name!r}, which nothing feeds"
                continue
            outer = step.input_map[name]
            read.add(outer)
            if outer not in known:
                yield f"step {step.model_name!r} reads {outer!r} for {name!r}, which nothing has made by then"
                continue
            maker, fed = known[outer]
            if not _agree(fed, tensor):
                yield f"{outer!r} is {_shown(fed)} from {maker}, {_shown(tensor)} as {name!r} of {step.model_name!r}"
            if getattr(fed, "optional", False) and not tensor.optional:  # outputs have no such field
                yield f"{outer!r} of the request is optional, but step {step.model_name!r} needs it as {name!r}"
        for name, outer in step.output_map.items():
            if outer in known:
                yield f"{outer!r} is made twice: by {known[outer][0]} and by step {step.model_name!r}"
            elif name in outputs:
                known[outer] = (f"step {step.model_name!r}", outputs[name])
    for tensor in ensemble.output:
        if tensor.name not in known:
            yield f"output {tensor.name!r} is made by no step"
        elif not _agree(known[tensor.name][1], tensor):
            maker, made = known[tensor.name]
            yield f"output {tensor.name!r} is {_shown(tensor)}, but {_shown(made)} from {maker}"
    for outer in sorted(set(known) - read - {t.name for t in ensemble.output}):
        yield f"{outer!r} from {known[outer][0]} is read by nobody"


def _is_ensemble(model: Any) -> bool:
    return bool(model.platform == "ensemble")


def _form(tensor: Any) -> tuple[str, tuple[int, ...]]:
    from tritonclient.grpc import model_config_pb2 as pb

    return pb.DataType.Name(tensor.data_type), tuple(tensor.dims)


def _shown(tensor: Any) -> str:
    kind, dims = _form(tensor)
    return f"{kind} {list(dims)}"


def _agree(made: Any, taken: Any) -> bool:
    """Same type and rank, and the same length wherever both fix one."""
    (kind, dims), (other, others) = _form(made), _form(taken)
    if kind != other or len(dims) != len(others):
        return False
    return all(a == b or -1 in (a, b) for a, b in zip(dims, others, strict=True))
