"""Ask the ``chat`` model over gRPC: fields in, dictionaries of outputs out, on one connection for all requests.

The messages are built and read here rather than by ``tritonclient``, whose arrays cost more per token than all the rest
of the gateway. Each request has a stream of its own: leaving it cancels the generation on the server.
"""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from nemobuild.gateway.errors import ApiError
from nemobuild.local import DIRECT_CHANNEL, open_local
from nemobuild.runtime.fields import BY_NAME, OUTPUTS, RequestError

_CONTENTS = {"INT32": "int_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents", "BOOL": "bool_contents"}
_LETTERS = {"INT32": "i", "FP32": "f", "BOOL": "?"}  # those of struct
_LISTS = frozenset(field.name for field in OUTPUTS if field.is_list)
_READY_TIMEOUT_S = 5.0
_HEALTHY = b"nemobuild_chat_healthy"


class Upstream:
    """The connection. Made inside a running event loop."""

    def __init__(self, url: str) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._grpc, self._messages = grpc, service_pb2
        self._channel = grpc.aio.insecure_channel(url, DIRECT_CHANNEL)
        self._triton = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def ready(self, metrics_url: str | None = None) -> bool:
        """Whether the ``chat`` model is loaded, and, where Triton's metrics can be asked, its engine gives tokens."""
        request = self._messages.ModelReadyRequest(name="chat")
        try:
            loaded = await self._triton.ModelReady(request, timeout=_READY_TIMEOUT_S)
        except self._grpc.aio.AioRpcError:
            return False
        if not loaded.ready or metrics_url is None:
            return bool(loaded.ready)
        return not await asyncio.to_thread(_given_up, metrics_url)

    async def ask(self, fields: Mapping[str, Any], silence_s: float | None) -> AsyncGenerator[dict[str, Any], None]:
        """Yield each response as ``{output: value}``; the last one has ``finish_reason``.

        ``silence_s`` bounds the wait for each response. Raises ``RequestError`` when the model refuses the request, and
        ``ApiError`` when there is no server, it is too busy, it failed, or it went silent.
        """
        request = self._messages.ModelInferRequest(model_name="chat")
        for name, value in fields.items():
            _add_input(request, name, value)
        call = self._triton.ModelStreamInfer([request])
        silence = _Silence(silence_s, call.cancel)
        try:
            async for response in call:
                silence.broken()
                if response.error_message:
                    raise _refusal(response.error_message)
                if response.infer_response.outputs:
                    silence.paused = True  # what the reader takes its time for is not the server's silence
                    yield _outputs(response.infer_response)
                    silence.paused = False
                    silence.broken()
        except self._grpc.aio.AioRpcError as error:
            raise ApiError(503, f"the model server is gone: {error.details()}", code="no_server") from error
        except asyncio.CancelledError:
            if not silence.too_long:
                raise
            raise ApiError(504, f"the server sent nothing for {silence_s:.0f} s", code="timeout") from None
        finally:
            silence.end()
            call.cancel()


class _Silence:
    """One timer for a whole answer: a timeout for each token would cost more than the token."""

    def __init__(self, limit_s: float | None, act: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        self._act = act
        self.too_long = self.paused = False
        self.broken()
        self._timer = None if limit_s is None else self._loop.call_later(limit_s, self._look, limit_s)

    def broken(self) -> None:
        """Something was heard."""
        self._heard_s = self._loop.time()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self, limit_s: float) -> None:
        left_s = limit_s if self.paused else self._heard_s + limit_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look, limit_s)
            return
        self.too_long = True
        self._act()


def _given_up(metrics_url: str) -> bool:
    """Whether the watchdog of ``chat`` says that the engine hangs."""
    try:
        with open_local(metrics_url, timeout_s=_READY_TIMEOUT_S) as response:
            return any(line.startswith(_HEALTHY) and float(line.split()[-1]) == 0 for line in response)
    except (OSError, ValueError):
        return False  # a Triton whose metrics are closed


def _add_input(request: Any, name: str, value: Any) -> None:
    kind = BY_NAME[name].type
    items = value if isinstance(value, list) else [value]
    try:
        if kind == "STRING":
            tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1, len(items)])
            tensor.contents.bytes_contents.extend(item.encode() for item in items)
        else:
            tensor = request.inputs.add(name=name, datatype=kind, shape=[1, len(items)])
            getattr(tensor.contents, _CONTENTS[kind]).extend(items)
    except ValueError as error:  # protobuf's word for a number that does not fit, or half a character
        raise RequestError(name, f"{value!r:.40} is not a value of type {kind}") from error


def _outputs(response: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            values[output.name] = raw[4:].decode()  # each string has its length before it; ours come one by one
        else:
            letter = _LETTERS[output.datatype]
            items = struct.unpack(f"<{len(raw) // struct.calcsize(letter)}{letter}", raw)
            values[output.name] = list(items) if output.name in _LISTS else items[0]
    return values


def _refusal(message: str) -> Exception:
    """What an error response means. Triton 2.51 gives its status only in a mode in which refusals crash it."""
    field, colon, problem = message.partition(": ")
    if colon and re.split(r"[.\[]", field)[0] in BY_NAME:
        return RequestError(field, problem)
    if "the engine does not answer" in message:
        return ApiError(503, message, code="engine_silent")
    if field == "chat":  # what it says of itself
        return ApiError(429, message, code="server_busy")
    return ApiError(500, f"the model server failed: {message}", code="server_failed")
