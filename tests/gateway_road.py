"""A scripted model behind Triton and the gateway, for the tests of both and of what asks them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemobuild.convert.executor import convert
from nemobuild.gateway.process import GatewayProcess, listening, url_of
from nemobuild.model.hf_config import load_json
from nemobuild.triton.launch import Endpoint
from nemobuild.triton.repository import plan_repository, write_repository
from nemobuild.triton.server import choose_endpoint, running
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.plans import planned
from tests.scripted import CLOSED, write_scripted

REASONING = "\nशायद … ลองคิดดู <TOOLCALL> is only quoted 🤔\nNow then.\n"
ANSWER = "\n\nสวัสดีครับ, नमस्ते! Grüße 👩‍👩‍👧‍👦🏳️‍🌈 fertig."
CALLS = '[{"name": "get_weather", "arguments": {"city": "Zürich"}}, {"name": "now", "arguments": {}}]'
OFF_ANSWER = "Sofort: ตอบทันที, तुरंत 🙂. STOP here, not this."
LOOP = "L"  # a prompt that ends so is answered without end
SCRIPTS = {
    "\n": f"<think>{REASONING}</think>{ANSWER}<TOOLCALL>{CALLS}</TOOLCALL>",
    CLOSED: OFF_ANSWER,
    LOOP: "round and round, ",
}
MODEL = "tiny"
HI = [{"role": "user", "content": "Hi"}]


ENDLESS = 40_000  # tokens: more than any of these tests waits for


def write_road(folder: Path, context_tokens: int = 50_000) -> Path:
    """An emitted repository whose model says ``SCRIPTS``."""
    source = write_scripted(folder / "hf", SCRIPTS, templates.SUPER_V15.replace("tool_notes", "''"), loops=(LOOP,))
    checkpoint = convert(open_snapshot(source), folder / "checkpoint").output
    plan = planned(
        config=load_json(source / "config.json"),
        limits={
            "max_batch_size": 16,
            "max_context_tokens": context_tokens,
            "default_max_tokens": 400,
            "kv_cache_tokens": 16 * context_tokens,
            "max_queue_size": 16,
        },
        reasoning={"policy": "nemotron-super-v1.5", "default": "on"},
    )
    return write_repository(plan_repository(plan, source, checkpoint), folder / "repository")


@dataclass(frozen=True)
class Road:
    """Where everything listens: ``url`` is the gateway's, without a path."""

    triton: Endpoint
    url: str
    gateway: GatewayProcess
    gateway_log: Path


@contextlib.contextmanager
def served(repository: Path, logs: Path, api_keys: Path | None = None) -> Iterator[Road]:
    endpoint = choose_endpoint(ports=(0, 0, 0))
    assets = repository / "chat" / "1" / "assets"
    log = logs / "gateway.log"
    with (
        running(repository, endpoint, logs / "triton.log", ready_timeout_s=120),
        listening("127.0.0.1", 0, api_keys) as bound,
    ):
        gateway = GatewayProcess(bound, endpoint, assets, api_keys, log)
        try:
            yield Road(endpoint, url_of(bound), gateway, log)
        finally:
            gateway.stop()
