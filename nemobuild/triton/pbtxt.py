"""``config.pbtxt`` of a Triton model from a typed record, through Triton's own protobuf schema.

No text templates: a field that the schema does not know, or a value of the wrong kind, fails here and not in the
server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemobuild.triton.contract import Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an ensemble. Maps go from the inner tensor's name to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TritonModel:
    """What a ``config.pbtxt`` says about one model."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    backend: str = "python"  # empty for an ensemble
    max_batch_size: int = 1
    decoupled: bool = False
    instances: int = 1
    max_queue_size: int | None = None  # with a number: dynamic batching with that queue limit
    parameters: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


def render(model: TritonModel) -> str:
    """Protobuf text of ``model``; parses back to the same message."""
    from google.protobuf import text_format

    return text_format.MessageToString(to_message(model))


def to_message(model: TritonModel) -> Any:
    """``inference.ModelConfig`` message of ``model``."""
    from tritonclient.grpc import model_config_pb2 as pb

    message = pb.ModelConfig(name=model.name, max_batch_size=model.max_batch_size)
    if model.steps:
        message.platform = "ensemble"
        for step in model.steps:
            message.ensemble_scheduling.step.add(
                model_name=step.model, model_version=-1, input_map=step.inputs, output_map=step.outputs
            )
    else:
        message.backend = model.backend
        message.instance_group.add(count=model.instances, kind=pb.ModelInstanceGroup.KIND_CPU)
        message.model_transaction_policy.decoupled = model.decoupled
    for tensor in model.inputs:
        message.input.add(
            **_tensor(pb, tensor), optional=tensor.optional, allow_ragged_batch=tensor.ragged and not model.steps
        )
    for tensor in model.outputs:
        message.output.add(**_tensor(pb, tensor))
    if model.max_queue_size is not None:
        message.dynamic_batching.preferred_batch_size.append(model.max_batch_size)
        message.dynamic_batching.default_queue_policy.max_queue_size = model.max_queue_size
    for key, value in model.parameters.items():
        message.parameters[key].string_value = value
    return message


def _tensor(pb: Any, tensor: Tensor) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": tensor.name,
        "data_type": pb.DataType.Value(f"TYPE_{tensor.type}"),
        "dims": tensor.dims,
    }
    if tensor.scalar:
        fields["reshape"] = pb.ModelTensorReshape(shape=[])
    return fields
