"""The HTTP side: routes, keys, limits, and errors in the form that OpenAI's clients read.

Nothing is open that is not needed: no CORS, no generated documentation pages (they load scripts from other hosts), and
without API keys only requests that name this machine's loopback are served, so that no page of a stranger can reach the
model through the browser of somebody who works here. For the same reason a body must say that it is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from nemobuild.gateway import GatewayConfig
from nemobuild.gateway.errors import ApiError
from nemobuild.gateway.keys import KeyRing
from nemobuild.gateway.observe import Facts, Metrics, Watched
from nemobuild.gateway.requests import Asked, ChatRequest, CompletionRequest, read_request, refused
from nemobuild.gateway.responses import Answer, ChatAnswer, TextAnswer
from nemobuild.gateway.versions import Version, Versions
from nemobuild.runtime.fields import RequestError

_PAGE = Path(__file__).with_name("page.html")
_BODY_TIMEOUT_S = 60.0
_DRAIN = 4  # a client that is still sending hears no refusal, so a body is read on, and dropped, up to so many limits
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_ERROR_HEADERS = {
    401: {"www-authenticate": "Bearer"},
    413: {"connection": "close"},
    429: {"retry-after": "1"},
    503: {"retry-after": "5"},  # a server starts in seconds or minutes
}
# The page says itself what it may load; this is what only a header can say.
_PAGE_HEADERS = {"content-security-policy": "frame-ancestors 'none'", "x-content-type-options": "nosniff"}
T = TypeVar("T")


class EventStream(StreamingResponse):
    """Server-sent events. However the response ends, the iterator is closed, and with it the generation."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


