"""The main job for real, as a user would type it: weights to a streamed answer from a real Triton, on the CPU."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PROFILE = "smollm2-nas-cpu-fp8"
QUESTION = "What is the capital of France?"


def run(*arguments: str) -> None:
    """Show a command and run it; end with its status if it fails."""
    print("\n$ nemobuild " + " ".join(f'"{a}"' if " " in a else a for a in arguments), flush=True)
    done = subprocess.run([sys.executable, "-m", "nemobuild", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def serve() -> subprocess.Popen[str]:
    """Start ``nemobuild serve`` and wait for the line that says it is ready."""
    print(f"\n$ nemobuild serve {PROFILE} &", flush=True)
    command = [sys.executable, "-m", "nemobuild", "serve", PROFILE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(process.wait())
    print(line, end="", flush=True)
    return process


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    begin = time.monotonic()
    for stage in ("checkpoint", "repository"):
        shutil.rmtree(Path("build") / PROFILE / stage, ignore_errors=True)
    run("fetch", "smollm2-cpu")  # the model as it was published: uniform blocks
    run("fetch", PROFILE)  # the same, block-wise, with the attention of two blocks removed
    run("inspect", PROFILE)
    run("convert", PROFILE)
    run("verify", PROFILE)
    run("repo", PROFILE)
    server = serve()
    try:
        run("chat", QUESTION, "--temperature", "0")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    run("inspect", "super-49b-v1.5")  # its configuration is known offline
    print(
        f"\nDone in {time.monotonic() - begin:.0f} s. Next, keep it running in one terminal and talk to it in another:"
    )
    print(f"  .venv/bin/nemobuild serve {PROFILE}\n  .venv/bin/nemobuild chat")


if __name__ == "__main__":
    main()
