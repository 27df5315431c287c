"""Read an engine back and compare it with what was asked for.

``trtllm-build`` adjusts what does not suit it, with a warning among thousands of lines. The engine's own
``config.json`` says what came out, so that, and not the exit status, decides whether a build succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemobuild.engine.flags import version
from nemobuild.errors import IntegrityError, VerificationFailed
from nemobuild.model.hf_config import load_json
from nemobuild.plan.build_rules import Target

# Flags that the engine's config.json repeats: by their own name, or in plugin_config.
_LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width")
_SWITCHES = ("weight_streaming",)
_PLUGIN_NUMBERS = ("tokens_per_block",)
_PLUGIN_SWITCHES = (
    "remove_input_padding",
    "context_fmha",
    "use_paged_context_fmha",
    "use_fp8_context_fmha",
    "multiple_profiles",
)


def check_engine(folder: Path, flags: Mapping[str, str | int | None], target: Target, split: tuple[int, int]) -> None:
    """Compare the engine in ``folder`` with the ``flags`` that it was built by, and ``split`` (tp, pp).

    Raises ``IntegrityError`` for files that are missing or empty, ``VerificationFailed`` that names every field that
    came out another way.
    """
    for name in ("config.json", *engine_files(target.ranks)):
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            raise IntegrityError(
                "engine-incomplete",
                f"trtllm-build ended well, but {name} is missing or empty.",
                next="See its log; free disk space; run the same command again.",
            )
    config = load_json(folder / "config.json")
    differing = [
        f"{field} is {found!r}, not {wanted!r}"
        for field, found, wanted in _fields(config, flags, target, split)
        if found != wanted
    ]
    if differing:
        raise VerificationFailed(
            "engine-differs",
            "The engine is not what was asked for.",
            why=f"In its config.json {'; '.join(differing)}.",
            next="See the warnings in the build's log, and change the profile to what the engine can be.",
        )


def engine_files(ranks: int) -> tuple[str, ...]:
    return tuple(f"rank{rank}.engine" for rank in range(ranks))


def _fields(
    config: Mapping[str, Any], flags: Mapping[str, str | int | None], target: Target, split: tuple[int, int]
) -> Iterator[tuple[str, object, object]]:
    """(name, found, wanted) of all that is compared."""
    build = _section(config, "build_config")
    plugins, pretrained = _section(build, "plugin_config"), _section(config, "pretrained_config")
    mapping, quantization = _section(pretrained, "mapping"), _section(pretrained, "quantization")
    found = config.get("version")
    yield "version", found if found is None else version(str(found)), version(target.trtllm)
    for name in _LIMITS:
        yield name, build.get(name), flags[name]
    yield "kv_cache_type", str(build.get("kv_cache_type")).rpartition(".")[2].lower(), flags["kv_cache_type"]
    for name in _SWITCHES:
        yield name, build.get(name), flags[name] == "enable"
    for name in _PLUGIN_NUMBERS:
        yield name, plugins.get(name), flags[name]
    for name in _PLUGIN_SWITCHES:
        yield name, plugins.get(name), flags[name] == "enable"
    # "auto" becomes the model's dtype, and off is null.
    gemm, asked = plugins.get("gemm_plugin"), flags["gemm_plugin"]
    if asked == "auto":
        gemm, asked = ("off" if gemm in (None, "disable") else "on"), "on"
    yield "gemm_plugin", gemm or "disable", asked or "disable"
    yield "world_size", mapping.get("world_size"), target.ranks
    yield "tp_size", mapping.get("tp_size"), split[0]
    yield "pp_size", mapping.get("pp_size"), split[1]
    yield "quant_algo", quantization.get("quant_algo"), "FP8" if target.fp8 else None
    yield "kv_cache_quant_algo", quantization.get("kv_cache_quant_algo"), "FP8" if target.fp8_kv else None


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}
