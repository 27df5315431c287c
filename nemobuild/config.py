"""``EngineConfig``: one profile, that is one model on one kind of machine in one precision. A strict YAML file.

An unknown key is refused with the nearest known one, because a limit that is silently ignored is found out in
production. Every field says what it means and in which unit; the JSON Schema and the docs come from here.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nemobuild.errors import UsageError, from_os_error, nearest
from nemobuild.resources import data_folder
from nemobuild.runtime.settings import ReasoningPolicy

Tokens = Annotated[int, Field(ge=1, le=1 << 24)]
MAX_PROFILE_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Strict):
    source: str = Field(description="Hugging Face folder, Hub id, or a path relative to the working folder.")
    revision: str | None = Field(default=None, description="Commit of the Hub repository; a full sha is reproducible.")
    known: str | None = Field(default=None, description="Name in engine_configs/models, for planning without weights.")

    @field_validator("known")
    @classmethod
    def _is_known(cls, name: str | None) -> str | None:
        return name if name is None else _one_of(name, known_models())


class CalibrationConfig(_Strict):
    texts: str | None = Field(
        default=None,
        description="JSON lines to calibrate FP8 with; default: texts that ship with nemobuild; none: weights only.",
    )
    samples: Annotated[int, Field(ge=1, le=65536)] | None = Field(default=None, description="Texts used; default: all.")
    tokens_per_sample: Tokens = Field(default=512, description="Tokens to which every text is cut.")


class CheckpointConfig(_Strict):
    precision: Literal["bf16", "fp8"] = Field(
        default="bf16", description="Precision of the decoder's linear weights; fp8 is E4M3 with one scale per tensor."
    )
    kv_cache: Literal["bf16", "fp8"] = Field(default="bf16", description="Precision of keys and values; fp8 needs fp8.")
    format: Literal["trtllm", "hf"] = Field(
        default="trtllm", description="TensorRT-LLM checkpoint, or a Hugging Face folder in ModelOpt's FP8 form."
    )
    kv_scales: Literal["clamped", "measured"] = Field(
        default="clamped",
        description="FP8 KV scales in the trtllm form: at least 1, as NVIDIA's exporter writes them, or as measured.",
    )
    tensor_parallel: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="Ranks that share each block.")
    pipeline_parallel: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="Ranks in a row.")
    calibration: CalibrationConfig = Field(default=CalibrationConfig())

    @model_validator(mode="after")
    def _consistent(self) -> CheckpointConfig:
        if self.precision == "bf16" and self.kv_cache == "fp8":
            raise ValueError("kv_cache fp8 needs precision fp8")
        if self.kv_scales == "measured" and (self.kv_cache, self.format) != ("fp8", "trtllm"):
            raise ValueError("kv_scales measured needs kv_cache fp8 and format trtllm; the form hf always has them so")
        return self

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def files_for(self) -> tuple[int, int]:
        """Tensor and pipeline ranks that the files are split for; a Hugging Face folder is split when it is loaded."""
        return (self.tensor_parallel, self.pipeline_parallel) if self.format == "trtllm" else (1, 1)


Share = Annotated[float, Field(ge=0, le=1)]


class QualityConfig(_Strict):
    """Bounds of `nemobuild verify` on held-out text; the fields of ``convert.quality.QualityThresholds``."""

    max_weight_error: Share = Field(
        default=0.04, description="Root mean square of a tensor's error over that of its weights."
    )
    max_saturated_share: Share = Field(default=1e-3, description="Share of activations beyond what their scale holds.")
    max_divergence: Annotated[float, Field(ge=0)] = Field(
        default=0.05, description="Mean KL divergence of the next token from that of the source, in nats."
    )
    max_language_divergence: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="The same over the texts of any one language."
    )
    max_perplexity_increase: Annotated[float, Field(ge=0)] = Field(
        default=0.03, description="Perplexity over that of the source, less one."
    )
    min_greedy_agreement: Share = Field(
        default=0.9, description="Share of positions where both find the same token the likeliest."
    )


class GatesConfig(_Strict):
    """What a rebuilt model must reach before `nemobuild rebuild` publishes it, beside the bounds in `quality`."""

    prompts: str | None = Field(
        default=None, description="YAML file of prompts to ask; default: engine_configs/gates.yaml, which ships."
    )
    min_right: Share = Field(default=0.9, description="Share of the prompts that must be answered as they expect.")
    max_lost: Annotated[int, Field(ge=0)] = Field(
        default=1, description="Prompts that the version before answered as they expect, and this one does not."
    )
    max_perplexity_increase: Annotated[float, Field(ge=0)] = Field(
        default=0.25, description="Perplexity on held-out text over that of the version before, less one."
    )
    tokens_per_text: Annotated[int, Field(ge=2, le=1 << 24)] = Field(
        default=128, description="Tokens taken of each of the held-out texts that ship."
    )
    max_slowdown: Share = Field(
        default=0.1, description="Share of the tokens per second of the version before that may be missing."
    )
    max_wait_increase: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="Median wait for the first token over that of the version before, less one."
    )
    concurrency: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=4, description="Requests at once when the speed is measured."
    )
    rounds: Annotated[int, Field(ge=1, le=100)] = Field(
        default=3, description="Measurements of the speed, the two versions in turn; the median counts."
    )
    output_tokens: Tokens = Field(default=64, description="Length of every answer when the speed is measured.")


class MachineConfig(_Strict):
    gpu: str = Field(description="Name in engine_configs/gpus.yaml.")
    count: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Cards; tensor_parallel x pipeline_parallel of them are used."
    )
    memory_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Share of each card's memory that the server may take; less on a card that is shared."
    )
    container: str = Field(default="26.07", description="Tag in engine_configs/toolchain.yaml to build and serve in.")


class BuildConfig(_Strict):
    max_num_tokens: Tokens | None = Field(
        default=None, description="Tokens in one step of the engine, over all requests; default: derived."
    )
    kv_cache_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Share of the memory left after loading that the KV cache takes; default: derived."
    )
    gemm_plugin: Literal["auto", "fp8", "disable"] = Field(
        default="auto", description="trtllm-build's GEMM plugin; FP8 layers use it with fp8 only."
    )
    pipeline_split: Literal["even", "balanced"] = Field(
        default="even", description="Blocks per pipeline rank: equal counts, or equal work where the runtime can."
    )
    weight_streaming: bool = Field(
        default=False, description="Build an engine that can keep a part of its weights in host memory. Slow."
    )
    timeout_s: Annotated[int, Field(ge=1)] = Field(default=14400, description="Longest time for trtllm-build.")
    workers: Annotated[int, Field(ge=1, le=64)] = Field(default=1, description="Ranks built at once, one GPU each.")
    multiple_profiles: bool = Field(
        default=False, description="Several optimisation profiles: a longer build, for a sometimes faster engine."
    )


class LimitsConfig(_Strict):
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="Requests that generate at once; default: what the KV cache holds."
    )
    max_context_tokens: Tokens = Field(description="Prompt and answer together, in tokens.")
    max_prompt_tokens: Tokens | None = Field(default=None, description="Longest prompt; default: context less one.")
    default_max_tokens: Tokens = Field(default=1024, description="Answer bound when a request names none.")
    thinking_tokens: Annotated[int, Field(ge=0, le=1 << 24)] | None = Field(
        default=None, description="Tokens to expect for thinking before the answer; the plan reserves room for them."
    )
    expected_prompt_tokens: Tokens = Field(
        default=2048, description="Usual length of a prompt; the plan derives the batch size with it, refuses nothing."
    )
    min_tokens_per_second: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Slowest stream to accept; bounds a derived batch size by the card's bandwidth."
    )
    kv_cache_tokens: Tokens | None = Field(
        default=None,
        description="KV cache size in tokens over all requests; default: what fits (cpu: batch size x context).",
    )
    max_queue_size: Annotated[int, Field(ge=1, le=65536)] = Field(default=128, description="Requests that may wait.")
    max_request_bytes: Annotated[int, Field(ge=1024)] = Field(default=8 << 20, description="Bytes of one text field.")

    @model_validator(mode="after")
    def _consistent(self) -> LimitsConfig:
        if self.prompt_limit >= self.max_context_tokens:
            raise ValueError("max_prompt_tokens must be less than max_context_tokens")
        if self.kv_cache_tokens is not None and self.kv_cache_tokens < self.max_context_tokens:
            raise ValueError("kv_cache_tokens must hold at least one request of max_context_tokens")
        if (self.thinking_tokens or 0) + self.default_max_tokens >= self.max_context_tokens:
            both = "thinking_tokens and default_max_tokens together" if self.thinking_tokens else "default_max_tokens"
            raise ValueError(
                f"{both} must be less than max_context_tokens; default_max_tokens is {self.default_max_tokens}"
            )
        return self

    @property
    def prompt_limit(self) -> int:
        return self.max_prompt_tokens or max(1, self.max_context_tokens - 1)

    @property
    def kv_pool_tokens(self) -> int:
        """Where memory is no question: room for every request at its longest."""
        return self.kv_cache_tokens or (self.max_batch_size or 1) * self.max_context_tokens

    @property
    def request_tokens(self) -> int:
        """What a usual request reserves: its prompt, its thinking and its answer, cut to the context."""
        wanted = self.expected_prompt_tokens + (self.thinking_tokens or 0) + self.default_max_tokens
        return min(self.max_context_tokens, wanted)


class SamplingConfig(_Strict):
    temperature: Annotated[float, Field(ge=0, le=100)] = Field(default=0.0, description="0 is greedy.")
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0


class ReasoningConfig(_Strict):
    policy: str = Field(description="Name in engine_configs/reasoning.yaml: how this model switches its reasoning.")
    default: Literal["on", "off", "auto"] = Field(default="auto", description="Mode when a request names none.")
    sampling_on: SamplingConfig = Field(default=SamplingConfig(temperature=0.6, top_p=0.95))
    sampling_off: SamplingConfig = Field(default=SamplingConfig())

    @field_validator("policy")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _one_of(name, _policy_names())


_FORMAT = "checkpoint.format must be hf for the runtime llmapi, trtllm for tensorrt and cpu"
_EVEN_ONLY = "build.pipeline_split must be even for tensorrt: trtllm-build cuts the blocks into equal counts"
_STREAMING = "build.weight_streaming needs gemm_plugin disable: what a plugin multiplies with cannot be streamed"
_TENSORRT_BUILD = ("gemm_plugin", "weight_streaming", "timeout_s", "workers", "multiple_profiles")
_COUNT = "machine.count must be checkpoint.tensor_parallel x checkpoint.pipeline_parallel"


class EngineConfig(_Strict):
    """A profile."""

    description: str = Field(description="One sentence for the list of profiles.")
    runtime: Literal["cpu", "tensorrt", "llmapi"] = Field(description="What runs the tensorrt_llm model in Triton.")
    model: ModelConfig
    machine: MachineConfig | None = Field(default=None, description="Where it runs; for tensorrt and llmapi only.")
    checkpoint: CheckpointConfig = Field(default=CheckpointConfig())
    quality: QualityConfig = Field(default=QualityConfig())
    gates: GatesConfig = Field(default=GatesConfig())
    build: BuildConfig = Field(default=BuildConfig())
    limits: LimitsConfig
    reasoning: ReasoningConfig

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        gpu, trt = self.runtime != "cpu", self.runtime == "tensorrt"
        step, batch = self.build.max_num_tokens, self.limits.max_batch_size
        only_trt = [name for name in _TENSORRT_BUILD if getattr(self.build, name) != getattr(BuildConfig(), name)]
        rules = (
            (self.checkpoint.format == ("hf" if self.runtime == "llmapi" else "trtllm"), _FORMAT),
            ((self.machine is not None) == gpu, "tensorrt and llmapi need the section machine, cpu must not have it"),
            (self.machine is None or self.machine.count == self.checkpoint.ranks, _COUNT),
            (trt or not only_trt, f"build.{', '.join(only_trt)} is for the runtime tensorrt only"),
            (gpu or self.build == BuildConfig(), "the section build is not for the runtime cpu"),
            (not trt or self.build.pipeline_split == "even", _EVEN_ONLY),
            (not self.build.weight_streaming or self.build.gemm_plugin == "disable", _STREAMING),
            (step is None or batch is None or step >= batch, "build.max_num_tokens must be at least max_batch_size"),
            (gpu or self.limits.max_batch_size is not None, "limits.max_batch_size is needed for the runtime cpu"),
            (gpu or self.limits.min_tokens_per_second is None, "limits.min_tokens_per_second needs a GPU"),
        )
        for holds, problem in rules:
            if not holds:
                raise ValueError(problem)
        return self


def profile_names() -> list[str]:
    """Names of the profiles that ship with nemobuild."""
    return sorted(path.stem for path in (data_folder("engine_configs") / "profiles").glob("*.yaml"))


def known_models() -> list[str]:
    """Names of the model configurations that ship with nemobuild."""
    return sorted(path.stem for path in (data_folder("engine_configs") / "models").glob("*.json"))


def load_profile(name_or_path: str) -> EngineConfig:
    """A shipped profile by name, or a YAML file by path. Raises ``UsageError`` that names the field."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = data_folder("engine_configs") / "profiles" / f"{name_or_path}.yaml"
        if not path.is_file():
            raise UsageError(
                "unknown-profile",
                f"There is no profile {name_or_path!r}.",
                why=nearest(name_or_path, profile_names()),
                next="Type `nemobuild profiles` for the list, or give the path of a YAML file.",
            )
    data = read_yaml(path)
    try:
        return EngineConfig.model_validate(data)
    except ValidationError as error:
        raise _explain(error, path) from error


