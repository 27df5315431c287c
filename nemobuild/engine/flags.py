"""The command line of ``trtllm-build`` (TensorRT-LLM 1.0 to 1.2) as data: its flags, and how they depend on each other.

``trtllm-build`` refuses an unknown flag at once, but of flags that contradict each other it silently changes one, and
the engine that comes out after an hour has other limits than those asked for. So every command is checked here first,
and what the tool would change by itself is refused with the reason. Abbreviated flags are refused too: what they
mean changes with the version.

Source: ``tensorrt_llm/commands/build.py``, ``plugin/plugin.py`` and ``_common.py`` of TensorRT-LLM 1.0 to 1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nemobuild.errors import ToolchainError, UsageError, nearest

TOOL = "trtllm-build"
FIRST_WITHOUT_ENGINES = (1, 3)

Values = Mapping[str, str | int | None]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag: what it takes, and what it is by default. ``bare`` takes nothing, ``switch`` enable or disable."""

    kind: Literal["int", "text", "choice", "switch", "bare"]
    default: str | int | None = None
    choices: tuple[str, ...] = ()


def _choice(default: str | None, choices: str) -> Flag:
    return Flag("choice", default, tuple(choices.split()))


def _named(names: str, flag: Flag) -> dict[str, Flag]:
    return dict.fromkeys(names.split(), flag)


_DTYPES = "auto float16 float32 bfloat16 int32 disable"
_TEXT, _BARE = Flag("text"), Flag("bare", "disable")
_FP8 = _choice(None, "fp8 disable")

