"""Options that several commands share, defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to make; it must not exist.")]
Events = Annotated[bool, typer.Option("--events", help="What happens as JSON lines on standard output.")]
