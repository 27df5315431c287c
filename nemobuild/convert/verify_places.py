"""Where everything of a source must be found in a checkpoint, by tables that share nothing with the converter.

The converter thinks from target to source (pieces of a target tensor); here each source tensor is looked up in all
files. ``trtllm_layout`` and ``hf_layout`` give the same form for both kinds of folder, so that one comparison serves.
What a Hugging Face folder says about itself is read by the one reader of such documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemobuild.engine.cpu.checkpoint_config import CheckpointConfig
from nemobuild.errors import IntegrityError, NemobuildError, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.quantized import QUANT_CONFIG, Scheme, read_scheme
from nemobuild.weights.safetensors import TensorInfo

Tensors = list[dict[str, TensorInfo]]
"""Tensors of every rank file; a Hugging Face folder counts as one rank."""

# Part of a block in Hugging Face's words -> tensor of the checkpoint, how the ranks share it, group of equal scales.
_PLACES = {
    "input_layernorm": ("input_layernorm", "copy", ""),
    "self_attn.q_proj": ("attention.qkv", "q", "qkv"),
    "self_attn.k_proj": ("attention.qkv", "k", "qkv"),
    "self_attn.v_proj": ("attention.qkv", "v", "qkv"),
    "self_attn.o_proj": ("attention.dense", "columns", "o"),
    "self_attn.linear_attn": ("attention", "rows", "attention_linear"),
    "post_attention_layernorm": ("post_layernorm", "copy", ""),
    "mlp.gate_proj": ("{ffn}.fc", "rows", "gate_up"),
    "mlp.up_proj": ("{ffn}.gate", "rows", "gate_up"),
    "mlp.down_proj": ("{ffn}.proj", "columns", "down"),
    "mlp.linear_mlp": ("{ffn}", "rows", "ffn_linear"),
}
# The first must be there; NVIDIA ModelOpt writes the next two as well, TensorRT-LLM the last.
_KV_SCALES = tuple(f"{kind}_scaling_factor" for kind in ("kv_cache", "k_cache", "v_cache", "kv_cache_rcp"))


@dataclass(frozen=True, slots=True)
class Place:
    """Rows x columns of a source tensor, to be found from row ``at`` on in tensor ``name`` of a rank.

    ``scale`` is the name of the tensor's scale where it is E4M3, ``group`` the linear of the model that it belongs to.
    """

    rank: int
    name: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    at: int
    shape: tuple[int, ...]
    scale: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Scale:
    """A scale that must be there unless ``optional``; those of one ``group`` must be equal."""

    rank: int
    name: str
    group: str
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each source tensor must be, and all scales. ``label`` names a tensor of a rank in findings."""

    tensors: Tensors
    places: tuple[tuple[str, Place], ...]
    scales: tuple[Scale, ...]
    scale_shapes: tuple[tuple[int, ...], ...]
    label: Callable[[int, str], str]


def trtllm_layout(config: CheckpointConfig, spec: ModelSpec, tensors: Tensors) -> Layout:
    """Of a TensorRT-LLM checkpoint."""
    places = tuple(_trtllm_places(config, spec, tensors))
    scales: dict[tuple[int, str], Scale] = {}
    for _, place in places:
        module = place.name.removesuffix("weight")
        if place.scale:
            for kind in ("weights", "activation"):
                name = f"{module}{kind}_scaling_factor"
                scales[place.rank, name] = Scale(place.rank, name, f"{place.group} {kind}")
        if config.fp8_kv and place.group.endswith(".qkv"):
            for kind in _KV_SCALES:
                name = module.replace("qkv.", kind)
                scales[place.rank, name] = Scale(place.rank, name, f"{place.group} {kind}", kind != _KV_SCALES[0])
    return Layout(tensors, places, tuple(scales.values()), ((1,),), lambda rank, name: f"rank{rank}: {name}")


