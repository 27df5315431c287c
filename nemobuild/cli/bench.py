"""``nemobuild bench``: latency and throughput of a served endpoint, alone or beside another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json

if TYPE_CHECKING:
    from nemobuild.bench.load import Load

_DEFAULT_RATE_S = 20.0


def bench(
    url: Annotated[
        str | None,
        typer.Argument(help="host:port of Triton's gRPC, or http://host:port of an API; default: what runs here."),
    ] = None,
    against: Annotated[str | None, typer.Option(help="A second endpoint, put under the same load in turn.")] = None,
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: requests at once, such as 1,4,16. Default without --rate: 1,4.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: requests per second on average, such as 0.5,1,2.")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Requests at each level; default: 4 for each at once, 20 s of a rate, 16 at least."),
    ] = None,
    duration_s: Annotated[float | None, typer.Option("--duration", min=0.1, help="Or seconds at each level.")] = None,
    reasoning: Annotated[str, typer.Option(help="on, off or auto; several separated by commas.")] = "auto",
    prompts: Annotated[
        Path | None, typer.Option(help="Lines of text, or JSON lines (.jsonl) with a prompt or messages.")
    ] = None,
    input_tokens: Annotated[int | None, typer.Option(min=1, help="Or made-up prompts of about so many tokens.")] = None,
    output_tokens: Annotated[int | None, typer.Option(min=1, help="Answers of exactly so many tokens.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Or of at most so many.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the endpoint's.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before each level that do not count.")] = 2,
    seed: Annotated[int, typer.Option(help="Of made-up prompts and of the intervals of --rate.")] = 1,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait for each piece.")] = 300.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="NEMOBUILD_API_KEY", show_envvar=True, help="Key of the API.")
    ] = None,
    against_api_key: Annotated[
        str | None,
        typer.Option(
            envvar="NEMOBUILD_AGAINST_API_KEY", show_envvar=True, help="Key of --against; --api-key is not sent there."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model of the API; default: its first.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    json: Json = False,
) -> None:
    """Put a served model under load: time to the first token, per token and in whole, tokens per second, errors."""
    from nemobuild.bench.picture import svg_picture
    from nemobuild.bench.report import HEAD, Cell, rows
    from nemobuild.bench.run import Bench, measure
    from nemobuild.errors import RemoteError, UsageError, from_os_error
    from nemobuild.serving import present_endpoint

    modes = reasoning.split(",")
    if unknown := set(modes) - {"on", "off", "auto"}:
        raise UsageError(
            "bad-mode", f"--reasoning has {min(unknown)!r}.", next="Give on, off, auto, or several: on,off"
        )
    for one, first, other, second in (
        ("--prompts", prompts, "--input-tokens", input_tokens),
        ("--output-tokens", output_tokens, "--max-tokens", max_tokens),
        ("--requests", requests, "--duration", duration_s),
    ):
        if first is not None and second is not None:
            raise UsageError("one-of-two", f"{one} and {other} exclude each other.", next="Give one of them.")
    levels = (
        [] if concurrency is None and rate is not None else _levels("--concurrency", concurrency or "1,4", whole=True)
    )
    loads = [_load("concurrency", level, requests, duration_s) for level in levels]
    loads += [_load("rate", level, requests, duration_s) for level in _levels("--rate", rate or "", whole=False)]

    def show(cell: Cell) -> None:
        if not json:
            output.hint(
                f"{cell.url}  reasoning {cell.reasoning}  {cell.kind} {cell.level:g}: {cell.tokens_per_s:.1f} tokens/s"
            )

    cells = measure(
        Bench(
            urls=[url or present_endpoint(), *filter(None, [against])],
            loads=loads,
            modes=modes,
            prompt_file=prompts,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            warm_up=warm_up,
            seed=seed,
            timeout_s=timeout_s,
            api_key=api_key,
            against_api_key=against_api_key,
            model=model,
        ),
        show,
    )
    failures = [(str(count), text) for cell in cells for text, count in cell.errors.items()]
    text = output.table(rows(cells), HEAD) + ("\n\n" + output.table(failures, ("times", "error")) if failures else "")
    output.result({"cells": [cell.as_json() for cell in cells]}, text, as_json=json)
    if svg is not None:
        try:
            svg.write_text(svg_picture(cells), encoding="utf-8")
        except OSError as error:
            raise from_os_error(error, svg, "writing") from error
    if not any(cell.requests > sum(cell.errors.values()) for cell in cells):
        raise RemoteError("all-failed", "Every request failed.", why=failures[0][1] if failures else "None was sent.")


def _load(kind: str, level: float, requests: int | None, duration_s: float | None) -> Load:
    from nemobuild.bench.load import Load

    if requests is None and duration_s is None:
        requests = max(16, round(level * (4 if kind == "concurrency" else _DEFAULT_RATE_S)))
    return Load("concurrency" if kind == "concurrency" else "rate", level, requests, duration_s)


def _levels(option: str, text: str, *, whole: bool) -> list[float]:
    from nemobuild.bench.load import MAX_IN_FLIGHT
    from nemobuild.errors import UsageError

    try:
        levels = [float(int(part) if whole else float(part)) for part in text.split(",") if part]
    except ValueError:
        levels = [0.0]
    if not all(0 < level <= MAX_IN_FLIGHT for level in levels):
        kind = "whole numbers" if whole else "numbers"
        raise UsageError(
            "bad-level", f"{option} is {text!r}.", why=f"It takes {kind} up to {MAX_IN_FLIGHT}, separated by commas."
        )
    return levels
