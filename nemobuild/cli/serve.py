"""``nemobuild serve``: start Triton on a repository, wait for a real token, stop cleanly."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import ApiKeys, Json, OpenAi, OpenAiHost, OpenAiPort, ReadyTimeout


def serve(
    what: Annotated[str, typer.Argument(help="Model repository, or a profile whose repository was made.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on. Loopback: nobody outside this machine.")
    ] = "127.0.0.1",
    http_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8000, or a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8001, or a free one.")] = None,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8002, or a free one.")] = None,
    log: Annotated[
        Path | None, typer.Option(help="Triton's log; default: NAME.triton.log beside the repository.")
    ] = None,
    container: Annotated[
        bool | None,
        typer.Option(
            "--container/--local",
            help="Serve tensorrt and llmapi in the profile's container, or with the Triton of this machine; "
            "default: this machine's if it can.",
        ),
    ] = None,
    openai: OpenAi = False,
    openai_host: OpenAiHost = None,
    openai_port: OpenAiPort = None,
    api_keys: ApiKeys = None,
    timeout_s: ReadyTimeout = 600.0,
    json: Json = False,
) -> None:
    """Serve a repository with Triton over gRPC and HTTP, and as OpenAI's API, until Ctrl-C."""
    run(
        what,
        host=host,
        ports=(http_port, grpc_port, metrics_port),
        log=log,
        container=container,
        openai=openai,
        openai_host=openai_host,
        openai_port=openai_port,
        api_keys=api_keys,
        timeout_s=timeout_s,
        json=json,
    )


def run(
    what: str,
    *,
    host: str = "127.0.0.1",
    ports: tuple[int | None, int | None, int | None] = (None, None, None),
    log: Path | None = None,
    container: bool | None = None,
    openai: bool,
    openai_host: str | None,
    openai_port: int | None,
    api_keys: Path | None,
    timeout_s: float,
    json: bool,
    events: bool = False,
) -> None:
    """What ``serve`` and ``up`` do; ``events`` says that it is ready in one line of JSON."""
    from contextlib import ExitStack

    from nemobuild.artefacts import key_of
    from nemobuild.errors import UsageError
    from nemobuild.gateway.process import listening
    from nemobuild.places import place
    from nemobuild.serving import Front, find_served, serve_until_stopped
    from nemobuild.triton.launch import Endpoint, Launch
    from nemobuild.triton.server import choose_endpoint

    served = find_served(what)
    # Logs are not kept in the store, but where the profile's own folders are.
    beside = (place(what, "repository") if served.profile else served.repository).resolve()
    if served.number is not None and key_of(beside) not in (None, key_of(served.repository)):
        output.hint(f"serving version {served.number}; {beside} holds another one, which `nemobuild up` would publish")
    endpoint = choose_endpoint(host, ports)
    log = log or beside.with_name(f"{beside.name}.triton.log")

    def show_start(launch: Launch, log: Path) -> None:
        if not (json or events):
            output.hint(f"starting Triton, log in {log}\n{shlex.join(launch.command)}")

    for name, value in (("host", openai_host), ("port", openai_port)):
        if value is not None and not openai:
            raise UsageError("needs-openai", f"--openai-{name} needs --openai.")
    if api_keys is not None and not openai:
        raise UsageError("needs-openai", "--api-keys needs --openai.", why="Triton itself asks for no key.")

    with ExitStack() as opened:
        front: Front | None = None
        if openai:
            bound = opened.enter_context(listening(openai_host or "127.0.0.1", openai_port, api_keys))
            gateway_log = log.with_name(f"{beside.name}.gateway.log")
            front = Front(bound, api_keys, gateway_log, lambda: output.hint("the gateway had ended; started it again"))

        def show_ready(ready: Endpoint) -> None:
            value = {
                "http": ready.http_url,
                "grpc": ready.grpc_url,
                "metrics_port": ready.metrics_port,
                "log": str(log),
                "version": served.number,
            }
            lines = [f"ready  gRPC {ready.grpc_url}  HTTP {ready.http_url}"]
            if front is not None:
                value |= {"openai": f"{front.url}/v1", "gateway_log": str(front.log)}
                lines.append(f"OpenAI {front.url}/v1  page {front.url}/")
            lines += ['try    nemobuild chat "Hello"', "stop   Ctrl-C"]
            if events:
                output.event("ready", **value)
            else:
                output.result(value, "\n".join(lines), as_json=json)
                output.piece("")

        serve_until_stopped(
            served,
            endpoint,
            log,
            where="auto" if container is None else "container" if container else "local",
            ready_timeout_s=timeout_s,
            on_start=show_start,
            on_ready=show_ready,
            on_roll=(lambda text: None) if json else output.hint,
            gateway=front,
        )
    output.hint("stopped")
