"""A strict stand-in for the ``docker`` client, with as much of a daemon as a test needs; no isolation.

``run`` refuses unknown flags, images, mounts of what does not exist, and commands that name files outside the mounts or
write below a read-only one. As with the real one the container is no child of the client: killing the client leaves
it, ``docker stop`` ends it. STANDIN_IMAGE is the folder whose ``bin`` stands for the image's, STANDIN_DOCKER_STATE
holds what runs, STANDIN_DOCKER_FAIL makes a call fail in a known way.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
WITH_VALUE = set(
    """--name --gpus --shm-size --ulimit --cap-drop --security-opt --user --env --workdir --network --publish --mount
    --cidfile --ipc""".split()
)
BARE = {"--rm", "--init"}
FAILURES = {
    "daemon": "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
    "permission": "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
    "gpu": 'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
    "old-driver": "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.1, please update",
}
STATE = Path(os.environ.get("STANDIN_DOCKER_STATE", "/tmp"))


def refuse(text, status=125):
    print(text, file=sys.stderr)
    raise SystemExit(status)


def parse(words):
    options, words = [], list(words)
    while words and words[0].startswith("-"):
        word = words.pop(0)
        if word in BARE:
            options.append((word, ""))
        elif word in WITH_VALUE:
            options.append((word, words.pop(0)))
        else:
            refuse(f"unknown flag: {word}\nSee 'docker run --help'.")
    return options, words


def check(options, command):
    given = dict(options)
    gpus = given.get("--gpus", "")
    if not (gpus == "all" or (gpus.startswith('"device=') and gpus.endswith('"'))):
        refuse(f"invalid argument {gpus!r} for --gpus")
    mounts = []
    for name, value in options:
        if name == "--mount":
            fields = dict(part.partition("=")[::2] for part in value.split(","))
            if not set(fields) <= {"type", "source", "target", "readonly"} or fields["type"] != "bind":
                refuse(f"invalid argument {value!r} for --mount")
            if not Path(fields["source"]).exists():
                refuse(f"docker: invalid mount config: bind source path does not exist: {fields['source']}")
            mounts.append((Path(fields["target"]), "readonly" in fields))
    for flag, value in itertools.pairwise(command):
        if value.startswith("/"):
            mine = [readonly for target, readonly in mounts if Path(value).is_relative_to(target)]
            if not mine:
                refuse(f"{value}: No such file or directory", 1)
            if flag.startswith("--output") and all(mine):
                refuse(f"OSError: [Errno 30] Read-only file system: '{value}'", 1)
    if "--cidfile" in given and Path(given["--cidfile"]).exists():
        refuse("docker: container ID file found, make sure the other container isn't running or delete it")
    return given


def run(words):
    options, (image, *command) = parse(words)
    if image != IMAGE:
        refuse(f"Unable to find image '{image}' locally\ndocker: manifest for {image} not found: manifest unknown")
    given = check(options, command)
    if "--cidfile" in given:
        Path(given["--cidfile"]).write_text(uuid.uuid4().hex * 2)
    program = Path(os.environ["STANDIN_IMAGE"]) / "bin" / command[0]
    environment = dict(os.environ)
    environment["PATH"] = f"{program.parent}:{environment['PATH']}"
    container = subprocess.Popen(
        [str(program), *command[1:]], start_new_session=True, cwd=given["--workdir"], env=environment
    )
    record = STATE / given["--name"]
    record.write_text(str(container.pid))
    signal.signal(signal.SIGTERM, lambda *_: container.terminate())
    status = container.wait()
    _end(container.pid)
    record.unlink(missing_ok=True)
    raise SystemExit(128 - status if status < 0 else status)


def info(words):
    if words != ["--format", "{{json .}}"]:
        refuse("unknown flag")
    runtimes = os.environ.get("STANDIN_DOCKER_RUNTIMES", "runc nvidia").split()
    print(
        json.dumps({"ServerVersion": "28.3.2", "Runtimes": {name: {} for name in runtimes}, "DiscoveredDevices": None})
    )


def _end(session):
    """A container ends with every process in it."""
    while alive := _processes(session):
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _processes(session):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if fields[3] == str(session) and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def remove(words):
    if words[0] != "--force":
        refuse(f"unknown flag: {words[0]}")
    record = STATE / words[1]
    if not record.exists():
        refuse(f"Error response from daemon: No such container: {words[1]}", 1)
    _end(int(record.read_text()))
    record.unlink(missing_ok=True)


def stop(words):
    if words[0] != "-t":
        refuse(f"unknown flag: {words[0]}")
    pid = int((STATE / words[2]).read_text())
    deadline = time.monotonic() + float(words[1])
    os.killpg(pid, signal.SIGTERM)
    while time.monotonic() < deadline and Path(f"/proc/{pid}/stat").exists():
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def main():
    fail = os.environ.get("STANDIN_DOCKER_FAIL", "")
    verb, *words = sys.argv[1:]
    if fail in ("daemon", "permission") or (fail and verb == "run"):
        refuse(FAILURES[fail], 1)
    if verb == "version":
        if words != ["--format", "{{.Server.Version}}"]:
            refuse("unknown flag")
        print("28.3.2")
    elif verb == "run":
        run(words)
    elif verb == "stop":
        stop(words)
    elif verb == "rm":
        remove(words)
    elif verb == "info":
        info(words)
    else:
        refuse(f"docker: {verb!r} is not a docker command.")


main()
