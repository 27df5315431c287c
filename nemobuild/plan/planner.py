"""``plan``: does it fit, with which limits, and if not, what then. A pure function of model, profile, card, container.

Two questions are kept apart. *Does it fit* is asked of the least that works: the smallest limits, and a KV cache for
what the profile promises (one request of full context; where it names a batch size, so many usual requests). So the
answer never depends on what else the planner chooses, and more memory never turns yes into no. *With which limits* is
then asked of the memory that is left: steps as large as TensorRT-LLM's default where that costs little, as many
requests as their usual tokens fit, and all the rest for the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from nemobuild.config import EngineConfig
from nemobuild.errors import ToolchainError, UsageError
from nemobuild.model.parallel import check_parallel
from nemobuild.model.spec import ModelSpec
from nemobuild.plan import memory
from nemobuild.plan.build_rules import Target, check_profile
from nemobuild.plan.explain import Explained, explain, notes
from nemobuild.plan.gpus import FP8_SM, Gpu, load_gpu
from nemobuild.plan.host import StageNeed, host_needs
from nemobuild.plan.memory import RankLedger, Shape
from nemobuild.plan.solver import Solver, pipeline_stages
from nemobuild.plan.toolchain import Toolchain, load_toolchain
from nemobuild.units import format_bytes

_PARTITION_SINCE = (1, 2)  # llmapi's pp_partition (NVIDIA/TensorRT-LLM pull request 9003)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the profile (field and value), and what it would give."""

    title: str
    change: str
    fits: bool
    headroom_bytes: int


@dataclass(frozen=True)
class Plan:
    """``profile`` has every limit set. ``ranks`` are GPUs; for the runtime ``cpu`` the one ledger is host memory.

    ``headroom_bytes`` is what the tightest rank has beyond the least that works, negative when that much is missing.
    ``kv_cache_tokens`` is the planned pool over all requests, ``kv_cache_bound`` the profile's own bound on it, if any;
    ``concurrency`` says how many requests of how many tokens it holds. ``weights_on_gpu`` is less than 1 with weight
    streaming only.
    """

    name: str
    spec: ModelSpec
    profile: EngineConfig
    limits_explained: tuple[Explained, ...]
    gpu: Gpu | None
    toolchain: Toolchain | None
    shapes: tuple[Shape, ...]
    ranks: tuple[RankLedger, ...]
    host: tuple[StageNeed, ...]
    headroom_bytes: int
    kv_cache_tokens: int
    kv_cache_bound: int | None
    weights_on_gpu: float
    concurrency: Mapping[int, int]
    shortfalls: tuple[str, ...]
    notes: tuple[str, ...]
    remedies: tuple[Remedy, ...] = field(default=())

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    @property
    def max_batch_size(self) -> int:
        return _set(self.profile.limits.max_batch_size)

    @property
    def max_num_tokens(self) -> int:
        """Tokens in one step of an engine on a GPU."""
        return _set(self.profile.build.max_num_tokens)

    @property
    def stages(self) -> tuple[range, ...]:
        """Blocks of every pipeline rank."""
        return tuple(shape.blocks for shape in self.shapes)


def plan(spec: ModelSpec, profile: EngineConfig, *, name: str, gpu: str | Gpu | None = None) -> Plan:
    """The plan of ``profile`` for ``spec``; ``gpu``, a known name or a card, plans for another one.

    What does not fit is no error here: see ``Plan.shortfalls`` and ``Plan.remedies``.

    Raises ``UsageError`` for limits that contradict each other or the model, and ``ToolchainError`` for what card or
    container cannot do.
    """
    from nemobuild.plan.remedies import remedies

    check_limits(spec, profile)
    if profile.machine is None:
        if gpu is not None:
            raise UsageError("no-gpu-needed", f"{name} runs on the CPU.", next="Leave --gpu out.")
        return _cpu_plan(spec, profile, name)
    card = gpu if isinstance(gpu, Gpu) else load_gpu(gpu or profile.machine.gpu)
    profile = profile.model_copy(update={"machine": profile.machine.model_copy(update={"gpu": card.name})})
    made = solve(spec, profile, card, name)
    return made if made.fits else replace(made, remedies=remedies(made, profile))


