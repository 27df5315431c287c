"""Talk to an emitted repository over Triton's gRPC: fields in, dictionaries of outputs out, streamed."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nemobuild.errors import ChildFailed, NemobuildError, RemoteError, UsageError, nearest
from nemobuild.local import DIRECT_CHANNEL
from nemobuild.runtime.fields import BY_NAME

_NUMPY: dict[str, Any] = {"INT32": np.int32, "FP32": np.float32, "UINT64": np.uint64, "BOOL": np.bool_}


def stream(
    url: str, fields: Mapping[str, Any], *, model: str = "chat", timeout_s: float | None = None
) -> Iterator[dict[str, Any]]:
    """Send one request and yield each response as ``{output: value}``; the last one has ``finish_reason``.

    ``url`` is ``host:port`` of the gRPC endpoint. Leaving the iterator early cancels the request on the server.
    ``timeout_s`` bounds the wait for each response. Raises ``UsageError`` for a refused request, ``RemoteError`` when
    there is no server, ``ChildFailed`` when it failed or went silent.
    """
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    inputs = [_input(grpc, name, value) for name, value in fields.items()]
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    finished = False
    client = grpc.InferenceServerClient(url, channel_args=DIRECT_CHANNEL)
    try:
        # Named as tritonclient calls it back.
        client.start_stream(callback=lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        while not finished:
            try:
                result, error = arrived.get(timeout=timeout_s)
            except queue.Empty:
                raise ChildFailed("no-answer", f"{url} sent nothing for {timeout_s:.0f} s.") from None
            if error is not None:
                raise _explain(error, url)
            response = result.get_response()
            finished = response.parameters["triton_final_response"].bool_param
            if response.outputs:
                yield {output.name: _value(result.as_numpy(output.name), output.name) for output in response.outputs}
    except InferenceServerException as error:
        with contextlib.suppress(queue.Empty):  # why the stream broke came to the callback first
            error = arrived.get_nowait()[1] or error
        raise _explain(error, url) from error
    finally:
        client.stop_stream(cancel_requests=not finished)
        client.close()


def whole(url: str, fields: Mapping[str, Any], *, timeout_s: float | None = None) -> dict[str, Any]:
    """One answer from ``ensemble``; see ``stream`` for the errors."""
    (answer,) = stream(url, fields, model="ensemble", timeout_s=timeout_s)
    return answer


def _input(grpc: Any, name: str, value: Any) -> Any:
    field = BY_NAME.get(name)
    if field is None:
        raise UsageError("unknown-field", f"There is no request field {name!r}.", why=nearest(name, BY_NAME))
    items = value if isinstance(value, (list, tuple)) else [value]
    if field.type == "STRING":
        array = np.array([[_utf8(name, item) for item in items]], dtype=np.object_)
    else:
        kind = _NUMPY[field.type]
        for item in items:
            if field.type in ("INT32", "UINT64") and not np.iinfo(kind).min <= item <= np.iinfo(kind).max:
                raise UsageError("bad-value", f"{name} is {item}, which is not a number of type {field.type}.")
        array = np.array([items], dtype=kind)
    tensor = grpc.InferInput(name, list(array.shape), "BYTES" if field.type == "STRING" else field.type)
    tensor.set_data_from_numpy(array)
    return tensor


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("not-utf8", f"{name} is not valid UTF-8.", why=f"Near character {error.start}.") from error


def _value(array: Any, name: str) -> Any:
    flat = [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]
    return flat if name in ("output_log_probs", "token_ids") else flat[0]


def _explain(error: Any, url: str) -> NemobuildError:
    message = str(error.message()).rstrip(".")
    status = str(error.status() or "")
    if "UNAVAILABLE" in status or "failed to connect" in message.lower():
        return RemoteError(
            "no-server",
            f"There is no Triton at {url}.",
            why=f"{message}.",
            next="Start one with `nemobuild serve`, or name its address with --url.",
        )
    if "internal error" in message or "not healthy" in message:
        return ChildFailed("server-failed", "The server failed on this request.", why=f"{message}.")
    return UsageError("request-refused", "The server refused the request.", why=f"{message}.")
