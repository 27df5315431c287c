"""``config.json`` of a Hugging Face folder -> ``ModelSpec``. Plain JSON: the folder's Python files are never run.

Three dialects describe the family: ``nemotron-nas`` (a list of blocks), ``deci`` (KV heads as a list, the
rest uniform) and ``llama`` (uniform). Whatever would change the arithmetic and is not understood is refused
by name; keys that cannot change it are listed in ``_INERT``. Rules: NVIDIA's ``DeciLMConfig`` and the
``nemotron_nas`` converter of TensorRT-LLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from nemobuild.errors import IntegrityError, UsageError, from_os_error, nearest
from nemobuild.model.spec import Attention, Block, Linear, Llama3Scaling, Mlp, ModelSpec, NoOp, Rope

MAX_CONFIG_BYTES = 8 << 20
MAX_BLOCKS = 4096
MODEL_TYPES = ("nemotron-nas", "deci", "llama")

_READ = frozenset(
    """model_type hidden_size vocab_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size block_configs num_key_value_heads_per_layer rope_theta rope_scaling rope_parameters
    rms_norm_eps hidden_act attention_bias mlp_bias max_position_embeddings tie_word_embeddings torch_dtype
    dtype bos_token_id eos_token_id quantization_config sliding_window pretraining_tp partial_rotary_factor""".split()
)
# Written by transformers or the vendors; none of them changes a forward pass at inference.
_INERT = frozenset(
    """architectures auto_map attention_dropout initializer_range transformers_version use_cache pad_token_id
    unk_token_id decoder_start_token_id sep_token_id is_decoder is_encoder_decoder cross_attention_hidden_size
    add_cross_attention tie_encoder_decoder return_dict output_hidden_states output_attentions torchscript
    use_bfloat16 pruned_heads chunk_size_feed_forward finetuning_task id2label label2id num_labels tokenizer_class
    prefix problem_type task_specific_params tf_legacy_loss remove_invalid_values resid_pdrop embd_pdrop
    is_llama_config rope_interleaved transformers.js_config max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens attn_implementation layer_types use_sliding_window max_window_layers""".split()
)
_BLOCK_PARTS = frozenset({"attention", "ffn", "parallel_blocks"})
_ATTENTION_KEYS = frozenset({"n_heads_in_group", "no_op", "replace_with_linear"})
_FFN_KEYS = frozenset({"ffn_mult", "intermediate_size", "no_op", "replace_with_linear", "hidden_act"})
_MUST_BE_OFF = frozenset(
    """sparsify num_sink_tokens unshifted_sink use_prefill_window_in_sink_attention window_length gated
    llama4 mamba moe is_sink""".split()
)
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", *_LLAMA3_KEYS})
_DTYPES = frozenset({"bfloat16", "float16", "float32"})


def load_spec(path: Path) -> ModelSpec:
    """``ModelSpec`` of a ``config.json`` or of the folder that holds it.

    Raises ``UsageError`` for a missing file or an unsupported model, ``IntegrityError`` for a damaged one.
    """
    file = path / "config.json" if path.is_dir() else path
    return spec_from_config(load_json(file), source=str(file))


def read_text(file: Path) -> str:
    """Text of a small file of at most ``MAX_CONFIG_BYTES``, read without trust."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise from_os_error(error, file, "reading") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise IntegrityError("file-too-large", f"{file} is larger than {MAX_CONFIG_BYTES} bytes.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError("not-utf8", f"{file} is not valid UTF-8.", why=f"{error}.") from error


def load_json(file: Path) -> dict[str, Any]:
    """A JSON object, read without trust."""
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntegrityError("bad-json", f"{file} is not valid JSON.", why=f"{error}.") from error
    if not isinstance(value, dict):
        raise IntegrityError("bad-json", f"{file} does not hold a JSON object.")
    return value


def spec_from_config(config: Mapping[str, Any], source: str = "config.json") -> ModelSpec:
    """``ModelSpec`` of a parsed ``config.json``; ``source`` is named in errors."""
    return _Reader(config, source).spec()