def check_limits(spec: ModelSpec, profile: EngineConfig) -> None:
    """Raise ``UsageError`` when the limits do not go with the model or with each other."""
    limits = profile.limits
    check_parallel(spec, profile.checkpoint.tensor_parallel, profile.checkpoint.pipeline_parallel)
    if limits.max_context_tokens > spec.max_context_tokens:
        raise UsageError(
            "context-too-long",
            f"limits.max_context_tokens is {limits.max_context_tokens}.",
            why=f"The model was made for {spec.max_context_tokens} tokens.",
            next="Lower it in the profile.",
        )


def solve(spec: ModelSpec, profile: EngineConfig, gpu: Gpu, name: str) -> Plan:
    """The plan for a GPU, without remedies."""
    assert profile.machine is not None
    toolchain = load_toolchain(profile.machine.container)
    _check_card(profile, gpu, toolchain)
    stages = pipeline_stages(spec, profile)
    solver = Solver(spec, profile, gpu, stages)
    step_tokens, batch = solver.least_step, solver.least_batch
    missing = -min(solver.headroom(batch, step_tokens, solver.least_kv_tokens))
    streamed = 0.0
    if missing > 0 and profile.build.weight_streaming:
        streamed = solver.stream(missing)
        missing = -min(solver.headroom(batch, step_tokens, solver.least_kv_tokens))
    shortfalls = []
    if missing > 0:
        shortfalls.append(f"{format_bytes(missing)} are missing on {_who(profile)}.")
    wanted = profile.limits.min_tokens_per_second
    if wanted is not None:
        ceiling = solver.speed(batch)
        if ceiling < wanted:
            shortfalls.append(
                f"A stream gets at most {ceiling:.1f} tokens/s with {batch} at once; limits.min_tokens_per_second is "
                f"{wanted:g}."
            )
    kv_tokens, step_why, batch_why = solver.least_kv_tokens, "the least", "the least"
    if not shortfalls:
        if not streamed:
            step_tokens, step_why = solver.choose_step()
        batch, batch_why = solver.choose_batch(step_tokens)
        cut = solver.cut_step(step_tokens, batch)
        if cut < step_tokens and profile.build.max_num_tokens is None:
            step_tokens, step_why = cut, "max_batch_size requests of the longest context"
        kv_tokens = solver.pool(batch, step_tokens)
    fraction = solver.fraction(batch, step_tokens, kv_tokens)
    limits, build = profile.limits, profile.build
    resolved = profile.model_copy(
        update={
            "limits": limits.model_copy(
                update={
                    "max_batch_size": batch,
                    "kv_cache_tokens": kv_tokens,
                    "max_prompt_tokens": limits.prompt_limit,
                    "thinking_tokens": limits.thinking_tokens or 0,
                }
            ),
            "build": build.model_copy(update={"max_num_tokens": step_tokens, "kv_cache_fraction": fraction}),
        }
    )
    if profile.runtime == "tensorrt" and not shortfalls:
        form = profile.checkpoint
        fp8, fp8_kv = form.precision == "fp8", form.kv_cache == "fp8"
        check_profile(resolved, Target(fp8, fp8_kv, form.ranks, gpu.sm, toolchain.trtllm))
    ranks = solver.ledgers(batch, step_tokens, kv_tokens, fits=not shortfalls)
    why = {
        "limits.max_batch_size": batch_why,
        "build.max_num_tokens": step_why,
        "limits.kv_cache_tokens": "all that is left, in whole KV blocks" if not shortfalls else "the least",
        "build.kv_cache_fraction": "gives that pool of what is free after loading",
    }
    return Plan(
        name=name,
        spec=spec,
        profile=resolved,
        limits_explained=explain(profile, resolved, why),
        gpu=gpu,
        toolchain=toolchain,
        shapes=tuple(solver.shapes(batch, step_tokens)),
        ranks=ranks,
        host=host_needs(spec, profile, [rank.weight_bytes for rank in ranks]),
        headroom_bytes=-missing,
        kv_cache_tokens=kv_tokens,
        kv_cache_bound=limits.kv_cache_tokens,
        weights_on_gpu=1.0 - streamed,
        concurrency={} if shortfalls else concurrency(kv_tokens, limits.max_context_tokens),
        shortfalls=tuple(shortfalls),
        notes=tuple(notes(spec, profile, gpu, toolchain, stages)),
    )


