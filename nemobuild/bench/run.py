"""``nemobuild bench``: every level of load in every reasoning mode on every endpoint, one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nemobuild.bench.load import Load, Sample, put_under_load
from nemobuild.bench.prompts import Prompts, prompts_from_file, short_prompts, sized_prompts
from nemobuild.bench.report import Cell, summarise
from nemobuild.bench.targets import Target, open_target

_MOST_REQUESTS = 1_000_000  # of a cell


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured. ``urls`` are put under the same load in turn, so that slow changes of the machine meet both."""

    urls: Sequence[str]
    loads: Sequence[Load]
    modes: Sequence[str] = ("auto",)
    prompt_file: Path | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    warm_up: int = 2
    seed: int = 1
    timeout_s: float = 300.0
    api_key: str | None = None
    against_api_key: str | None = None
    model: str | None = None

    def fields(self, mode: str) -> dict[str, Any]:
        """Fields of ``chat`` beside the messages. ``auto`` is the endpoint's default, and is not sent."""
        asked = {
            "reasoning_mode": None if mode == "auto" else mode,
            "max_tokens": self.output_tokens or self.max_tokens,
            "min_tokens": self.output_tokens,
            "temperature": self.temperature,
        }
        return {name: value for name, value in asked.items() if value is not None}


def measure(bench: Bench, on_cell: Callable[[Cell], None] = lambda cell: None) -> list[Cell]:
    """Carry ``bench`` out. Raises ``RemoteError`` when an endpoint does not answer; failed requests are counted."""
    return asyncio.run(_measure(bench, on_cell))


async def _measure(bench: Bench, on_cell: Callable[[Cell], None]) -> list[Cell]:
    cells: list[Cell] = []
    async with AsyncExitStack() as stack:
        targets: list[tuple[Target, Prompts]] = []
        for url, api_key in zip(bench.urls, (bench.api_key, bench.against_api_key), strict=False):
            target = await open_target(url, api_key=api_key, model=bench.model)
            stack.push_async_callback(target.close)
            targets.append((target, await _prompts(bench, target)))
        for at, (mode, load, (target, prompts)) in enumerate(product(bench.modes, bench.loads, targets)):
            cells.append(await _cell(bench, target, _others(prompts, at), mode, load))
            on_cell(cells[-1])
    return cells


async def _prompts(bench: Bench, target: Target) -> Prompts:
    if bench.prompt_file is not None:
        return prompts_from_file(bench.prompt_file)
    if bench.input_tokens is not None:
        return await sized_prompts(target, bench.input_tokens, bench.seed)
    return short_prompts(bench.seed)


def _others(prompts: Prompts, cell: int) -> Prompts:
    """``prompts`` from another place on in each cell: what was asked before would be found in the KV cache."""
    return lambda number: prompts(cell * _MOST_REQUESTS + number)


async def _cell(bench: Bench, target: Target, prompts: Prompts, mode: str, load: Load) -> Cell:
    async def run(load: Load, prompts: Prompts) -> list[Sample]:
        return await put_under_load(
            target, load, prompts, bench.fields(mode), timeout_s=bench.timeout_s, seed=bench.seed
        )

    await run(Load("concurrency", 1, bench.warm_up), lambda number: prompts(-1 - number))
    return summarise(target.url, mode, load, await run(load, prompts))
