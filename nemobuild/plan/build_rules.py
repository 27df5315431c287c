"""What ``trtllm-build`` would silently change, as rules over the values of its flags (TensorRT-LLM 1.0 to 1.2).

The rules stand here, below the module that knows the command line, because a plan has to keep them too: what a plan
says must be what ``build`` does, and a profile that contradicts itself is told of before anything is downloaded.

Source: ``tensorrt_llm/commands/build.py`` and ``plugin/plugin.py`` of TensorRT-LLM 1.0 to 1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from nemobuild.config import EngineConfig
from nemobuild.errors import UsageError
from nemobuild.plan.memory import TOKENS_PER_BLOCK

Values = Mapping[str, str | int | None]

FIELDS = {
    "max_batch_size": "limits.max_batch_size",
    "max_num_tokens": "build.max_num_tokens",
    "max_seq_len": "limits.max_context_tokens",
    "gemm_plugin": "build.gemm_plugin",
    "workers": "build.workers",
    "weight_streaming": "build.weight_streaming",
    "multiple_profiles": "build.multiple_profiles",
}
"""The flags that a profile sets, and by which field."""


@dataclass(frozen=True, slots=True)
class Target:
    """What an engine is built from and for: the facts that flags depend on. ``sm`` is (9, 0) for an H100."""

    fp8: bool
    fp8_kv: bool
    ranks: int
    sm: tuple[int, int]
    trtllm: str


@dataclass(frozen=True, slots=True)
class Rule:
    """``flag`` cannot be as it is when ``broken``; ``why`` is a sentence that says what ``trtllm-build`` would do."""

    flag: str
    broken: Callable[[Values, Target], bool]
    why: str


def _on(values: Values, name: str) -> bool:
    return values[name] not in (None, "disable")


def _number(values: Values, name: str) -> int:
    value = values[name]
    return value if isinstance(value, int) else 0


_BLACKWELL_LACKS = (
    "gemm_swiglu_plugin",
    "low_latency_gemm_plugin",
    "low_latency_gemm_swiglu_plugin",
    "fp8_rowwise_gemm_plugin",
)

RULES: tuple[Rule, ...] = (
    Rule(
        "max_seq_len",
        lambda v, t: v["max_seq_len"] is None,
        "Without it the engine is built for the model's longest context.",
    ),
    Rule(
        "max_num_tokens",
        lambda v, t: _number(v, "max_num_tokens") < _number(v, "max_batch_size") * _number(v, "max_beam_width"),
        "One step must hold one token of every request, max_batch_size x max_beam_width.",
    ),
    Rule(
        "max_num_tokens",
        lambda v, t: _number(v, "max_num_tokens") < _number(v, "tokens_per_block"),
        "trtllm-build raises it to tokens_per_block.",
    ),
    Rule(
        "max_num_tokens",
        lambda v, t: _number(v, "max_num_tokens") > _number(v, "max_batch_size") * _number(v, "max_seq_len"),
        "trtllm-build cuts it to max_batch_size x max_seq_len.",
    ),
    Rule(
        "opt_num_tokens",
        lambda v, t: v["opt_num_tokens"] is not None and _on(v, "multiple_profiles"),
        "multiple_profiles chooses it by itself.",
    ),
    Rule(
        "opt_num_tokens",
        lambda v, t: _number(v, "opt_num_tokens") > _number(v, "max_num_tokens"),
        "trtllm-build cuts it to max_num_tokens.",
    ),
    Rule(
        "remove_input_padding",
        lambda v, t: not _on(v, "remove_input_padding"),
        "In-flight batching needs packed inputs.",
    ),
    Rule(
        "kv_cache_type",
        lambda v, t: v["kv_cache_type"] != "paged",
        "In-flight batching and KV reuse need a paged cache.",
    ),
    Rule(
        "use_paged_context_fmha",
        lambda v, t: _on(v, "use_paged_context_fmha") and not _on(v, "context_fmha"),
        "It is a form of context_fmha, which is off.",
    ),
    Rule(
        "use_paged_context_fmha",
        lambda v, t: _on(v, "use_paged_context_fmha") and t.fp8_kv and not t.fp8,
        "With an FP8 KV cache and BF16 weights trtllm-build turns it off, and KV reuse with it.",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: _on(v, "use_fp8_context_fmha") and not t.fp8,
        "It takes its output scale from an FP8 linear layer, and the weights are not FP8.",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: _on(v, "use_fp8_context_fmha") and _on(v, "use_paged_context_fmha") and not t.fp8_kv,
        "With FP8 weights and a BF16 KV cache trtllm-build turns it off.",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: not _on(v, "use_fp8_context_fmha") and _on(v, "use_paged_context_fmha") and t.fp8 and t.fp8_kv,
        "With an FP8 KV cache and paged context attention trtllm-build turns it on.",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: _on(v, "use_fp8_context_fmha") and t.sm < (8, 9),
        "FP8 attention needs compute capability 8.9 or higher.",
    ),
    Rule("gemm_plugin", lambda v, t: v["gemm_plugin"] == "fp8" and not t.fp8, "The weights are not FP8."),
    Rule("gemm_plugin", lambda v, t: v["gemm_plugin"] == "nvfp4", "NVFP4 weights are not made by nemobuild."),
    Rule(
        "gemm_plugin",
        lambda v, t: _on(v, "gemm_plugin") and _on(v, "weight_streaming"),
        "Weights that a plugin holds cannot be streamed; it must be disable.",
    ),
    Rule(
        "gemm_swiglu_plugin",
        lambda v, t: _on(v, "gemm_swiglu_plugin") and t.sm[0] != 9,
        "That kernel exists for Hopper (compute capability 9.0) only.",
    ),
    *(
        Rule(name, lambda v, t, name=name: _on(v, name) and t.sm[0] >= 10, "Blackwell has no such kernel.")  # type: ignore[misc]
        for name in _BLACKWELL_LACKS
    ),
    Rule(
        "reduce_fusion",
        lambda v, t: _on(v, "reduce_fusion"),
        "trtllm-build turns it off for every architecture but Llama and Gemma.",
    ),
    Rule("streamingllm", lambda v, t: _on(v, "streamingllm"), "It is supported for Llama before 1.1 only."),
    Rule("pp_reduce_scatter", lambda v, t: _on(v, "pp_reduce_scatter"), "It is supported for Mixtral only."),
    Rule(
        "workers",
        lambda v, t: not 1 <= _number(v, "workers") <= t.ranks,
        "Each worker builds one rank, and there are no more ranks than that.",
    ),
    Rule(
        "max_draft_len",
        lambda v, t: (_number(v, "max_draft_len") > 0) != (v["speculative_decoding_mode"] is not None),
        "Draft tokens and speculative_decoding_mode go together.",
    ),
    Rule(
        "lora_target_modules",
        lambda v, t: v["lora_target_modules"] is not None and not _on(v, "lora_plugin"),
        "Without lora_plugin it has no effect.",
    ),
)


def check_values(values: Values, target: Target, rules: Iterable[Rule] = RULES) -> None:
    """Raise ``UsageError`` that names the field or flag which breaks one of ``rules``, and why it cannot be so."""
    for rule in rules:
        if not rule.broken(values, target):
            continue
        value, field = values[rule.flag], FIELDS.get(rule.flag)
        flag = f"--{rule.flag} of trtllm-build"
        name = f"{field} ({flag})" if field else flag
        raise UsageError(
            "contradictory-limits",
            f"{name} {'is not given' if value is None else f'cannot be {value}'} here.",
            why=rule.why,
            next=f"Change {field} in the profile, or leave it out." if field else "Change that flag.",
        )


def check_profile(profile: EngineConfig, target: Target) -> None:
    """The rules about what a profile of runtime ``tensorrt`` sets, all limits resolved. Raises as ``check_values``."""
    values: dict[str, str | int | None] = {"max_beam_width": 1, "tokens_per_block": TOKENS_PER_BLOCK}
    for flag, name in FIELDS.items():
        section, field = name.split(".")
        value = getattr(getattr(profile, section), field)
        values[flag] = ("enable" if value else "disable") if isinstance(value, bool) else value
    check_values(values, target, (rule for rule in RULES if rule.flag in FIELDS))
