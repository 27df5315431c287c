"""Run the runnable blocks of the documentation, page by page, as a reader would.

A block marked ``sh`` or ``python`` is run; one marked ``console``, ``yaml`` or ``text`` is only shown. All blocks of a
page run in one shell, in a folder of their own, with this environment's programs first on PATH, so that a later block
finds the files and the server of an earlier one. A ``text`` block that follows a runnable one is what that one prints:
each of its lines must be part of a line of the output, in that order.

    python scripts/run_docs.py [PAGE ...]      # default: every page of docs/ that has a runnable block
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
_FENCE = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_PORT = "8080"  # the one that pages name; another one is taken, so that a server of the reader is left in peace
TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Block:
    """A runnable block at line ``line``, and the lines that it must print."""

    line: int
    kind: str
    text: str
    printed: tuple[str, ...]


def blocks(page: str) -> list[Block]:
    """The runnable blocks of ``page``, in order."""
    fences = list(_FENCE.finditer(page))
    found = []
    for k, fence in enumerate(fences):
        if fence["kind"] not in ("sh", "python"):
            continue
        after = fences[k + 1] if k + 1 < len(fences) else None
        between = page[fence.end() : after.start()].strip() if after else "no"
        printed = tuple(after["text"].splitlines()) if after and after["kind"] == "text" and not between else ()
        found.append(Block(page.count("\n", 0, fence.start()) + 1, fence["kind"], fence["text"], printed))
    return found


def script(found: list[Block], outputs: Path) -> str:
    """One shell script; the output of block k goes to ``outputs/k``."""
    clean = "trap 'status=$?; kill $(jobs -p) 2>/dev/null || :; wait || :; exit $status' EXIT"
    lines = ["set -euo pipefail", "set -m", clean]
    for k, block in enumerate(found):
        lines.append(f"exec > {shlex.quote(str(outputs / str(k)))} 2>&1")
        lines.append(block.text if block.kind == "sh" else f"python - <<'END_OF_BLOCK'\n{block.text}END_OF_BLOCK")
    return "\n".join(lines) + "\n"


def missing(block: Block, output: str) -> str | None:
    """The first line that ``block`` should have printed and did not."""
    rest = iter(output.splitlines())
    return next((line for line in block.printed if not any(line.strip() in seen for seen in rest)), None)


def run_page(page: Path, folder: Path) -> list[str]:
    """Run ``page`` in ``folder``; what is wrong, or nothing."""
    found = blocks(page.read_text(encoding="utf-8"))
    outputs = folder / ".outputs"
    outputs.mkdir(parents=True)
    text = script(found, outputs).replace(_PORT, str(_free_port()))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "XDG_STATE_HOME": str(folder / ".state"), "COLUMNS": "120"}
    environment.pop("NEMOBUILD_STORE", None)
    process = subprocess.Popen(["bash", "-c", text], cwd=folder, env=environment, start_new_session=True)
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = -1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    wrong = []
    for k, block in enumerate(found):
        output = outputs / str(k)
        where = f"{page.name}, the block at line {block.line}"
        if not output.exists():
            return [*wrong, f"{where} was not reached"]
        said = output.read_text(encoding="utf-8", errors="replace")
        line = missing(block, said)
        if line is not None:
            wrong.append(f"{where} did not print {line!r} but:\n{said[-3000:]}")
    if status and not wrong:
        last = outputs / str(max(int(file.name) for file in outputs.iterdir()))
        wrong.append(f"{page.name} ended with status {status}:\n{last.read_text(errors='replace')[-3000:]}")
    return wrong


def runnable_pages() -> list[Path]:
    return [page for page in sorted(DOCS.rglob("*.md")) if blocks(page.read_text(encoding="utf-8"))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    pages = [Path(name) for name in sys.argv[1:]] or runnable_pages()
    wrong = []
    for page in pages:
        print(f"running {page}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            wrong += run_page(page, Path(folder))
    print("\n".join(wrong) or f"{len(pages)} pages ran")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