def _trtllm_places(config: CheckpointConfig, spec: ModelSpec, tensors: Tensors) -> Iterator[tuple[str, Place]]:
    """For every source tensor and every rank that holds of it: where."""
    tp, shapes = config.tp, spec.tensor_shapes()
    stage_of = {layer: stage for stage, layers in enumerate(config.stages) for layer in layers}
    vocab, hidden, padded = spec.vocab_size, spec.hidden_size, -(-spec.vocab_size // tp)
    for source, shape in shapes.items():
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        if not source.startswith("model.layers."):
            continue
        _, _, number, part = source.removesuffix(".weight").split(".", 3)
        layer = int(number)
        stage = stage_of[layer]
        name, rule, group = _PLACES[part]
        name = name.replace("{ffn}", config.ffn_name)
        module = f"transformer.layers.{layer - config.stages[stage].start}.{name}"
        fp8 = bool(group) and config.is_fp8(module)
        name, scale = f"{module}.weight", f"{module}.weights_scaling_factor" if fp8 else ""
        group = f"model.layers.{layer}.{group}" if group else ""
        for t in range(tp):
            rank = stage * tp + t
            if rule == "copy":
                yield source, Place(rank, name, (0, rows), (0, columns), 0, shape)
            elif rule == "rows":
                own = (t * rows // tp, (t + 1) * rows // tp)
                yield source, Place(rank, name, own, (0, columns), 0, (rows // tp, columns), scale, group)
            elif rule == "columns":
                own = (t * columns // tp, (t + 1) * columns // tp)
                yield source, Place(rank, name, (0, rows), own, 0, (rows, columns // tp), scale, group)
            else:
                query_rows, size = spec.query_width // tp, spec.head_size
                kv_heads = spec.kv_heads_per_block[layer]
                # One head at least on every rank, so with more ranks than heads neighbours hold the same one.
                kv_rows = max(kv_heads // tp, 1) * size
                start = t * query_rows if rule == "q" else t * kv_heads // tp * size
                count = query_rows if rule == "q" else kv_rows
                at = {"q": 0, "k": query_rows, "v": query_rows + kv_rows}[rule]
                whole = (query_rows + 2 * kv_rows, columns)
                yield source, Place(rank, name, (start, start + count), (0, columns), at, whole, scale, group)
    last = (config.pp - 1) * tp
    head = "model.embed_tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    for t in range(tp):
        table = (0, vocab), (0, hidden)
        embedding = Place(t, "transformer.vocab_embedding.weight", *table, 0, (vocab, hidden))
        yield "model.embed_tokens.weight", embedding
        yield "model.norm.weight", Place(last + t, "transformer.ln_f.weight", (0, 1), (0, hidden), 0, (hidden,))
        # Tied weights may be left out: TensorRT-LLM then takes the embedding.
        if not spec.tied_embeddings or "lm_head.weight" in tensors[last + t]:
            held = (min(t * padded, vocab), min((t + 1) * padded, vocab))
            yield head, Place(last + t, "lm_head.weight", held, (0, hidden), 0, (padded, hidden))


def hf_layout(folder: Path, spec: ModelSpec, tensors: dict[str, TensorInfo]) -> Layout:
    """Of a Hugging Face folder, BF16 or FP8 in ModelOpt's form. Raises ``NemobuildError`` for a contradiction in it.

    Of a folder that nemobuild wrote more is asked than of others: both descriptions of the quantisation, and equal
    scales where linears have one input. ModelOpt itself writes neither at all times, and readers get along.
    """
    config, ours = load_json(folder / "config.json"), _is_ours(folder)
    scheme = read_scheme(folder, config)
    if scheme is not None:
        _check_form(folder, scheme, config, ours)
    static = scheme is not None and scheme.is_static(tensors)
    places, scales = [], []
    for source, shape in spec.tensor_shapes().items():
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        module, group, scale = source.removesuffix(".weight"), "", ""
        if source.startswith("model.layers."):
            _, _, layer, part = module.split(".", 3)
            group = f"model.layers.{layer}.{_PLACES[part][2]}" if _PLACES[part][2] else ""
        if scheme is not None and group and not scheme.excludes(module):
            scale, equal = f"{module}.weight_scale", group if ours else module
            scales.append(Scale(0, scale, f"{equal} weights"))
            if static:
                scales.append(Scale(0, f"{module}.input_scale", f"{equal} activation"))
        if scheme is not None and scheme.kv and module.endswith((".k_proj", ".v_proj")):
            scales.append(Scale(0, f"{module}.{module[-6]}_scale", module))
        places.append((source, Place(0, source, (0, rows), (0, columns), 0, shape, scale, group)))
    if spec.tied_embeddings and "lm_head.weight" in tensors:
        source = "model.embed_tokens.weight"
        rows, columns = spec.tensor_shapes()[source]
        places.append((source, Place(0, "lm_head.weight", (0, rows), (0, columns), 0, (rows, columns))))
    return Layout([tensors], tuple(places), tuple(scales), ((), (1,)), lambda rank, name: name)


def _is_ours(folder: Path) -> bool:
    """Whether ``manifest.json`` says that nemobuild wrote the folder. Others may have a file of that name, too."""
    try:
        inputs = load_json(folder / "manifest.json").get("inputs")
    except NemobuildError:
        return False
    tools = inputs.get("tools") if isinstance(inputs, dict) else None
    return isinstance(tools, dict) and "nemobuild" in tools


def _check_form(folder: Path, scheme: Scheme, config: Mapping[str, Any], ours: bool) -> None:
    if scheme.method != "modelopt":
        raise UsageError(
            "unsupported-quantization",
            f"{folder} is FP8 in the form of {scheme.method}.",
            why="FP8 folders are verified in ModelOpt's form only.",
            next="Convert it with --precision fp8, and verify the result.",
        )
    both = {QUANT_CONFIG: (folder / QUANT_CONFIG).exists()}
    both["quantization_config in config.json"] = config.get("quantization_config") is not None
    absent = [name for name, there in both.items() if not there]
    if ours and absent:
        raise IntegrityError(
            "quantization-contradicts",
            f"{absent[0]} is missing in {folder}; some readers know this one only.",
            next="Convert the model again.",
        )