def concurrency(kv_tokens: int, longest: int) -> dict[int, int]:
    """Requests that a KV cache of ``kv_tokens`` holds, for contexts by powers of two up to the longest."""
    contexts = [longest]
    size = 1 << (longest - 1).bit_length() >> 1
    while size >= 1024 and len(contexts) < 7:
        contexts.append(size)
        size >>= 1
    return {tokens: kv_tokens // memory.in_blocks(tokens) for tokens in contexts}


def _check_card(profile: EngineConfig, gpu: Gpu, toolchain: Toolchain) -> None:
    if profile.checkpoint.precision == "fp8" and not gpu.fp8:
        raise ToolchainError(
            "no-fp8-on-gpu",
            f"checkpoint.precision is fp8, and the {gpu.title} has no FP8 tensor cores.",
            why=f"It has compute capability {gpu.sm[0]}.{gpu.sm[1]}; FP8 needs {FP8_SM[0]}.{FP8_SM[1]}.",
            next="Take precision bf16 on more cards, or a card of the Ada, Hopper or Blackwell line.",
        )
    if profile.runtime not in toolchain.runtimes:
        raise ToolchainError(
            "runtime-not-in-container",
            f"The container {toolchain.tag} does not carry the runtime {profile.runtime}.",
            why=f"It has TensorRT-LLM {toolchain.trtllm} with: {', '.join(toolchain.runtimes)}.",
            next="Choose another machine.container or runtime.",
        )
    if profile.build.pipeline_split == "balanced" and toolchain.line < _PARTITION_SINCE:
        raise ToolchainError(
            "no-uneven-split",
            f"build.pipeline_split is balanced, and TensorRT-LLM {toolchain.trtllm} cuts evenly only.",
            why="pp_partition came with TensorRT-LLM 1.2.",
            next="Choose machine.container 26.03 or newer, or pipeline_split even.",
        )


def _who(profile: EngineConfig) -> str:
    return "the GPU" if profile.checkpoint.ranks == 1 else "the tightest GPU"


def _cpu_plan(spec: ModelSpec, profile: EngineConfig, name: str) -> Plan:
    limits = profile.limits
    tokens = limits.kv_pool_tokens
    resolved = profile.model_copy(
        update={
            "limits": limits.model_copy(
                update={
                    "kv_cache_tokens": tokens,
                    "max_prompt_tokens": limits.prompt_limit,
                    "thinking_tokens": limits.thinking_tokens or 0,
                }
            )
        }
    )
    lines = tuple(memory.cpu_lines(spec, profile))
    used = sum(line.bytes for line in lines)
    whole = range(len(spec.blocks))
    ledger = RankLedger(0, 0, whole, spec.kv_bytes_per_token(4), used, used, lines)
    return Plan(
        name=name,
        spec=spec,
        profile=resolved,
        limits_explained=explain(profile, resolved, {"limits.kv_cache_tokens": "batch size x context"}),
        gpu=None,
        toolchain=None,
        shapes=(),
        ranks=(ledger,),
        host=host_needs(spec, profile, [memory.checkpoint_bytes(spec, profile)]),
        headroom_bytes=0,
        kv_cache_tokens=tokens,
        kv_cache_bound=limits.kv_cache_tokens,
        weights_on_gpu=1.0,
        concurrency=concurrency(tokens, limits.max_context_tokens),
        shortfalls=(),
        notes=("The ledger is memory of this machine; the engine looks at what is free before it loads.",),
    )


def _set(value: int | None) -> int:
    if value is None:
        raise ValueError("this limit belongs to a GPU")
    return value
