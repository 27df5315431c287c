"""A Compose file for one machine."""

from __future__ import annotations

from typing import Any

from nemobuild.deploy.served import GRACE_S, KEYS_FILE, KEYS_FOLDER, REPOSITORY, TMP_BYTES, Options, on_one_node
from nemobuild.deploy.text import document
from nemobuild.engine.container import SHM_BYTES, STACK_BYTES
from nemobuild.gateway.process import DEFAULT_PORT
from nemobuild.plan.planner import Plan

_HEALTH = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{DEFAULT_PORT}/health', timeout=8)"
_HEAD = """\
{name} by Compose, made by nemobuild from its plan.
    docker compose build                        # once; the Dockerfile says what it needs beside it
    nemobuild key NAME --file api-keys.txt      # once; shows the key, keeps its hash
    NEMOBUILD_USER=$(id -u):$(id -g) docker compose up --wait
REPOSITORY is the model repository; it and the keys must be readable for NEMOBUILD_USER.
Ready is when a token was generated. Triton is reachable for the gateway only."""


def compose(plan: Plan, options: Options) -> dict[str, str]:
    """``{"compose.yaml": text}``. Raises as ``on_one_node`` does."""
    what = on_one_node(plan, options)
    service: dict[str, Any] = {
        "image": what.image,
        "build": {"context": "."},
        "command": list(what.arguments),
        "restart": "unless-stopped",
        "init": True,
        "user": "${NEMOBUILD_USER:-1000:1000}",
        "read_only": True,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "tmpfs": [f"/tmp:size={TMP_BYTES},mode=1777"],
        "shm_size": SHM_BYTES,
        "ulimits": {"memlock": -1, "stack": STACK_BYTES},
        "stop_grace_period": f"{GRACE_S}s",
        "ports": [f"${{ADDRESS:-127.0.0.1}}:${{PORT:-{DEFAULT_PORT}}}:{DEFAULT_PORT}"],
        "volumes": [
            {
                "type": "bind",
                "source": "${REPOSITORY:-../../repository}",
                "target": REPOSITORY,
                "read_only": True,
                "bind": {"create_host_path": False},
            }
        ],
        "secrets": [{"source": "api-keys", "target": f"{KEYS_FOLDER}/{KEYS_FILE}"}],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", _HEALTH],
            "interval": "10s",
            "timeout": "10s",
            "retries": 6,
            "start_period": f"{what.ready_timeout_s}s",
        },
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "3"}},
        "deploy": {"resources": {"limits": {"memory": str(what.memory_bytes)}}},
    }
    if what.gpus:
        card = {"driver": "nvidia", "count": what.gpus, "capabilities": ["gpu"]}
        service["deploy"]["resources"]["reservations"] = {"devices": [card]}
    file = {
        "name": what.name,
        "services": {"model": service},
        "secrets": {"api-keys": {"file": f"${{API_KEYS:-./{KEYS_FILE}}}"}},
    }
    return {"compose.yaml": document(_HEAD.format(name=plan.name), file)}
