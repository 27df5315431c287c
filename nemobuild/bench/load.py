"""Put an endpoint under load, in a closed or an open loop, and note when everything came.

Closed: so many clients, each sends its next request when it has its answer. Open: requests are sent when they are due,
at random intervals of a given mean, however slow the answers are; their times count from when they were due, so that
a server that stalls cannot hide it by slowing down the clients.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemobuild.bench.prompts import Prompts
from nemobuild.bench.targets import Failed, Target

MAX_IN_FLIGHT = 4096
_VISIBLE = ("text_output", "reasoning_output", "tool_calls")


@dataclass(frozen=True, slots=True)
class Load:
    """One level of load. It ends after ``requests``, or when ``duration_s`` is over and what was begun is done."""

    kind: Literal["concurrency", "rate"]
    level: float
    requests: int | None = None
    duration_s: float | None = None


@dataclass(slots=True)
class Sample:
    """One request; seconds of one clock. ``arrivals_s`` are those of the pieces that a user sees."""

    due_s: float
    arrivals_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


async def put_under_load(
    target: Target, load: Load, prompts: Prompts, fields: Mapping[str, Any], *, timeout_s: float, seed: int
) -> list[Sample]:
    """The samples of all requests, in the order in which they ended."""
    samples: list[Sample] = []
    numbers = itertools.count() if load.requests is None else iter(range(load.requests))
    end_s = time.perf_counter() + (load.duration_s if load.duration_s is not None else float("inf"))

    async def send(number: int, due_s: float) -> None:
        sample = Sample(due_s)
        await _ask(target, {"messages": prompts(number), **fields}, sample, timeout_s)
        samples.append(sample)

    async def client() -> None:
        for number in numbers:
            if time.perf_counter() >= end_s:
                return
            await send(number, time.perf_counter())

    if load.kind == "concurrency":
        await asyncio.gather(*(client() for _ in range(int(load.level))))
        return samples
    chance, due_s, running = random.Random(seed), time.perf_counter(), set[asyncio.Task[None]]()
    try:
        for number in numbers:
            due_s += chance.expovariate(load.level)
            if due_s >= end_s:
                break
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            if len(running) >= MAX_IN_FLIGHT:
                samples.append(Sample(due_s, end_s=due_s, error=f"not sent: {MAX_IN_FLIGHT} requests are in flight"))
                continue
            task = asyncio.create_task(send(number, due_s))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
    return samples


async def _ask(target: Target, fields: Mapping[str, Any], sample: Sample, timeout_s: float) -> None:
    try:
        async for outputs in target.ask(fields, timeout_s):
            if any(outputs.get(name) for name in _VISIBLE):
                sample.arrivals_s.append(time.perf_counter())
            sample.outputs |= outputs
        if "finish_reason" not in sample.outputs:
            sample.error = "the answer ended without a reason"
    except Failed as error:
        sample.error = str(error)
    sample.end_s = time.perf_counter()