FLAGS: Mapping[str, Flag] = {
    **_named("checkpoint_dir model_config build_config model_cls_file model_cls_name", _TEXT),
    **_named("input_timing_cache visualize_network lora_dir lora_target_modules", _TEXT),
    "output_dir": Flag("text", "engine_outputs"),
    "output_timing_cache": Flag("text", "model.cache"),
    "workers": Flag("int", 1),
    "max_batch_size": Flag("int", 2048),
    "max_input_len": Flag("int", 1024),
    "max_seq_len": Flag("int"),
    "max_num_tokens": Flag("int", 8192),
    "opt_num_tokens": Flag("int"),
    "max_beam_width": Flag("int", 1),
    "max_encoder_input_len": Flag("int", 1024),
    "max_prompt_embedding_table_size": Flag("int", 0),
    "max_draft_len": Flag("int", 0),
    "max_lora_rank": Flag("int", 64),
    "tokens_per_block": Flag("int", 32),
    "kv_cache_type": _choice("paged", "paged continuous disabled"),
    "profiling_verbosity": _choice("layer_names_only", "layer_names_only detailed none"),
    "log_level": _choice("info", "internal_error error warning info verbose debug trace"),
    "logits_dtype": _choice(None, "float16 float32"),
    "lora_ckpt_source": _choice("hf", "hf nemo"),
    "speculative_decoding_mode": _choice(
        None, "draft_tokens_external lookahead_decoding medusa explicit_draft_tokens eagle"
    ),
    **_named("strip_plan weight_sparsity weight_streaming fast_build enable_debug_output dry_run", _BARE),
    **_named("monitor_memory gather_context_logits gather_generation_logits gather_all_token_logits", _BARE),
    **_named("gpt_attention_plugin bert_attention_plugin nccl_plugin moe_plugin", _choice("auto", _DTYPES)),
    "mamba_conv1d_plugin": _choice("auto", _DTYPES),
    **_named("lora_plugin dora_plugin", _choice(None, _DTYPES)),
    "gemm_plugin": _choice(None, f"{_DTYPES} fp8 nvfp4"),
    **_named("gemm_swiglu_plugin low_latency_gemm_plugin low_latency_gemm_swiglu_plugin", _FP8),
    "fp8_rowwise_gemm_plugin": _choice(None, _DTYPES),
    "gemm_allreduce_plugin": _choice(None, "float16 bfloat16 disable"),
    **_named("context_fmha remove_input_padding use_paged_context_fmha use_fp8_context_fmha", Flag("switch", "enable")),
    **_named("use_fused_mlp paged_state", Flag("switch", "enable")),
    **_named("bert_context_fmha_fp32_acc reduce_fusion multiple_profiles streamingllm", Flag("switch", "disable")),
    **_named("norm_quant_fusion fuse_fp4_quant user_buffer pp_reduce_scatter", Flag("switch", "disable")),
}


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
    """``flag`` cannot be as it is when ``broken``; ``why`` says what ``trtllm-build`` would do."""

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
        "without it the engine is built for the model's longest context",
    ),
    Rule(
        "max_num_tokens",
        lambda v, t: _number(v, "max_num_tokens") < _number(v, "max_batch_size") * _number(v, "max_beam_width"),
        "one step must hold one token of every request, max_batch_size x max_beam_width",
    ),
    Rule(
        "max_num_tokens",
        lambda v, t: _number(v, "max_num_tokens") < _number(v, "tokens_per_block"),
        "trtllm-build raises it to tokens_per_block",
    ),
    Rule(
        "max_num_tokens",
        lambda v, t: _number(v, "max_num_tokens") > _number(v, "max_batch_size") * _number(v, "max_seq_len"),
        "trtllm-build cuts it to max_batch_size x max_seq_len",
    ),
    Rule(
        "opt_num_tokens",
        lambda v, t: v["opt_num_tokens"] is not None and _on(v, "multiple_profiles"),
        "multiple_profiles chooses it by itself",
    ),
    Rule(
        "opt_num_tokens",
        lambda v, t: _number(v, "opt_num_tokens") > _number(v, "max_num_tokens"),
        "trtllm-build cuts it to max_num_tokens",
    ),
    Rule(
        "remove_input_padding",
        lambda v, t: not _on(v, "remove_input_padding"),
        "in-flight batching needs packed inputs",
    ),
    Rule(
        "kv_cache_type",
        lambda v, t: v["kv_cache_type"] != "paged",
        "in-flight batching and KV reuse need a paged cache",
    ),
    Rule(
        "use_paged_context_fmha",
        lambda v, t: _on(v, "use_paged_context_fmha") and not _on(v, "context_fmha"),
        "it is a form of context_fmha, which is off",
    ),
    Rule(
        "use_paged_context_fmha",
        lambda v, t: _on(v, "use_paged_context_fmha") and t.fp8_kv and not t.fp8,
        "with an FP8 KV cache and BF16 weights trtllm-build turns it off, and KV reuse with it",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: _on(v, "use_fp8_context_fmha") and not t.fp8,
        "it takes its output scale from an FP8 linear layer, and the weights are not FP8",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: _on(v, "use_fp8_context_fmha") and _on(v, "use_paged_context_fmha") and not t.fp8_kv,
        "with FP8 weights and a BF16 KV cache trtllm-build turns it off",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: not _on(v, "use_fp8_context_fmha") and _on(v, "use_paged_context_fmha") and t.fp8 and t.fp8_kv,
        "with an FP8 KV cache and paged context attention trtllm-build turns it on",
    ),
    Rule(
        "use_fp8_context_fmha",
        lambda v, t: _on(v, "use_fp8_context_fmha") and t.sm < (8, 9),
        "FP8 attention needs compute capability 8.9 or higher",
    ),
    Rule("gemm_plugin", lambda v, t: v["gemm_plugin"] == "fp8" and not t.fp8, "the weights are not FP8"),
    Rule("gemm_plugin", lambda v, t: v["gemm_plugin"] == "nvfp4", "NVFP4 weights are not made by nemobuild"),
    Rule(
        "gemm_plugin",
        lambda v, t: _on(v, "gemm_plugin") and _on(v, "weight_streaming"),
        "weights that a plugin holds cannot be streamed; it must be disable",
    ),
    Rule(
        "gemm_swiglu_plugin",
        lambda v, t: _on(v, "gemm_swiglu_plugin") and t.sm[0] != 9,
        "that kernel exists for Hopper (compute capability 9.0) only",
    ),
    *(
        Rule(name, lambda v, t, name=name: _on(v, name) and t.sm[0] >= 10, "Blackwell has no such kernel")  # type: ignore[misc]
        for name in _BLACKWELL_LACKS
    ),
    Rule(
        "reduce_fusion",
        lambda v, t: _on(v, "reduce_fusion"),
        "trtllm-build turns it off for every architecture but Llama and Gemma",
    ),
    Rule("streamingllm", lambda v, t: _on(v, "streamingllm"), "it is supported for Llama before 1.1 only"),
    Rule("pp_reduce_scatter", lambda v, t: _on(v, "pp_reduce_scatter"), "it is supported for Mixtral only"),
    Rule(
        "workers",
        lambda v, t: not 1 <= _number(v, "workers") <= t.ranks,
        "each worker builds one rank, and there are no more ranks than that",
    ),
    Rule(
        "max_draft_len",
        lambda v, t: (_number(v, "max_draft_len") > 0) != (v["speculative_decoding_mode"] is not None),
        "draft tokens and speculative_decoding_mode go together",
    ),
    Rule(
        "lora_target_modules",
        lambda v, t: v["lora_target_modules"] is not None and not _on(v, "lora_plugin"),
        "without lora_plugin it has no effect",
    ),
)


