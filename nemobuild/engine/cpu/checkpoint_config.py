"""``config.json`` of a TensorRT-LLM checkpoint -> ``ModelSpec`` and how the weights are spread over ranks.

Defaults are those of TensorRT-LLM's ``PretrainedConfig``, also where they are wrong for the model: a config that
leaves ``rotary_base`` out is read there with 10000, so it is here. Keys that would change the arithmetic must have the
value under which they do not (``_REQUIRED``); unknown keys are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...errors import IntegrityError, from_os_error, nearest
from ...model.spec import Attention, Block, Linear, Llama3Scaling, Mlp, ModelSpec, NoOp, Rope

MAX_CONFIG_BYTES = 8 << 20
# Architecture -> (model type, name of the FFN in tensor names, default position embedding)
_ARCHITECTURES = {
    "DeciLMForCausalLM": ("nemotron-nas", "ffn", "rope_gpt_neox"),
    "LlamaForCausalLM": ("llama", "mlp", "learned_absolute"),
}
_READ = frozenset(
    """architecture dtype vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_size
    intermediate_size norm_epsilon position_embedding_type rotary_base rotary_scaling rotary_embedding_dim
    max_position_embeddings use_parallel_embedding embedding_sharding_dim layer_configs mapping quantization""".split()
)
_INERT = frozenset(
    """logits_dtype producer runtime_defaults layer_types num_kv_heads_per_layer rank decoder share_embedding_table
    disable_weight_only_quant_plugin tie_word_embeddings""".split()
)
_REQUIRED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rmsnorm": (True,),
    "rotary_pct": (1, None),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "embedding_multiplier": (1, None),
    "attention_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "output_multiplier_scale": (1, None),
    "layer_idx_offset": (0, None),
} | dict.fromkeys(
    """qk_layernorm bias attn_bias mlp_bias lm_head_bias residual_mlp fc_after_embed has_partial_lora_mask
    remove_duplicated_kv_heads block_configs""".split(),
    (False, None),
)
_QUANTIZATION_INERT = frozenset(("group_size", "smoothquant_val", "mamba_ssm_cache_dtype"))
_QUANTIZATION_FALSE = ("clamp_val", "use_meta_recipe", "has_zero_point", "pre_quant_scale")
# What TensorRT-LLM excludes when the list is absent or empty; a list of one's own replaces it.
_EXCLUDED = tuple(
    """*lm_head *router *vocab_embedding *position_embedding *block_embedding *shared_expert_gate *fused_a""".split()
)
_MAPPING_INERT = frozenset(
    """gpus_per_node moe_tp_size moe_cluster_size moe_ep_size attn_tp_size attn_cp_size auto_parallel cp_config
    enable_attention_dp enable_lm_head_tp_in_adp rank""".split()
)


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """How a checkpoint is spread: ``tp`` x ``pp`` ranks, the blocks of every pipeline stage, names and layouts."""

    tp: int
    pp: int
    stages: tuple[range, ...]
    ffn_name: str
    embedding_layout: str
    """``copy`` on every tensor rank, padded ``rows``, or ``columns``."""
    fp8: bool = False
    """Linears have E4M3 weights and static scales, but for those that ``excluded`` names."""
    fp8_kv: bool = False
    excluded: tuple[str, ...] = ()

    def is_fp8(self, module: str) -> bool:
        """Whether the linear of this name (``transformer.layers.0.attention.qkv``) is quantised."""
        return self.fp8 and not any(fnmatchcase(module, pattern) for pattern in self.excluded)


def read_config(folder: Path) -> tuple[CheckpointConfig, ModelSpec]:
    """Read ``folder/config.json``. Raises ``IntegrityError`` that names the key, ``UsageError`` for a bad path."""
    return _Reader(folder / "config.json").read()


class _Reader:
    """One pass over a config; every failure names the file and the key."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.config = self.load()

    def load(self) -> dict[str, Any]:
        try:
            with self.file.open("rb") as stream:
                raw = stream.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise from_os_error(error, self.file, "reading") from error
        try:
            config = json.loads(raw) if len(raw) <= MAX_CONFIG_BYTES else None
        except (ValueError, RecursionError) as error:
            raise IntegrityError("bad-json", f"{self.file} is not valid JSON.", why=f"{error}.") from error
        if not isinstance(config, dict):
            raise IntegrityError("bad-json", f"{self.file} is not a JSON object of at most {MAX_CONFIG_BYTES} bytes.")
        return config

    def read(self) -> tuple[CheckpointConfig, ModelSpec]:
        architecture = self.config.get("architecture")
        if architecture not in _ARCHITECTURES:
            raise self.bad("architecture", f"{architecture!r} is not one of {', '.join(_ARCHITECTURES)}")
        model_type, ffn_name, default_positions = _ARCHITECTURES[architecture]
        self.refuse_unknown(self.config, _READ | _INERT | _REQUIRED.keys(), "")
        for key, allowed in (_REQUIRED | {"position_embedding_type": ("rope_gpt_neox",)}).items():
            default = {"hidden_act": "gelu", "position_embedding_type": default_positions}.get(key, allowed[0])
            if (value := self.config.get(key, default)) not in allowed:
                raise self.bad(key, f"{value!r} is not supported by the CPU runtime, only {allowed[0]!r}")
        quantization = self.quantization()
        hidden, heads = self.positive("hidden_size"), self.positive("num_attention_heads")
        head_size = self.positive("head_size", hidden // heads)
        rotary = self.config.get("rotary_embedding_dim")
        if head_size % 2 or rotary not in (None, head_size):
            raise self.bad("rotary_embedding_dim", f"{rotary!r} with head_size {head_size}; only whole heads rotate")
        blocks = self.blocks(hidden, heads, nas=ffn_name == "ffn")
        spec = ModelSpec(
            model_type=model_type,
            hidden_size=hidden,
            vocab_size=self.positive("vocab_size"),
            query_heads=heads,
            head_size=head_size,
            blocks=blocks,
            rope=self.rope(),
            norm_epsilon=self.number(self.config, "norm_epsilon", 1e-5),
            max_context_tokens=self.positive("max_position_embeddings"),
            dtype=str(self.config.get("dtype")),
        )
        return self.spread(spec, ffn_name, quantization), spec

    def quantization(self) -> tuple[bool, bool, tuple[str, ...]]:
        """Whether linears and the KV cache are FP8, and the patterns of the linears that are not."""
        part = self.part(self.config, "quantization", {})
        known = {"quant_algo", "kv_cache_quant_algo", "exclude_modules", *_QUANTIZATION_FALSE, *_QUANTIZATION_INERT}
        self.refuse_unknown(part, known, "quantization")
        for key in _QUANTIZATION_FALSE:
            if part.get(key):
                raise self.bad(f"quantization.{key}", f"{part[key]!r} is not supported by the CPU runtime")
        fp8 = []
        for key in ("quant_algo", "kv_cache_quant_algo"):
            if (value := part.get(key)) not in (None, "NO_QUANT", "FP8"):
                raise self.bad(
                    f"quantization.{key}", f"{value!r} is not supported by the CPU runtime, only FP8 or null"
                )
            fp8.append(value == "FP8")
        excluded = part.get("exclude_modules") or list(_EXCLUDED)
        if not isinstance(excluded, list) or not all(isinstance(pattern, str) for pattern in excluded):
            raise self.bad("quantization.exclude_modules", "a list of names is needed")
        if fp8[0] and not any(fnmatchcase("lm_head", pattern) for pattern in excluded):
            problem = (
                "lm_head is not in it; a list of one's own replaces the default, and the CPU runtime has no FP8 head"
            )
            raise self.bad("quantization.exclude_modules", problem)
        return fp8[0], fp8[1], tuple(excluded)

    def blocks(self, hidden: int, heads: int, *, nas: bool) -> tuple[Block, ...]:
        layers = self.positive("num_hidden_layers")
        kv_heads = self.positive("num_key_value_heads", heads)
        width = self.positive("intermediate_size", 4 * hidden)
        if not nas or "layer_configs" not in self.config:
            self.check_heads("num_key_value_heads", kv_heads, heads)
            return (Block(Attention(kv_heads), Mlp(width)),) * layers
        entries = self.config["layer_configs"]
        if not isinstance(entries, list) or len(entries) != layers:
            raise self.bad("layer_configs", f"a list of num_hidden_layers = {layers} entries is needed")
        return tuple(
            self.block(f"layer_configs[{i}]", entry, heads, kv_heads, width) for i, entry in enumerate(entries)
        )

    def block(self, where: str, entry: Any, heads: int, kv_heads: int, width: int) -> Block:
        if not isinstance(entry, dict):
            raise self.bad(where, "an object is needed")
        self.refuse_unknown(entry, ("attention", "ffn"), where)
        parts: dict[str, Attention | Mlp | Linear | NoOp] = {}
        for name, kind, size, default in (
            ("attention", "attention", "num_key_value_heads", kv_heads),
            ("ffn", "mlp", "intermediate_size", width),
        ):
            part = self.part(entry, name, None, where)
            path = f"{where}.{name}"
            self.refuse_unknown(part, ("impl", size), path)
            impl = part.get("impl", kind)
            if impl not in (kind, "linear", "no_op"):
                raise self.bad(f"{path}.impl", f"{impl!r} is not one of {kind}, linear, no_op")
            value = default if part.get(size) is None else part[size]
            if impl != kind:
                parts[name] = Linear() if impl == "linear" else NoOp()
            elif not _is_int(value) or value < 1:
                raise self.bad(f"{path}.{size}", f"{value!r} is not a positive whole number")
            elif name == "attention":
                self.check_heads(f"{path}.{size}", value, heads)
                parts[name] = Attention(value)
            else:
                parts[name] = Mlp(value)
        return Block(**parts)  # type: ignore[arg-type]

    def check_heads(self, key: str, kv_heads: int, heads: int) -> None:
        if heads % kv_heads:
            raise self.bad(key, f"{kv_heads} does not divide num_attention_heads {heads}")

    def rope(self) -> Rope:
        theta = self.number(self.config, "rotary_base", 10000.0)
        scaling = self.part(self.config, "rotary_scaling", {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return Rope(theta)
        if kind != "llama3":
            raise self.bad("rotary_scaling.rope_type", f"{kind!r} is not supported, only default and llama3")
        values = {
            key: self.number(scaling, key, None)
            for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        }
        original = int(values.pop("original_max_position_embeddings"))
        return Rope(theta, Llama3Scaling(**values, original_max_position_embeddings=original))

    def spread(
        self, spec: ModelSpec, ffn_name: str, quantization: tuple[bool, bool, tuple[str, ...]]
    ) -> CheckpointConfig:
        mapping = self.part(self.config, "mapping", {})
        self.refuse_unknown(mapping, _MAPPING_INERT | {"world_size", "tp_size", "pp_size", "cp_size"}, "mapping")
        tp, pp, cp, world = (mapping.get(key, 1) for key in ("tp_size", "pp_size", "cp_size", "world_size"))
        if not all(_is_int(n) and n > 0 for n in (tp, pp, cp, world)) or cp != 1 or world != tp * pp:
            raise self.bad("mapping", f"world_size {world!r} is not tp_size {tp!r} x pp_size {pp!r} (cp_size {cp!r})")
        if pp > len(spec.blocks):
            raise self.bad("mapping.pp_size", f"{pp} is more than the {len(spec.blocks)} layers")
        for size in self.split_sizes(spec):
            if size % tp:
                raise self.bad("mapping.tp_size", f"{tp} does not divide {size}")
        for kv_heads in set(spec.kv_heads_per_block) - {0}:
            if kv_heads % tp and tp % kv_heads:
                raise self.bad("mapping.tp_size", f"{tp} neither divides {kv_heads} KV heads nor is a multiple of them")
        size, more = divmod(len(spec.blocks), pp)
        starts = [stage * size + min(stage, more) for stage in range(pp + 1)]
        layout = "copy"
        if self.config.get("use_parallel_embedding") and tp > 1:
            layout = "columns" if self.config.get("embedding_sharding_dim") == 1 else "rows"
        stages = tuple(range(starts[stage], starts[stage + 1]) for stage in range(pp))
        return CheckpointConfig(tp, pp, stages, ffn_name, layout, *quantization)

    def split_sizes(self, spec: ModelSpec) -> Iterable[int]:
        """Sizes that tensor parallelism must divide."""
        yield spec.query_heads
        for block in spec.blocks:
            if isinstance(block.ffn, Mlp):
                yield block.ffn.width
            if isinstance(block.ffn, Linear) or isinstance(block.attention, Linear):
                yield spec.hidden_size
        if self.config.get("use_parallel_embedding") and self.config.get("embedding_sharding_dim") == 1:
            yield spec.hidden_size

    def part(self, parent: dict[str, Any], key: str, default: dict[str, Any] | None, where: str = "") -> dict[str, Any]:
        value = parent.get(key)
        value = default if value is None else value
        if not isinstance(value, dict):
            raise self.bad(f"{where}.{key}" if where else key, "an object is needed")
        return value

    def refuse_unknown(self, part: dict[str, Any], known: Iterable[str], where: str) -> None:
        for key in part:
            if key not in known:
                name = f"{where}.{key}" if where else key
                raise self.bad(name, f"this key is unknown. {nearest(key, known)}", "unknown-config-key")

    def positive(self, key: str, default: int | None = None) -> int:
        value: Any = self.config.get(key)
        value = default if value is None else value
        if not _is_int(value) or not 0 < value < 1 << 40:
            raise self.bad(key, f"{value!r} is not a positive whole number")
        return int(value)

    def number(self, part: dict[str, Any], key: str, default: float | None) -> float:
        value: Any = part.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.bad(key, f"{value!r} is not a positive number")
        return float(value)

    def bad(self, key: str, problem: str, code: str = "bad-checkpoint-config") -> IntegrityError:
        return IntegrityError(code, f"{key} in {self.file}: {problem}.", next="Convert the model again.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
