"""The command line of ``trtllm-build`` (TensorRT-LLM 1.0 to 1.2) as data; how flags depend is in ``plan.build_rules``.

``trtllm-build`` refuses an unknown flag at once, but of flags that contradict each other it silently changes one, and
the engine that comes out after an hour has other limits than those asked for. So every command is checked here first,
and what the tool would change by itself is refused with the reason. Abbreviated flags are refused too: what they
mean changes with the version.

Source: ``tensorrt_llm/commands/build.py``, ``plugin/plugin.py`` and ``_common.py`` of TensorRT-LLM 1.0 to 1.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nemobuild.errors import ToolchainError, UsageError, nearest
from nemobuild.plan.build_rules import Target, check_values

TOOL = "trtllm-build"
FIRST_WITHOUT_ENGINES = (1, 3)


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
    check_values(values, target)
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
