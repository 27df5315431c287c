"""The candidate, and the version before it, through a real Triton: answers to the prompts, and speed.

With room for both they run side by side and are measured in turn, so that a slow hour of the machine meets both.
On a GPU, which the server takes whole, they run one after the other in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from nemobuild.bench.load import Load
from nemobuild.bench.report import Cell
from nemobuild.bench.run import Bench, measure
from nemobuild.config import EngineConfig, GatesConfig, reasoning_policy
from nemobuild.engine.cpu.memory import available_memory_bytes
from nemobuild.errors import NemobuildError, from_os_error
from nemobuild.gates import conformance
from nemobuild.gates.conformance import Facts
from nemobuild.gates.prompts import Answer, ask_all, fitting, load_prompts
from nemobuild.gates.results import Check, Gate, at_least, at_most
from nemobuild.triton.launch import Where, read_emitted
from nemobuild.triton.server import choose_endpoint, running

_REQUESTS_PER_CLIENT = 4
_SERVER_BYTES = 2 << 30  # Triton and its Python models beside the weights


@dataclass(frozen=True, slots=True)
class Served:
    """What one repository did while it was up."""

    answers: list[Answer]
    cells: list[Cell] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)


def put_to_work(
    repositories: Mapping[str, Path],
    profile: EngineConfig,
    logs: Path,
    *,
    may_fail: Collection[str] = (),
    conforming: bool = False,
    where: Where = "auto",
    ready_timeout_s: float = 1800.0,
    on_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Served]:
    """Serve each of ``repositories`` (name -> folder), ask it the prompts, and measure its speed.

    One of ``may_fail`` that does not start is left out. Raises as ``running`` does when another does not.
    ``conforming`` also notes what ``conformance`` compares.
    """
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, logs, "making the folder") from error
    names = list(repositories)
    groups = [names] if have_room(list(repositories.values())) else [[name] for name in names]
    found: dict[str, Served] = {}
    for group in groups:
        with ExitStack() as stack:
            urls: dict[str, str] = {}
            for name in group:
                on_note(f"starting {name}")
                endpoint, log = choose_endpoint(ports=(0, 0, 0)), logs / f"{name}.triton.log"
                server = running(repositories[name], endpoint, log, where=where, ready_timeout_s=ready_timeout_s)
                try:
                    stack.enter_context(server)
                except NemobuildError as error:
                    if name not in may_fail:
                        raise
                    on_note(f"{name} does not start, so it is not compared with: {error}")
                else:
                    urls[name] = endpoint.grpc_url
            for name, url in urls.items():
                on_note(f"asking {name}")
                facts = conformance.facts(url, reasoning_policy(profile.reasoning.policy)) if conforming else {}
                found[name] = Served(_answers(url, profile), facts=facts)
            on_note(f"measuring the speed of {' and '.join(urls)}")
            for round_number in range(profile.gates.rounds):
                order = list(urls)[:: -1 if round_number % 2 else 1]  # neither is always the first
                cells = measure(_bench([urls[name] for name in order], profile.gates, seed=round_number))
                for name, cell in zip(order, cells, strict=True):
                    found[name].cells.append(cell)
    return found


def have_room(repositories: Sequence[Path]) -> bool:
    """Whether all of them can be served at once: on the CPU only, and when the memory holds all weights."""
    if any(read_emitted(folder).runtime != "cpu" for folder in repositories):
        return False
    needed = sum(_SERVER_BYTES + sum(f.stat().st_size for f in d.rglob("*") if f.is_file()) for d in repositories)
    free = available_memory_bytes()
    return free is None or needed <= free


def speed_gate(cells: Sequence[Cell], before: Sequence[Cell] | None, gates: GatesConfig) -> Gate:
    """The gate ``speed``: medians over the rounds, against those of the version before in the same run."""
    failed = sum(sum(cell.errors.values()) for cell in cells)
    speed, wait = _speed(cells), _wait(cells)
    checks = [
        at_most("requests that failed", failed, 0, "d"),
        Check("tokens per second", f"{speed:.1f}", "", None),
        Check("median wait for the first token", f"{wait * 1000:.0f} ms", "", None),
    ]
    if before is not None:
        fast, short = _speed(before), _wait(before)
        share, longer = (speed / fast if fast else 1.0), (wait / short - 1 if short else 0.0)
        checks += [
            at_least("tokens per second over those of the version before", share, 1 - gates.max_slowdown, ".1%"),
            at_most("longer wait than the version before", longer, gates.max_wait_increase, "+.1%"),
        ]
    details: dict[str, Any] = {"cells": [cell.as_json() for cell in cells]}
    if before is not None:
        details["before"] = [cell.as_json() for cell in before]
    return Gate("speed", tuple(checks), sum(cell.elapsed_s for cell in cells), details=details)


def _answers(url: str, profile: EngineConfig) -> list[Answer]:
    policy = reasoning_policy(profile.reasoning.policy)
    path = None if profile.gates.prompts is None else Path(profile.gates.prompts)
    limit_tokens = profile.limits.max_context_tokens // 2
    return ask_all(url, fitting(load_prompts(path), policy), policy, limit_tokens=limit_tokens)


def _bench(urls: Sequence[str], gates: GatesConfig, *, seed: int) -> Bench:
    load = Load("concurrency", gates.concurrency, gates.concurrency * _REQUESTS_PER_CLIENT)
    return Bench(urls, [load], output_tokens=gates.output_tokens, temperature=0.0, seed=seed)


def _speed(cells: Sequence[Cell]) -> float:
    return median(cell.tokens_per_s for cell in cells)


def _wait(cells: Sequence[Cell]) -> float:
    return median(cell.first_token.p50 if cell.first_token.p50 is not None else float("nan") for cell in cells)
