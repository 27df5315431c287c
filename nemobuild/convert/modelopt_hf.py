"""The Hugging Face form of an FP8 model, as NVIDIA ModelOpt writes it: for PyTorch runtimes, no engine needed.

The quantisation is described twice, since readers differ: TensorRT-LLM up to 1.2 reads ``hf_quant_config.json`` only,
newer ones, vLLM and transformers the ``quantization_config`` of ``config.json``. All that is not weights is carried
along byte for byte and never run: a tokenizer or a model class that differs from the published one is another model.
"""

from __future__ import annotations

import math
from collections.abc import Container
from pathlib import Path
from typing import Any

from nemobuild.convert.fp8_map import ScaleNames
from nemobuild.convert.tensor_map import Piece, Target, TensorMap, as_matrix
from nemobuild.errors import IntegrityError, from_os_error
from nemobuild.model.hf_config import load_json
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.safetensors import ITEM_BYTES

SCALES = ScaleNames(
    weight="weight_scale",
    input="input_scale",
    shape=(),
    kv=(
        ("self_attn.k_proj.weight", "self_attn.k_proj.k_scale", "key"),
        ("self_attn.v_proj.weight", "self_attn.v_proj.v_scale", "value"),
    ),
)
EXCLUDED = ("lm_head", "model.embed_tokens")
# Readers tell the format by the producer's name, and its details by the version: this is ModelOpt's form.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
_CARRIED_SUFFIXES = frozenset(".json .py .jinja .model .tiktoken .txt .md .yaml .yml .pdf".split())
_CARRIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_NOT_CARRIED = frozenset(("manifest.json", INDEX, "hf_quant_config.json"))
_MAX_CARRIED_BYTES = 256 << 20


def tensor_map(spec: ModelSpec) -> TensorMap:
    """The tensors of the source under their own names, in one file."""
    targets = []
    for name, shape in spec.tensor_shapes().items():
        rows, columns = as_matrix(shape)
        targets.append(Target(name, "BF16", shape, (Piece(name, (0, rows), (0, columns), 0),)))
    return TensorMap((tuple(targets),), {})


def sharded(tensor_map: TensorMap) -> TensorMap:
    """The targets of the one file spread over files of at most ``SHARD_BYTES``, in order; scales stay with weights."""
    shards: list[list[Target]] = [[]]
    size_bytes = 0
    for target in tensor_map.ranks[0]:
        target_bytes = math.prod(target.shape) * ITEM_BYTES[target.dtype]
        if target.scale is None and shards[-1] and size_bytes + target_bytes > SHARD_BYTES:
            shards.append([])
            size_bytes = 0
        shards[-1].append(target)
        size_bytes += target_bytes
    return TensorMap(tuple(map(tuple, shards)), tensor_map.copies)


def file_names(count: int) -> tuple[str, ...]:
    """As transformers names them: ``model.safetensors``, or numbered from 1."""
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))


def index(tensor_map: TensorMap, files: tuple[str, ...]) -> dict[str, Any]:
    """The index by its file name; nothing for one file."""
    if len(files) == 1:
        return {}
    pairs = [(target, file) for file, targets in zip(files, tensor_map.ranks, strict=True) for target in targets]
    total_bytes = sum(math.prod(target.shape) * ITEM_BYTES[target.dtype] for target, _ in pairs)
    return {INDEX: {"metadata": {"total_size": total_bytes}, "weight_map": {t.name: file for t, file in pairs}}}


def quant_config(*, kv: bool) -> dict[str, Any]:
    """``hf_quant_config.json``."""
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8" if kv else None,
        "exclude_modules": list(EXCLUDED),
    }
    return {"producer": PRODUCER, "quantization": quantization}


def config(source: Path, *, kv: bool, static: bool) -> dict[str, Any]:
    """``config.json`` of the folder ``source`` with a ``quantization_config``; else only the dtype is changed."""
    value = load_json(source / "config.json")
    value.pop("quantization_config", None)
    # What is not quantised is BF16, also where the source was wider.
    value |= dict.fromkeys([key for key in ("torch_dtype", "dtype") if key in value] or ["torch_dtype"], "bfloat16")
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": scheme | {"dynamic": not static}, "weights": scheme, "targets": ["Linear"]}
    return value | {
        "quantization_config": {
            "config_groups": {"group_0": group},
            "ignore": list(EXCLUDED),
            "quant_algo": "FP8",
            **({"kv_cache_scheme": scheme} if kv else {}),
            "producer": PRODUCER,
            "quant_method": "modelopt",
        }
    }


def carried_files(source: Path, written: Container[str]) -> dict[str, Path]:
    """Files to copy, by their name in the new folder: tokenizer, template, generation config, code, licence.

    Links are followed as far as the Hub's cache makes them (into the folder itself or the ``blobs`` beside it).
    Raises ``IntegrityError`` for links elsewhere, which could carry a private file away, and for very large files.
    """
    found: dict[str, Path] = {}
    try:
        home = source.resolve()
        homes = (home, home.parent.parent / "blobs")
        for path in sorted(source.rglob("*")):
            name = path.relative_to(source).as_posix()
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if hidden or name in written or name in _NOT_CARRIED or not _is_carried(path):
                continue
            if not any(path.resolve().is_relative_to(place) for place in homes):
                raise IntegrityError(
                    "unsafe-link",
                    f"{path} is a link to {path.resolve()}, outside of the model's folder.",
                    why="The file would be copied into a folder that is meant to be given to others.",
                    next="Put the file itself there, or remove the link.",
                )
            if path.stat().st_size > _MAX_CARRIED_BYTES:
                raise IntegrityError(
                    "file-too-large",
                    f"{path} has {path.stat().st_size:,} bytes, which is no tokenizer, template or text.",
                    next="Remove the file from the folder.",
                )
            found[name] = path
    except OSError as error:
        raise from_os_error(error, source, "reading") from error
    return found


def _is_carried(path: Path) -> bool:
    named = path.name.upper().startswith(_CARRIED_NAMES)
    return path.is_file() and (named or path.suffix.lower() in _CARRIED_SUFFIXES)
