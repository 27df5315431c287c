"""The two kinds of endpoint that can be put under load, behind one call: fields of ``chat`` in, its outputs out.

``host:port`` is Triton's gRPC, ``http://host:port`` an OpenAI-compatible API: our gateway, or anybody's. Only what is
asked for is sent, so that an API that lacks our additions can still be measured.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from nemobuild.errors import NemobuildError, RemoteError, ToolchainError, UsageError

# Field of ``chat`` -> its name in OpenAI's form, where that is another one.
_NAMES = {"max_tokens": "max_completion_tokens"}
_CONNECT_TIMEOUT_S = 10.0


class Failed(Exception):
    """One request failed; the text is the endpoint's own, shortened."""


class Target(Protocol):
    """An endpoint, used inside one event loop."""

    url: str

    def ask(self, fields: Mapping[str, Any], timeout_s: float) -> AsyncIterator[dict[str, Any]]:
        """Yield outputs of ``chat`` as they come; the last has the token counts. Raises ``Failed``."""

    async def close(self) -> None: ...


async def open_target(url: str, *, api_key: str | None = None, model: str | None = None) -> Target:
    """The endpoint at ``url``. Raises ``RemoteError`` when nothing there answers, ``UsageError`` for another scheme."""
    if "://" not in url:
        triton = _Triton(url)
        if not await triton.upstream.ready():
            await triton.close()
            raise RemoteError("no-server", f"There is no ready chat model at {url}.", next="nemobuild serve")
        return triton
    if not url.startswith(("http://", "https://")):
        raise UsageError("bad-url", f"{url} is neither host:port nor http://host:port.")
    return await _open_api(url.rstrip("/").removesuffix("/v1"), api_key, model)


class _Triton:
    def __init__(self, url: str) -> None:
        from nemobuild.gateway.upstream import Upstream

        self.url, self.upstream = url, Upstream(url)

    async def ask(self, fields: Mapping[str, Any], timeout_s: float) -> AsyncIterator[dict[str, Any]]:
        from nemobuild.gateway.errors import ApiError
        from nemobuild.runtime.fields import RequestError

        sent = {name: json.dumps(v, ensure_ascii=False) if name == "messages" else v for name, v in fields.items()}
        try:
            async with aclosing(self.upstream.ask(sent, silence_s=timeout_s)) as responses:
                async for outputs in responses:
                    yield outputs
        except (ApiError, RequestError) as error:
            raise Failed(_short(str(error))) from error

    async def close(self) -> None:
        await self.upstream.close()


async def _open_api(url: str, api_key: str | None, model: str | None) -> Target:
    try:
        import httpx
    except ImportError as error:
        raise ToolchainError(
            "no-httpx", "Load over HTTP needs the package httpx.", next="pip install 'nemobuild[bench]'"
        ) from error
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # No proxy of the environment between us and what is measured.
    client = httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=_CONNECT_TIMEOUT_S, trust_env=False
    )
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        names = [entry["id"] for entry in response.json()["data"]]
        if model is not None and model not in names:
            raise UsageError("no-such-model", f"{url} has no model {model}.", why=f"It has {', '.join(names)}.")
        return _Api(url, client, model or names[0])
    except NemobuildError:
        await client.aclose()
        raise
    except Exception as error:
        await client.aclose()
        raise RemoteError(
            "no-api",
            f"{url} does not answer as an OpenAI-compatible API.",
            why=_short(f"{error or type(error).__name__}"),
        ) from error


class _Api:
    def __init__(self, url: str, client: Any, model: str) -> None:
        self.url, self._client, self._model = url, client, model

    async def ask(self, fields: Mapping[str, Any], timeout_s: float) -> AsyncIterator[dict[str, Any]]:
        import httpx

        body: dict[str, Any] = {"model": self._model, "stream": True, "stream_options": {"include_usage": True}}
        for name, value in fields.items():
            if name == "reasoning_mode":
                body["reasoning"] = {"enabled": value == "on"}
            else:
                body[_NAMES.get(name, name)] = value
        try:
            async with self._client.stream(
                "POST", "/v1/chat/completions", json=body, timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
            ) as response:
                if response.status_code != 200:
                    raise Failed(_short(f"{response.status_code}: {_message(await response.aread())}"))
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                        yield _outputs(json.loads(data))
        except (httpx.HTTPError, ValueError) as error:
            raise Failed(_short(f"{type(error).__name__}: {error}")) from error

    async def close(self) -> None:
        await self._client.aclose()


def _outputs(chunk: dict[str, Any]) -> dict[str, Any]:
    if "error" in chunk:
        error = chunk["error"]
        raise Failed(_short(str(error.get("message", error) if isinstance(error, dict) else error)))
    found: dict[str, Any] = {}
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        found["text_output"] = delta.get("content") or ""
        found["reasoning_output"] = delta.get("reasoning_content") or delta.get("reasoning") or ""
        found["tool_calls"] = delta.get("tool_calls") or ""
        if choice.get("finish_reason"):
            found["finish_reason"] = choice["finish_reason"]
    if usage := chunk.get("usage"):
        found |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens") if name in usage}
        found["reasoning_tokens"] = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return found


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:199]}…"
