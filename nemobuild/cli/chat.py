"""``nemobuild chat``: ask a served model; the answer streams."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nemobuild.cli import output
from nemobuild.cli.options import Json


def chat(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, standard input is read.")] = None,
    url: Annotated[str | None, typer.Option(help="gRPC address; default: the server that runs here.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    reasoning: Annotated[str | None, typer.Option(help="on, off or auto.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Bound on all generated tokens.")] = None,
    max_thinking_tokens: Annotated[int | None, typer.Option(help="Bound on the tokens of the reasoning.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Between 0 and 1.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the answer; may be repeated.")] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON file with OpenAI-style function tools.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds to wait for each piece.")] = 300.0,
    json: Json = False,
) -> None:
    """Ask a served model. The answer goes to standard output as it comes; reasoning is shown dimmed, apart from it.

    In a terminal without PROMPT this is a conversation; end it with Ctrl-D.
    """
    from nemobuild.conversation import Conversation
    from nemobuild.serving import present_endpoint

    fields: dict[str, Any] = {
        "reasoning_mode": reasoning,
        "max_tokens": max_tokens,
        "max_thinking_tokens": max_thinking_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop_words": stop,
    }
    talk = Conversation(url or present_endpoint(), fields, system=system, tools=tools, timeout_s=timeout_s)
    if prompt is None and sys.stdin.isatty():
        while (line := _read_line()) is not None:
            if line.strip():
                _show(talk, line, as_json=json)
        return
    _show(talk, output.read_input() if prompt is None else prompt, as_json=json)


def _show(talk: Any, prompt: str, *, as_json: bool) -> None:
    """Print the pieces of one answer; where reasoning ends and the answer begins, an empty line."""
    part = ""
    for kind, text in talk.ask(prompt):
        if as_json:
            continue
        if kind == "reasoning" and not sys.stdout.isatty():
            continue  # in a pipe only the answer counts
        if part == "reasoning" and kind != part:
            output.piece("\n\n")
        output.piece(text, dim=kind == "reasoning")
        part = kind
    output.result(talk.last, "", as_json=as_json)


def _read_line() -> str | None:
    try:
        return input("> ")
    except EOFError:
        return None
