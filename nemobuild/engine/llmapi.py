"""The ``llmapi`` runtime: a Hugging Face folder, run by ``tensorrt_llm.LLM``. Nothing is built, all is arguments.

``LLM`` refuses an argument that it does not know, and the arguments change with its version. So each stands here with
the versions that know it, and ``model.yaml`` gets those of the pinned version only. ``engine_configs/llm_args.yaml``
holds all that a version knows, for the check of files that a person changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemobuild.config import read_yaml
from nemobuild.errors import ToolchainError
from nemobuild.plan.planner import Plan
from nemobuild.resources import data_folder

Version = tuple[int, ...]
NEWEST: Version = (1 << 30,)


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of ``LLM``, nested by dots, known from ``since`` and before ``before``.

    A ``value`` of None leaves it out.
    """

    name: str
    value: Callable[[Plan], Any]
    since: Version = (1, 0)
    before: Version = NEWEST


def _partition(plan: Plan) -> list[int] | None:
    """Blocks per pipeline rank, where they are not the even split that ``LLM`` makes itself."""
    return [len(stage) for stage in plan.stages] if plan.profile.build.pipeline_split == "balanced" else None


# ``skip_tokenizer_init``: token ids go in and out. KV cache precision and model precision follow the folder ("auto").
# The default sampler of 1.0 to 1.2 takes penalties, bad words and seeds and silently does nothing with them, so the
# C++ one is named. 1.3 gives that one up; by 1.3.0rc26 the other had learned all three (pull requests 16052, 16485
# and 17172 of NVIDIA/TensorRT-LLM).
ARGUMENTS: tuple[Argument, ...] = (
    Argument("backend", lambda _: "pytorch", before=(1, 3)),
    Argument("trust_remote_code", lambda plan: plan.spec.model_type != "llama"),
    Argument("skip_tokenizer_init", lambda _: True),
    Argument("tensor_parallel_size", lambda plan: plan.profile.checkpoint.tensor_parallel),
    Argument("pipeline_parallel_size", lambda plan: plan.profile.checkpoint.pipeline_parallel),
    Argument("pp_partition", _partition, since=(1, 2)),
    Argument("max_batch_size", lambda plan: plan.profile.limits.max_batch_size),
    Argument("max_num_tokens", lambda plan: plan.profile.build.max_num_tokens),
    Argument("max_seq_len", lambda plan: plan.profile.limits.max_context_tokens),
    Argument("enable_chunked_prefill", lambda _: True),
    Argument("kv_cache_config.free_gpu_memory_fraction", lambda plan: plan.profile.build.kv_cache_fraction),
    Argument("kv_cache_config.max_tokens", lambda plan: plan.kv_cache_bound),
    Argument("kv_cache_config.enable_block_reuse", lambda _: True),
    Argument("cuda_graph_config.enable_padding", lambda _: True),
    Argument("cuda_graph_config.max_batch_size", lambda plan: plan.profile.limits.max_batch_size),
    Argument("enable_trtllm_sampler", lambda _: True, before=(1, 1)),
    Argument("sampler_type", lambda _: "TRTLLMSampler", since=(1, 1), before=(1, 3)),
)
# How ``SamplingParams.logprobs`` asks for the sampled token's: with 0 from 1.3 on; before, 0 asks for nothing.
_LOG_PROBS = {(1, 0): 1, (1, 3): 0}
_FIRST_WHOLE_1_3 = (1, 3, 0, 26)


def model_yaml(plan: Plan, model: str) -> dict[str, Any]:
    """Content of ``model.yaml``: arguments of ``LLM`` for the folder ``model``, and our own in ``triton_config``.

    Raises ``ToolchainError`` when the plan asks for something that the pinned version cannot do.
    """
    assert plan.toolchain is not None
    version = parse_version(plan.toolchain.trtllm)
    if (1, 3) <= version < _FIRST_WHOLE_1_3:
        raise ToolchainError(
            "broken-trtllm",
            f"TensorRT-LLM {plan.toolchain.trtllm} ignores parts of a request.",
            why="Before 1.3.0rc26 its sampler takes penalties, bad words and seeds and does nothing with some of them.",
            next="Name a container with another version in machine.container.",
        )
    arguments: dict[str, Any] = {"model": model}
    for argument in ARGUMENTS:
        value = argument.value(plan)
        if value is None:
            continue
        if argument.since <= version < argument.before:
            *outer, name = argument.name.split(".")
            place = arguments
            for part in outer:
                place = place.setdefault(part, {})
            place[name] = value
    limits = plan.profile.limits
    arguments["triton_config"] = {
        "max_batch_size": limits.max_batch_size,
        "decoupled": True,
        "max_queue_size": limits.max_queue_size,
        "vocab_size": plan.spec.vocab_size,
        "logprobs": max((since, value) for since, value in _LOG_PROBS.items() if since <= version)[1],
    }
    return arguments


def known_arguments(version: Version) -> frozenset[str]:
    """Names of all arguments that ``LLM`` of that version takes, nested ones with dots."""
    table: Mapping[str, list[dict[str, Any]]] = read_yaml(data_folder("engine_configs") / "llm_args.yaml")
    found = set()
    for prefix, groups in table.items():
        for group in groups:
            since = parse_version(group["since"])
            before = parse_version(group["before"]) if "before" in group else NEWEST
            if since <= version < before:
                found |= {name if prefix == "LLM" else f"{prefix}.{name}" for name in group["names"].split()}
    return frozenset(found)


def parse_version(text: str) -> Version:
    """``1.2.1`` -> (1, 2, 1); a release candidate comes before its release: ``1.3.0rc24`` -> (1, 3, 0, 24)."""
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?(?:\.post\d+)?", text)
    if match is None:
        raise ToolchainError("bad-version", f"{text!r} is not a version of TensorRT-LLM.")
    major, minor, patch, candidate = match.groups()
    if patch is None:
        return int(major), int(minor)
    return int(major), int(minor), int(patch), int(candidate) if candidate else 1 << 30
