"""Options that several commands share, defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to make; it must not exist.")]
Events = Annotated[bool, typer.Option("--events", help="What happens as JSON lines on standard output.")]

OpenAi = Annotated[bool, typer.Option("--openai", help="Also serve OpenAI's API and a page to talk on.")]
OpenAiHost = Annotated[
    str | None, typer.Option(help="Address of the gateway; default: 127.0.0.1. Others need --api-keys.")
]
OpenAiPort = Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8080, or a free one.")]
ApiKeys = Annotated[
    Path | None, typer.Option(help="File of hashed keys, made by `nemobuild key`; the gateway then asks for one.")
]
ReadyTimeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait until it is ready.")]
