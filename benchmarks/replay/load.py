"""A client for load: many streams from one event loop, their bytes kept as they come and read only afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
_TYPES = {np.dtype(np.int32): "INT32", np.dtype(np.bool_): "BOOL", np.dtype(np.float32): "FP32"}
_CLOCK_TICKS_PER_S = 100


@dataclass(slots=True)
class Stream:
    """One answer: when it was asked, and each response with the time when it came."""

    begin: float
    arrived: list[tuple[float, bytes]]

    @property
    def first_s(self) -> float:
        return self.arrived[0][0] - self.begin

    def outputs(self) -> list[dict[str, Any]]:
        """``{output: value}`` of each response; a refusal as ``{"error": message}``."""
        return [_outputs(pb.ModelStreamInferResponse.FromString(data)) for _, data in self.arrived]


def request(model: str, inputs: Mapping[str, Any], outputs: Sequence[str] = ()) -> bytes:
    """A request as bytes. Values are arrays with the batch axis, or text."""
    message = pb.ModelInferRequest(model_name=model)
    for name, value in inputs.items():
        if isinstance(value, str):
            data = value.encode()
            message.inputs.add(name=name, datatype="BYTES", shape=[1, 1])
            message.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
        else:
            array = np.asarray(value)
            message.inputs.add(name=name, datatype=_TYPES[array.dtype], shape=array.shape)
            message.raw_input_contents.append(array.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return bytes(message.SerializeToString())


def run(url: str, requests: Sequence[bytes]) -> list[Stream]:
    """All ``requests`` at once, each on a stream of its own."""
    return asyncio.run(_run(url, requests))


async def _run(url: str, requests: Sequence[bytes]) -> list[Stream]:
    async with grpc.aio.insecure_channel(url) as channel:
        await channel.channel_ready()
        call = channel.stream_stream(_METHOD)
        return await asyncio.gather(*(_one(call, data) for data in requests))


async def _one(call: Any, data: bytes) -> Stream:
    stream = Stream(time.perf_counter(), [])
    running = call()
    await running.write(data)
    await running.done_writing()
    while (got := await running.read()) is not grpc.aio.EOF:
        stream.arrived.append((time.perf_counter(), got))
    return stream


def cpu_seconds(group: int) -> float:
    """Processor time that all processes of a process group have used up to now."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _CLOCK_TICKS_PER_S


def _outputs(message: Any) -> dict[str, Any]:
    if message.error_message:
        return {"error": message.error_message}
    response, values = message.infer_response, {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            values[output.name] = data[4:].decode()
        else:
            kind = next(kind for kind, name in _TYPES.items() if name == output.datatype)
            values[output.name] = np.frombuffer(data, kind).tolist()
    return values
