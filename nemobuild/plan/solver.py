"""The limits for a card: the largest that its memory allows, and the ledgers that prove it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nemobuild.config import EngineConfig
from nemobuild.model.parallel import balanced_ranges, pipeline_ranges
from nemobuild.model.spec import ModelSpec
from nemobuild.plan import memory
from nemobuild.plan.gpus import Gpu
from nemobuild.plan.memory import Line, RankLedger, Shape
from nemobuild.plan.roofline import decode_ceiling

STEP_TOKENS = (8192, 4096, 2048, 1024)
"""``max_num_tokens`` to choose from: TensorRT-LLM's default first. Prompts longer than a step go in chunks."""
MOST_REQUESTS = 256
_STEP_SHARE = 0.25  # of the head-room, for larger steps than the least
_FRACTION_STEP = 10_000


def pipeline_stages(spec: ModelSpec, profile: EngineConfig) -> list[range]:
    """Blocks of every pipeline rank, as the profile wants them cut."""
    pp = profile.checkpoint.pipeline_parallel
    if profile.build.pipeline_split == "even" or pp == 1:
        return pipeline_ranges(len(spec.blocks), pp)
    return balanced_ranges(memory.block_work(spec, profile), pp)


class Solver:
    """The arithmetic of one (model, profile, card): ledgers for given limits, and the limits for a given card."""

    def __init__(self, spec: ModelSpec, profile: EngineConfig, gpu: Gpu, stages: Sequence[range]) -> None:
        assert profile.machine is not None
        self.spec, self.profile, self.gpu, self.stages = spec, profile, gpu, stages
        self.budget_bytes = int(gpu.memory_bytes * profile.machine.memory_share)
        self.streamed = [0] * len(stages)
        limits = profile.limits
        self.request_tokens = memory.in_blocks(limits.request_tokens)
        self.least_batch = limits.max_batch_size or 1
        self.least_step = profile.build.max_num_tokens or self.cut_step(
            max(STEP_TOKENS[-1], self.least_batch), self.least_batch
        )
        promised = limits.kv_cache_tokens or (limits.max_batch_size or 0) * self.request_tokens
        self.least_kv_tokens = memory.in_blocks(max(limits.max_context_tokens, promised))
        fp8_kv, tp = profile.checkpoint.kv_cache == "fp8", profile.checkpoint.tensor_parallel
        self.kv_bytes = [memory.kv_bytes_per_token(spec, blocks, tp, fp8_kv) for blocks in stages]

    def shapes(self, batch: int, step_tokens: int) -> list[Shape]:
        return memory.shapes(self.profile, self.stages, batch, step_tokens)

    def fixed(self, batch: int, step_tokens: int) -> list[int]:
        """Bytes of every stage's rank without KV cache and reserve."""
        shapes = self.shapes(batch, step_tokens)
        lines = [memory.fixed_lines(self.spec, shape, self.gpu) for shape in shapes]
        return [sum(x.bytes for x in some) - gone for some, gone in zip(lines, self.streamed, strict=True)]

    def kv_room(self, batch: int, step_tokens: int) -> list[int]:
        """Bytes that the KV cache may take on every stage's rank; negative when not even the rest fits."""
        share = self.profile.build.kv_cache_fraction
        fixed = self.fixed(batch, step_tokens)
        if share is None:
            return [self.budget_bytes - used - memory.reserve_bytes(self.gpu) for used in fixed]
        return [min(int(share * (self.gpu.memory_bytes - used)), self.budget_bytes - used) for used in fixed]

    def headroom(self, batch: int, step_tokens: int, kv_tokens: int) -> list[int]:
        room = self.kv_room(batch, step_tokens)
        return [free - kv_tokens * each for free, each in zip(room, self.kv_bytes, strict=True)]

    def stream(self, missing_bytes: int) -> float:
        """Keep as many weights on the host as are missing, by whole percent of the decoder's; the share of them."""
        shapes = self.shapes(self.least_batch, self.least_step)
        decoder = [memory.decoder_bytes(self.spec, shape) for shape in shapes]
        percent = max(min(100, -(-100 * missing_bytes // size)) for size in decoder)
        self.streamed = [size * percent // 100 for size in decoder]
        return percent / 100

    def speed(self, batch: int) -> float:
        shapes = self.shapes(batch, self.least_step)
        return decode_ceiling(self.spec, shapes, self.gpu, batch, self.request_tokens).tokens_per_s_per_request

    def cut_step(self, step_tokens: int, batch: int) -> int:
        """No step is longer than all requests at their longest: trtllm-build would cut it."""
        return min(step_tokens, batch * self.profile.limits.max_context_tokens)

    def choose_step(self) -> tuple[int, str]:
        if self.profile.build.max_num_tokens is not None:
            return self.least_step, "set"
        least = min(self.headroom(self.least_batch, self.least_step, self.least_kv_tokens))
        for tokens in STEP_TOKENS:
            left = min(self.headroom(self.least_batch, tokens, self.least_kv_tokens))
            if tokens >= self.least_batch and left >= least * (1 - _STEP_SHARE):
                why = (
                    "TensorRT-LLM's default"
                    if tokens == STEP_TOKENS[0]
                    else "the largest that leaves room for requests"
                )
                return tokens, f"{why}; longer prompts go in chunks"
        return self.least_step, "the least that works; longer prompts go in chunks"

    def choose_batch(self, step_tokens: int) -> tuple[int, str]:
        limits = self.profile.limits
        if limits.max_batch_size is not None:
            return limits.max_batch_size, "set"
        usual = f"usual requests of {limits.request_tokens:,} tokens"
        most, why = min(MOST_REQUESTS, step_tokens), f"as many as the scheduler handles well, at {usual}"
        if limits.kv_cache_tokens is not None:
            most = min(most, max(1, limits.kv_cache_tokens // self.request_tokens))
        batch = _largest(most, lambda n: min(self.headroom(n, step_tokens, self._tokens_of(n))) >= 0)
        if batch < most:
            why = f"the KV cache holds as many {usual}"
        slowest = limits.min_tokens_per_second
        if slowest is not None and self.speed(batch) < slowest:
            batch = _largest(batch, lambda n: self.speed(n) >= slowest)
            why = f"above it a stream's ceiling is below {slowest:g} tokens/s"
        return (batch if batch < 16 else batch // 8 * 8), why

    def _tokens_of(self, batch: int) -> int:
        return max(self.least_kv_tokens, batch * self.request_tokens)

    def pool(self, batch: int, step_tokens: int) -> int:
        """Tokens in the KV cache of the tightest rank."""
        if self.profile.limits.kv_cache_tokens is not None or not any(self.kv_bytes):
            return self.least_kv_tokens
        room = self.kv_room(batch, step_tokens)
        tokens = min(free // each for free, each in zip(room, self.kv_bytes, strict=True) if each)
        return tokens // memory.TOKENS_PER_BLOCK * memory.TOKENS_PER_BLOCK

    def fraction(self, batch: int, step_tokens: int, kv_tokens: int) -> float:
        """What of the memory that is free after loading gives the pool. Every rank allocates what the least one can."""
        if self.profile.build.kv_cache_fraction is not None:
            return self.profile.build.kv_cache_fraction
        free = [max(1, self.gpu.memory_bytes - used) for used in self.fixed(batch, step_tokens)]
        share = max(kv_tokens * each / some for each, some in zip(self.kv_bytes, free, strict=True))
        return min(0.99, max(0.01, -(-share * _FRACTION_STEP // 1) / _FRACTION_STEP))

    def ledgers(self, batch: int, step_tokens: int, kv_tokens: int, *, fits: bool) -> tuple[RankLedger, ...]:
        least = self.headroom(self.least_batch, self.least_step, self.least_kv_tokens)
        found = []
        for stage, shape in enumerate(self.shapes(batch, step_tokens)):
            lines = memory.fixed_lines(self.spec, shape, self.gpu)
            if self.streamed[stage]:
                lines.append(Line("weights on the host", -self.streamed[stage], "bound", "weight streaming"))
            lines.append(memory.kv_line(kv_tokens, self.kv_bytes[stage]))
            rest_bytes = self.budget_bytes - sum(line.bytes for line in lines)
            kept_bytes = memory.reserve_bytes(self.gpu)
            lines.append(
                Line("reserve and unused", rest_bytes, "estimate", "the rest of the card")
                if fits
                else Line("reserve", kept_bytes, "estimate", "for what estimates miss")
            )
            found.append((shape, lines, self.budget_bytes - least[stage]))
        tp = self.profile.checkpoint.tensor_parallel
        return tuple(
            RankLedger(
                rank=stage * tp + t,
                stage=stage,
                blocks=shape.blocks,
                kv_bytes_per_token=self.kv_bytes[stage],
                budget_bytes=self.budget_bytes,
                needed_bytes=needed,
                lines=tuple(lines),
            )
            for stage, (shape, lines, needed) in enumerate(found)
            for t in range(tp)
        )


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest of 1 to ``most`` for which ``holds``, which is true up to some number; 1 if for none."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