def mlp_width(ffn_mult: float, hidden_size: int) -> int:
    """Intermediate channels: ``int(2 * ffn_mult * hidden / 3)`` rounded up to a multiple of 256.

    >>> mlp_width(0.5, 8192)
    2816
    """
    return -(-int(2 * ffn_mult * hidden_size / 3) // 256) * 256


class _Reader:
    """One pass over a config; every failure names the field."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def spec(self) -> ModelSpec:
        model_type = self.config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise UsageError(
                "unknown-model-type",
                f"model_type {model_type!r} in {self.source} is not supported.",
                why=f"nemobuild knows {', '.join(MODEL_TYPES)}.",
                next="Point it at a model of the Llama-Nemotron family.",
            )
        self.refuse_unknown(self.config, _READ | _INERT, "")
        self.refuse_unsupported()
        layers = self.positive("num_hidden_layers")
        if layers > MAX_BLOCKS:
            raise self.bad("num_hidden_layers", f"{layers} is more than {MAX_BLOCKS}")
        hidden = self.positive("hidden_size")
        heads = self.positive("num_attention_heads")
        if self.config.get("head_dim") is None and hidden % heads:
            raise self.bad("hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}")
        head_size = self.positive("head_dim", default=hidden // heads)
        if head_size % 2:
            raise self.bad("head_dim", f"{head_size} is odd, RoPE needs pairs")
        if model_type == "nemotron-nas":
            blocks = self.nas_blocks(layers, hidden, heads)
        else:
            blocks = self.uniform_blocks(layers, heads, per_layer=model_type == "deci")
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        if dtype not in _DTYPES:
            raise self.bad("torch_dtype", f"{dtype!r} is not one of {', '.join(sorted(_DTYPES))}")
        bos = self.config.get("bos_token_id")
        end = self.config.get("eos_token_id")
        vocab = self.positive("vocab_size")
        return ModelSpec(
            model_type=model_type,
            hidden_size=hidden,
            vocab_size=vocab,
            query_heads=heads,
            head_size=head_size,
            blocks=blocks,
            rope=self.rope(),
            norm_epsilon=self.number("rms_norm_eps", 1e-6),
            max_context_tokens=self.positive("max_position_embeddings"),
            tied_embeddings=self.flag("tie_word_embeddings", self.config, "tie_word_embeddings"),
            dtype=dtype,
            bos_token_id=None if bos is None else self.token_id("bos_token_id", bos, vocab),
            end_token_ids=tuple(
                self.token_id("eos_token_id", e, vocab)
                for e in ([] if end is None else end if isinstance(end, list) else [end])
            ),
        )

    def nas_blocks(self, layers: int, hidden: int, heads: int) -> tuple[Block, ...]:
        entries = self.config.get("block_configs")
        if not isinstance(entries, list):
            raise self.bad("block_configs", "a list with one entry per block is needed")
        if len(entries) != layers:
            raise self.bad("block_configs", f"{len(entries)} entries, but num_hidden_layers is {layers}")
        return tuple(self.nas_block(f"block_configs[{i}]", e, hidden, heads) for i, e in enumerate(entries))

    def nas_block(self, where: str, entry: Any, hidden: int, heads: int) -> Block:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), dict) for k in ("attention", "ffn")):
            raise self.bad(where, "an object with 'attention' and 'ffn' objects is needed")
        self.refuse_unknown(entry, _BLOCK_PARTS, where)
        if entry.get("parallel_blocks") is not None:
            raise self.bad(f"{where}.parallel_blocks", "parallel blocks are not supported")
        attention, ffn = entry["attention"], entry["ffn"]
        for name, part, known in (("attention", attention, _ATTENTION_KEYS), ("ffn", ffn, _FFN_KEYS)):
            self.refuse_unknown(part, known | _MUST_BE_OFF, f"{where}.{name}")
            for key in sorted(_MUST_BE_OFF & part.keys()):
                if part[key]:
                    raise self.bad(f"{where}.{name}.{key}", f"{part[key]!r} is not supported, only null or false")
        return Block(
            self.nas_attention(f"{where}.attention", attention, heads), self.nas_ffn(f"{where}.ffn", ffn, hidden)
        )

    def nas_attention(self, where: str, part: dict[str, Any], heads: int) -> Attention | Linear | NoOp:
        if self.flag(where, part, "no_op"):
            return NoOp()
        if self.flag(where, part, "replace_with_linear"):
            return Linear()
        group = part.get("n_heads_in_group")
        if not _is_int(group) or group < 1 or heads % group:
            raise self.bad(f"{where}.n_heads_in_group", f"{group!r} does not divide num_attention_heads {heads}")
        return Attention(heads // group)

    def nas_ffn(self, where: str, part: dict[str, Any], hidden: int) -> Mlp | Linear | NoOp:
        if self.flag(where, part, "no_op"):
            return NoOp()
        if self.flag(where, part, "replace_with_linear"):
            return Linear()
        if part.get("hidden_act", "silu") not in ("silu", "swish", None):
            raise self.bad(f"{where}.hidden_act", f"{part['hidden_act']!r} is not supported, only silu")
        width, mult = part.get("intermediate_size"), part.get("ffn_mult")
        if width is not None:
            if not _is_int(width) or width < 1:
                raise self.bad(f"{where}.intermediate_size", f"{width!r} is not a positive number of channels")
            return Mlp(width)
        if not isinstance(mult, (int, float)) or isinstance(mult, bool) or not 0 < mult < 1e4:
            raise self.bad(f"{where}.ffn_mult", f"{mult!r} is not a positive multiplier (and no intermediate_size)")
        return Mlp(mlp_width(mult, hidden))

    def uniform_blocks(self, layers: int, heads: int, *, per_layer: bool) -> tuple[Block, ...]:
        width = self.positive("intermediate_size")
        if per_layer:
            kv = self.config.get("num_key_value_heads_per_layer")
            key = "num_key_value_heads_per_layer"
            if not isinstance(kv, list) or len(kv) != layers:
                raise self.bad(key, f"a list of num_hidden_layers = {layers} entries is needed")
        else:
            key = "num_key_value_heads"
            kv = [self.config.get(key) or heads] * layers
        for value in kv:
            if not _is_int(value) or value < 1 or heads % value:
                raise self.bad(key, f"{value!r} does not divide num_attention_heads {heads}")
        return tuple(Block(Attention(value), Mlp(width)) for value in kv)

    def rope(self) -> Rope:
        # transformers 5 folds rope_theta and rope_scaling into rope_parameters.
        merged = self.config.get("rope_parameters") or {}
        scaling = self.config.get("rope_scaling") or merged
        if not isinstance(merged, dict) or not isinstance(scaling, dict):
            raise self.bad("rope_scaling", "an object is needed")
        theta = self.number("rope_theta", merged.get("rope_theta", 10000.0))
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            return Rope(theta)
        if kind != "llama3":
            raise self.bad("rope_scaling.rope_type", f"{kind!r} is not supported, only default and llama3")
        self.refuse_unknown(scaling, _ROPE_KEYS, "rope_scaling")
        for key in _LLAMA3_KEYS:
            value = scaling.get(key)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
                raise self.bad(f"rope_scaling.{key}", f"{value!r} is not a positive number")
        factor, low, high, original = (scaling[key] for key in _LLAMA3_KEYS)
        llama3 = Llama3Scaling(float(factor), float(low), float(high), int(original))
        if llama3.high_freq_factor <= llama3.low_freq_factor:
            raise self.bad("rope_scaling.high_freq_factor", "it must be above low_freq_factor")
        return Rope(theta, llama3)

    def refuse_unsupported(self) -> None:
        for key in ("attention_bias", "mlp_bias"):
            if self.config.get(key):
                raise self.bad(key, "biases are not supported")
        if self.config.get("sliding_window") and self.config.get("use_sliding_window", True):
            raise self.bad("sliding_window", "windowed attention is not supported")
        if self.config.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise self.bad("partial_rotary_factor", "only full rotary embeddings are supported")
        if self.config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self.bad("hidden_act", f"{self.config['hidden_act']!r} is not supported, only silu")

    def refuse_unknown(self, part: Mapping[str, Any], known: frozenset[str], where: str) -> None:
        for key in part:
            if key not in known and not key.startswith("_"):
                name = f"{where}.{key}" if where else key
                raise self.bad(name, f"this key is unknown. {nearest(key, known)}", code="unknown-config-key")

    def flag(self, where: str, part: Mapping[str, Any], key: str) -> bool:
        value = part.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.bad(where if where == key else f"{where}.{key}", f"{value!r} is not true or false")
        return bool(value)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if not _is_int(value) or not 0 < value < 1 << 40:
            raise self.bad(key, f"{value!r} is not a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.bad(key, f"{value!r} is not a positive number")
        return float(value)

    def token_id(self, key: str, value: Any, vocab: int) -> int:
        if not _is_int(value) or not 0 <= value < vocab:
            raise self.bad(key, f"{value!r} is not a token id below vocab_size {vocab}")
        return int(value)

    def bad(self, field: str, problem: str, code: str = "bad-model-config") -> UsageError:
        return UsageError(code, f"{field} in {self.source}: {problem}.", next="Check that the file is the model's own.")


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
