"""What the gateway tells about itself: metrics for Prometheus, and one log line per request without any user text."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_LOG = logging.getLogger("nemobuild.gateway")
_ROUTES = frozenset(
    {"/", "/health", "/health/live", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions"}
)
_PROBES = frozenset({"/health", "/health/live", "/metrics"})  # asked for again and again by machines
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


@dataclass(slots=True)
class Facts:
    """What is known of one request; the endpoint fills it in, the log line and the metrics tell it."""

    id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    began_s: float = field(default_factory=time.monotonic)
    key: str | None = None
    error: str | None = None  # code of the refusal or failure
    first_token_s: float | None = None
    outputs: dict[str, Any] = field(default_factory=dict)  # of the last response
    on_end: Callable[[], None] | None = None

    def heard(self, outputs: dict[str, Any]) -> None:
        """A response of ``chat`` came."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic() - self.began_s
        if "finish_reason" in outputs:
            self.outputs = outputs


class Watched:
    """An ASGI application around ``app`` that gives each request its ``Facts`` and tells them when it ends."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        facts = scope["facts"] = Facts()
        status = 499  # the client left before it got an answer

        async def watched_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", facts.id.encode())]
            await send(message)

        self._metrics.in_progress.inc()
        try:
            await self._app(scope, receive, watched_send)
        finally:
            self._metrics.in_progress.dec()
            if facts.on_end is not None:
                facts.on_end()
            route = scope["path"] if scope["path"] in _ROUTES else "other"
            self._metrics.tell(facts, route, status)
            if route not in _PROBES or status >= 400:
                _log(facts, route, status)


class Metrics:
    """Counters of this process."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        name = "nemobuild_gateway_"
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter(f"{name}requests", "Finished requests.", ["route", "status"], **own)
        self.in_progress = Gauge(f"{name}requests_in_progress", "Requests that run.", **own)
        self.errors = Counter(f"{name}errors", "Refusals and failures.", ["code"], **own)
        self.tokens = Counter(f"{name}tokens", "Tokens of finished answers.", ["kind"], **own)
        self.seconds = Histogram(
            f"{name}request_seconds", "From the first byte of a request to its end.", ["route"], buckets=_SECONDS, **own
        )
        self.first_token = Histogram(
            f"{name}time_to_first_token_seconds", "To the first response of the model.", buckets=_SECONDS, **own
        )

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return bytes(generate_latest(self._registry))

    def tell(self, facts: Facts, route: str, status: int) -> None:
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(time.monotonic() - facts.began_s)
        if facts.error is not None:
            self.errors.labels(facts.error).inc()
        if facts.first_token_s is not None:
            self.first_token.observe(facts.first_token_s)
        for kind in ("prompt", "reasoning", "completion"):
            self.tokens.labels(kind).inc(facts.outputs.get(f"{kind}_tokens", 0))


def _log(facts: Facts, route: str, status: int) -> None:
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "request": facts.id,
        "key": facts.key,
        "route": route,
        "status": status,
        "error": facts.error,
        "seconds": round(time.monotonic() - facts.began_s, 4),
        "first_token_seconds": None if facts.first_token_s is None else round(facts.first_token_s, 4),
    }
    counts = ("finish_reason", "prompt_tokens", "reasoning_tokens", "completion_tokens")
    _LOG.info(json.dumps(line | {name: facts.outputs.get(name) for name in counts}))
