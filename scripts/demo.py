"""The main job for real, as a user would type it: weights to a streamed answer from a real Triton, on the CPU."""

from __future__ import annotations

import os
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


def up() -> subprocess.Popen[str]:
    """Start ``nemobuild up`` and wait for the line that says it is ready."""
    print(f"\n$ nemobuild up {PROFILE} &", flush=True)
    command = [sys.executable, "-m", "nemobuild", "up", PROFILE]
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
    shutil.rmtree(Path("build") / PROFILE, ignore_errors=True)
    os.environ["NEMOBUILD_STORE"] = str(Path("build") / PROFILE / "store")  # nothing of an earlier run is used
    run("inspect", "super-49b-v1.5")  # its configuration is known offline
    run("plan", PROFILE)
    server = up()  # a small model of the same kind: the attention of two of its blocks is removed
    try:
        run("chat", QUESTION, "--temperature", "0")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    run("inspect", PROFILE)
    run("verify", PROFILE)  # what the conversion to FP8 cost
    run("build", PROFILE, "--dry-run")  # nothing is left to do
    print(
        f"\nDone in {time.monotonic() - begin:.0f} s. Next, keep it running in one terminal and talk to it in another:"
    )
    print(f"  .venv/bin/nemobuild up {PROFILE}\n  .venv/bin/nemobuild chat")


if __name__ == "__main__":
    main()