def parse(argv: Sequence[str]) -> dict[str, str | int | None]:
    """Every flag's value after the command ``argv`` (its first word is the tool's name), defaults included.

    Raises ``UsageError`` for an unknown flag, a missing value, a value of the wrong kind, or a flag given twice.
    """
    values: dict[str, str | int | None] = {name: flag.default for name, flag in FLAGS.items()}
    given: set[str] = set()
    words = iter(argv[1:])
    for word in words:
        name = word.removeprefix("--")
        if not word.startswith("--") or name not in FLAGS:
            raise _refuse(f"{TOOL} has no flag {word!r}.", nearest(name, FLAGS))
        if name in given:
            raise _refuse(f"--{name} is given twice.")
        given.add(name)
        flag = FLAGS[name]
        if flag.kind == "bare":
            values[name] = "enable"
            continue
        value = next(words, None)
        if value is None or value.startswith("--"):
            raise _refuse(f"--{name} needs a value.")
        values[name] = _value(name, flag, value)
    return values


def check_flags(argv: Sequence[str], target: Target) -> dict[str, str | int | None]:
    """What ``parse`` gives, when all flags agree with each other and with ``target``.

    Raises ``UsageError`` that names the flag and why it cannot be so, ``ToolchainError`` for a TensorRT-LLM that builds
    no engines.
    """
    if version(target.trtllm) >= FIRST_WITHOUT_ENGINES:
        raise ToolchainError(
            "no-engine-path",
            f"TensorRT-LLM {target.trtllm} does not build engines any more.",
            why="1.2.1 is the last release with trtllm-build.",
            next="Take a profile with runtime llmapi, or a machine.container with 1.2.1 or older.",
        )
    values = parse(argv)
    for rule in RULES:
        if rule.broken(values, target):
            value = values[rule.flag]
            found = "is not given" if value is None else f"cannot be {value}"
            raise UsageError(
                "contradictory-limits", f"--{rule.flag} of {TOOL} {found} here.", why=f"{rule.why}.".capitalize()
            )
    return values


def version(text: str) -> tuple[int, ...]:
    """(1, 2, 1) for ``1.2.1`` and for ``1.2.1rc3``; numbers after the first three are left out."""
    numbers: list[int] = []
    for part in text.split(".")[:3]:
        digits = part[: next((i for i, c in enumerate(part) if not c.isdigit()), len(part))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _value(name: str, flag: Flag, value: str) -> str | int:
    if flag.kind == "int":
        if not value.isdecimal():
            raise _refuse(f"--{name} must be a whole number, not {value!r}.")
        return int(value)
    choices = ("enable", "disable") if flag.kind == "switch" else flag.choices
    if choices and value not in choices:
        raise _refuse(f"--{name} cannot be {value!r}.", nearest(value, choices))
    return value


def _refuse(what: str, why: str = "") -> UsageError:
    return UsageError("bad-flag", what, why=why)