def reasoning_policies() -> dict[str, ReasoningPolicy]:
    """The policies in ``engine_configs/reasoning.yaml`` by name."""
    data = read_yaml(data_folder("engine_configs") / "reasoning.yaml")
    return {name: ReasoningPolicy(**fields) for name, fields in data.items()}


@cache
def _policy_names() -> tuple[str, ...]:
    """A plan tries many profiles, so the file is not read for each."""
    return tuple(reasoning_policies())


def reasoning_policy(name: str) -> ReasoningPolicy:
    """The policy of that name. Raises ``UsageError`` that proposes the nearest."""
    policies = reasoning_policies()
    if name not in policies:
        raise UsageError(
            "unknown-policy", f"reasoning.policy {name!r} is unknown.", why=nearest(name, policies), next="Correct it."
        )
    return policies[name]


def read_yaml(path: Path) -> Any:
    """A YAML document of bounded size, read without trust."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise from_os_error(error, path, "reading") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise UsageError("profile-too-large", f"{path} is larger than {MAX_PROFILE_BYTES} bytes.")
    try:
        return yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError("bad-yaml", f"{path} is not valid YAML.", why=f"{error}.") from error


def _one_of(name: str, known: Collection[str]) -> str:
    if name not in known:
        raise ValueError(nearest(name, known))
    return name


def _explain(error: ValidationError, path: Path) -> UsageError:
    """The first problem, with the field's full name; for an unknown key also the nearest known one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the document"
    why = first["msg"].removeprefix("Value error, ")
    why += "" if why.endswith((".", "?")) else "."
    if first["type"] == "extra_forbidden":
        why = f"This key is unknown. {nearest(str(first['loc'][-1]), _known_keys(first['loc'][:-1]))}"
    elif first["type"] != "missing":
        value = first["input"]  # shown only when it is short: an alias bomb is not
        why = f"It is {value!r}. {why}" if isinstance(value, (bool, int, float, str)) and len(str(value)) < 200 else why
    return UsageError("bad-profile", f"{where} in {path} is wrong.", why=why, next="Correct it and try again.")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    kind: Any = EngineConfig
    for part in location:
        kind = kind.model_fields[part].annotation
        kind = next((k for k in get_args(kind) if k is not type(None)), kind)  # an optional section
    return list(kind.model_fields)
