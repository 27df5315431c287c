"""``nemobuild doctor --exposed``: what somebody who reaches this machine's ports could do with what serves here.

Ports are not judged by their number. Each is asked what it is, over HTTP and over gRPC, and then for the doors that
should be closed, with requests that change nothing. A door is open when it answers anything but a refusal. What listens
on loopback is asked too: a gateway or a tunnel in front of it opens its doors to others.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from nemobuild.doctor.findings import Finding
from nemobuild.doctor.machine import Listener

_TIMEOUT_S = 2.0
_ANSWER_BYTES = 1 << 20
_USE = "use the model"
_GRPC = "Triton over gRPC"
# Seen on 2.51; it is not tried here, since it would end the server.
_GRPC_CRASH = "A refused request that carries the metadata triton_grpc_error ends a Triton 2.51."
# Door -> the HTTP request that finds it, and the call of Triton's gRPC client that does.
_TRITON_DOORS = {
    _USE: ("GET", "/v2/models/chat", "get_model_metadata:chat"),
    "load and unload models": ("POST", "/v2/repository/index", "get_model_repository_index"),
    "map shared memory of this machine": ("GET", "/v2/systemsharedmemory/status", "get_system_shared_memory_status"),
    "trace requests, their tensors included, into a file": ("GET", "/v2/trace/setting", "get_trace_settings"),
    "change what is logged": ("GET", "/v2/logging", "get_log_settings"),
}


@dataclass(frozen=True, slots=True)
class Service:
    """What listens at a port. ``open_doors`` is what whoever reaches it can do."""

    kind: str  # Triton over HTTP, Triton over gRPC, metrics or an OpenAI-compatible API
    open_doors: tuple[str, ...]


def check_exposure(listening: Sequence[Listener]) -> Iterator[Finding]:
    """One finding for each port at which something serves a model, or its metrics."""
    served = [(listener, service) for listener in listening if (service := identify(listener)) is not None]
    if not served:
        yield Finding("exposure", "ok", f"None of {len(listening)} listening ports serves a model.")
    for listener, service in served:
        yield judge(listener, service)


def judge(listener: Listener, service: Service) -> Finding:
    """A warning for what other machines can use without a key, or for what nobody should be able to do."""
    doors = [door for door in service.open_doors if door != _USE]
    what = f"Port {listener.port} on {listener.address}: {service.kind}."
    reach = "Other machines can reach it" if listener.exposed else "Only this machine can reach it"
    can = "; ".join(service.open_doors)
    why = f"{reach}. Without a key one can: {can}." if can else f"{reach}, and needs a key to use it."
    if service.kind == _GRPC and service.open_doors and listener.exposed:
        why += f" {_GRPC_CRASH}"
    bad = bool(doors) or (listener.exposed and bool(service.open_doors))
    remedy = ""
    if doors and service.kind.startswith("Triton"):
        remedy = "Start it with `nemobuild serve`, which closes all but the use of the model."
    elif bad and service.kind.startswith("an OpenAI"):
        remedy = "Serve with --api-keys FILE."
    elif bad:
        remedy = "Serve on 127.0.0.1 (the default of `nemobuild serve`), behind a gateway with keys."
    facts = {"listener": asdict(listener), "exposed": listener.exposed, "kind": service.kind}
    return Finding(
        "exposure", "warning" if bad else "ok", what, why, remedy, facts=facts | {"open": list(service.open_doors)}
    )


def identify(listener: Listener) -> Service | None:
    """What serves at ``listener``, if it is anything that concerns us."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listener.address, listener.address)
    status, body = _http(host, listener.port, "GET", "/v2")
    if status is None:
        return _grpc(host, listener.port)
    if status == 200 and "extensions" in _object(body):
        doors = [
            door for door, (*request, _) in _TRITON_DOORS.items() if _opens(_http(host, listener.port, *request)[0])
        ]
        return Service("Triton over HTTP", tuple(doors))
    status, body = _http(host, listener.port, "GET", "/v1/models")
    if status == 401:
        return Service("an OpenAI-compatible API", ())
    if status == 200 and "data" in _object(body):
        return Service("an OpenAI-compatible API", (_USE,))
    status, body = _http(host, listener.port, "GET", "/metrics")
    if status == 200 and b"nv_inference" in body:
        return Service("Triton's metrics", ("read how much the models are used",))
    return None


def _opens(status: int | None) -> bool:
    """404 and 400 are answers of the door itself: it is there, and something else is missing."""
    return status is not None and status not in (401, 403, 405)


def _object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _http(host: str, port: int, method: str, path: str) -> tuple[int | None, bytes]:
    """Status and body; no status when nobody there speaks HTTP."""
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers={"Host": f"localhost:{port}"})
        response = connection.getresponse()
        return response.status, response.read(_ANSWER_BYTES)
    except (OSError, http.client.HTTPException):
        return None, b""
    finally:
        connection.close()


def _grpc(host: str, port: int) -> Service | None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    client = grpc.InferenceServerClient(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    def answers(call: str) -> bool:
        name, _, argument = call.partition(":")
        try:
            getattr(client, name)(*filter(None, [argument]), client_timeout=_TIMEOUT_S)
        except InferenceServerException as error:
            return "NOT_FOUND" in str(error.status())
        return True

    try:
        if not answers("is_server_live"):
            return None
        return Service(_GRPC, tuple(door for door, (*_, call) in _TRITON_DOORS.items() if answers(call)))
    finally:
        client.close()