class Gateway:
    """The endpoints and what they share."""

    def __init__(self, config: GatewayConfig) -> None:
        self.versions = Versions(config.target, config.held)
        self.keys = KeyRing(Path(config.api_keys)) if config.api_keys else None
        self.metrics = Metrics()
        self._config = config

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(self.versions.follow(self._config.control_fd))
        yield
        following.cancel()
        await self.versions.close()

    async def authorise(self, request: Request) -> None:
        if self.keys is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = self.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        _facts(request).key = owner

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ChatRequest, ChatAnswer)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, CompletionRequest, TextAnswer)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    def model(self, name: str) -> dict[str, Any]:
        if name != self.versions.current.settings.model_name:
            raise ApiError(404, f"model: there is no model {name!r} here", param="model", code="model_not_found")
        return self._model()

    async def health(self) -> Response:
        """Ready to answer: loaded, and not given up by the watchdog. ``/health/live``: this process runs."""
        version = self.versions.current
        ready = not self.versions.held and await version.upstream.ready(version.target.metrics_url)
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    def _model(self) -> dict[str, Any]:
        version = self.versions.current
        settings = version.settings
        own = {"max_model_len": settings.limits.max_context_tokens, "reasoning": settings.reasoning.switch != "none"}
        return {
            "id": settings.model_name,
            "object": "model",
            "created": version.created,
            "owned_by": "nemobuild",
            **own,
        }

    async def _answer(
        self, request: Request, form: type[ChatRequest] | type[CompletionRequest], shape: type[Answer]
    ) -> Response:
        body = await self._body(request)
        version = self.versions.enter()
        _facts(request).on_end = partial(self.versions.leave, version)  # when all is sent, however that ends
        name = version.settings.model_name
        asked = read_request(form, body, name)
        answer = shape(asked, name, version.token_bytes)
        responses = self._responses(request, version, asked)
        if not asked.stream:
            (outputs,) = await _while_connected(request, _collect(responses))
            return JSONResponse(answer.whole(outputs))
        # A refusal must be a status, not an event; so nothing is sent until the model has said something.
        first = await _while_connected(request, anext(responses))
        events = _events(first, responses, asked, answer)
        return EventStream(events, media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def _responses(
        self, request: Request, version: Version, asked: Asked
    ) -> AsyncGenerator[dict[str, Any], None]:
        facts = _facts(request)
        try:
            silence_s = self._config.silence_s if asked.stream else None
            async with contextlib.aclosing(version.upstream.ask(asked.fields, silence_s)) as stream:
                async for outputs in stream:
                    facts.heard(outputs)
                    yield outputs
        except RequestError as error:
            raise refused(asked, str(error)) from error
        except ApiError as error:
            raise self.versions.failed(version, error) from error
        if "finish_reason" not in facts.outputs:
            raise ApiError(502, "the model server ended the answer without a reason", code="server_failed")

    async def _body(self, request: Request) -> bytes:
        """The body, held no further than the limit."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "content-type: application/json is needed", code="unsupported_media_type")
        limit = self.versions.current.settings.limits.max_request_bytes
        body, size = bytearray(), 0

        async def read() -> None:
            nonlocal size
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    body.extend(piece)
                elif size > limit * _DRAIN:
                    break

        try:
            await asyncio.wait_for(read(), _BODY_TIMEOUT_S)
        except ClientDisconnect:
            raise ApiError(499, "the client left", code="client_left") from None
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive in {_BODY_TIMEOUT_S:.0f} s", code="timeout") from None
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        return bytes(body)


def make_app(config: GatewayConfig) -> Callable[..., Awaitable[None]]:
    """The ASGI application. Raises ``UsageError`` for a bad file of keys."""
    gateway = Gateway(config)
    app = FastAPI(lifespan=gateway.lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    private = APIRouter(dependencies=[Depends(gateway.authorise)])
    private.add_api_route("/v1/chat/completions", gateway.chat, methods=["POST"], response_model=None)
    private.add_api_route("/v1/completions", gateway.complete, methods=["POST"], response_model=None)
    private.add_api_route("/v1/models", gateway.models)
    private.add_api_route("/v1/models/{name:path}", gateway.model)
    private.add_api_route("/metrics", lambda: Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4"))
    app.include_router(private)
    page = HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)
    for path, answer in (("/health", gateway.health), ("/health/live", lambda: {"live": True}), ("/", lambda: page)):
        app.add_api_route(path, answer, methods=["GET", "HEAD"])  # load balancers ask by HEAD
    app.add_exception_handler(ApiError, _show)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _show_http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _show_fault)
    if gateway.keys is None:
        names = ["localhost", "127.0.0.1", f"[{config.host}]" if ":" in config.host else config.host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    return Watched(app, gateway.metrics)


async def _show(request: Request, error: ApiError) -> Response:
    _facts(request).error = error.code
    return JSONResponse(error.as_dict(), error.status, _ERROR_HEADERS.get(error.status))


async def _show_http(request: Request, error: HTTPException) -> Response:
    """What the web framework refuses by itself: a path or a method that is not there."""
    return await _show(request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


async def _show_fault(request: Request, error: Exception) -> Response:
    return await _show(request, ApiError(500, "the gateway failed; its log says why", code="gateway_failed"))


async def _events(
    first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None], asked: Asked, answer: Answer
) -> AsyncGenerator[str, None]:
    """``data:`` lines. What fails after the first of them is told as an event, and the stream ends without [DONE]."""
    last = first
    try:
        async with contextlib.aclosing(rest):
            if chunk := answer.chunk(first):
                yield _event(chunk)
            async for last in rest:
                if chunk := answer.chunk(last):
                    yield _event(chunk)
    except ApiError as error:
        yield _event(error.as_dict())
        return
    if asked.include_usage:
        yield _event(answer.usage_chunk(last))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _collect(responses: AsyncGenerator[T, None]) -> list[T]:
    return [response async for response in responses]


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves first."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client left", code="client_left")
        return task.result()
    finally:
        left.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _facts(request: Request) -> Facts:
    facts: Facts = request.scope["facts"]
    return facts
