"""One forward pass of the family over NumPy or torch arrays, block by block.

Verification, calibration and the CPU runtime all use this one, so what one of them proves holds for the others.
Callers hold the loop over blocks: ``embed`` -> ``run_block`` for each -> ``head``. A model that does not fit into
memory is run with one block loaded at a time.

The tokens of all sequences are packed side by side (N rows), whatever their positions: a decode step of B sequences
is N = B, a prefill chunk of T tokens is N = T, and the two mix in one step. So every linear is one product over N
rows and reads its weights once. Only attention looks at single sequences, through the ``Span``s of the ``Step``.

Array functions are those that NumPy and torch share under one name. Matrices are (out, in), activations float32.
Carried into the emitted repository: standard library and NumPy only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .spec import Attention, Block, Linear, Mlp, ModelSpec, NoOp, Rope

Array = Any
# (name, x (N, in), weight (out, in)) -> (N, out). The names are the fields of BlockWeights, and "head". A caller may
# pass its own to observe the input of every linear, to hold weights in another form, or to multiply in BF16.
LinearFn = Callable[[str, Array, Array], Array]

_QUERIES_PER_SPAN = 256  # bounds the scores of one span: heads x 256 x keys


def linear(name: str, x: Array, weight: Array) -> Array:
    """``x @ weight.T``: the plain ``LinearFn``."""
    return x @ weight.T


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """One block. ``None`` where the block has no such part. Projections of one input are fused, as in TensorRT-LLM."""

    attention_norm: Array = None
    qkv: Array = None
    """Rows of q, then k, then v: ((query heads + 2 x KV heads) x head size, hidden)."""
    o: Array = None
    attention_linear: Array = None
    ffn_norm: Array = None
    gate_up: Array = None
    """Rows of gate (the SiLU branch), then up: (2 x width, hidden)."""
    down: Array = None
    ffn_linear: Array = None


@dataclass(frozen=True, slots=True)
class EndWeights:
    """What is not in a block. ``head`` is ``embedding`` itself when they are tied; both (vocab, hidden)."""

    embedding: Array
    norm: Array
    head: Array


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys (after RoPE) and values of one block, (KV heads, rows, head size). Sequences own ranges of rows."""

    keys: Array
    values: Array


@dataclass(frozen=True, slots=True)
class Segment:
    """``count`` new tokens of a sequence whose cache rows begin at ``row``, ``past`` of them filled already."""

    row: int
    past: int
    count: int


@dataclass(frozen=True, slots=True)
class Span:
    """Packed tokens ``first`` to ``last`` attend to ``keys`` cache rows from ``row``, causally among themselves."""

    first: int
    last: int
    row: int
    keys: int


@dataclass(frozen=True, slots=True)
class Step:
    """What all blocks share in one pass: where tokens go in the cache, their rotations, who attends to what."""

    rows: Array
    cos: Array
    sin: Array
    decodes: tuple[Span, ...]
    prefills: tuple[Span, ...]


def make_step(spec: ModelSpec, segments: Sequence[Segment], like: Array) -> Step:
    """The ``Step`` of packed ``segments``, with arrays of the kind and on the device of ``like``."""
    xp, place = _namespace(like)
    rows = np.concatenate([np.arange(s.row + s.past, s.row + s.past + s.count) for s in segments])
    positions = np.concatenate([np.arange(s.past, s.past + s.count) for s in segments])
    cos, sin = rope_tables(spec.rope, spec.head_size, positions)
    decodes: list[Span] = []
    prefills: list[Span] = []
    first = 0
    for segment in segments:
        for start in range(0, segment.count, _QUERIES_PER_SPAN):
            count = min(_QUERIES_PER_SPAN, segment.count - start)
            span = Span(first, first + count, segment.row, segment.past + start + count)
            (decodes if segment.count == 1 else prefills).append(span)
            first += count
    # A head axis for broadcasting: (N, 1, head size / 2).
    cos, sin = (xp.asarray(table[:, None, :], **place) for table in (cos, sin))
    return Step(xp.asarray(rows, **place), cos, sin, tuple(decodes), tuple(prefills))


def rope_tables(rope: Rope, head_size: int, positions: Any) -> tuple[Any, Any]:
    """Cosines and sines (N, head size / 2) of the rotation of every channel pair at ``positions`` (N,).

    Frequencies and angles are float32 as in the reference implementations, since models were trained with these.
    """
    frequencies = rope_frequencies(rope, head_size).astype(np.float32)
    angles = np.asarray(positions, np.float32)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def rope_frequencies(rope: Rope, head_size: int) -> Any:
    """Radians per token of every channel pair, (head size / 2,), float64.

    ``theta ** (-2i / head size)``; with llama3 scaling, wavelengths above ``original / low_freq_factor`` are
    stretched by ``factor``, those below ``original / high_freq_factor`` kept, and those between blended linearly in
    ``original / wavelength`` (transformers, ``_compute_llama3_parameters``).
    """
    frequencies = rope.theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if (scaling := rope.scaling) is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def embed(ends: EndWeights, token_ids: Array) -> Array:
    """Residual stream (N, hidden), float32, of token ids (N,)."""
    hidden = ends.embedding[token_ids]
    xp, _ = _namespace(hidden)
    return xp.asarray(hidden, dtype=xp.float32)


def run_block(
    spec: ModelSpec,
    block: Block,
    weights: BlockWeights,
    hidden: Array,
    step: Step,
    cache: KvCache | None = None,
    linear: LinearFn = linear,
) -> Array:
    """Residual stream (N, hidden) after ``block``. Writes the new keys and values into ``cache`` (attention only)."""
    if isinstance(block.attention, Attention):
        assert cache is not None
        x = rms_norm(hidden, weights.attention_norm, spec.norm_epsilon)
        context = _attend(spec, block.attention, linear("qkv", x, weights.qkv), step, cache)
        hidden = hidden + linear("o", context, weights.o)
    elif isinstance(block.attention, Linear):
        x = rms_norm(hidden, weights.attention_norm, spec.norm_epsilon)
        hidden = hidden + linear("attention_linear", x, weights.attention_linear)
    if isinstance(block.ffn, Mlp):
        x = linear("gate_up", rms_norm(hidden, weights.ffn_norm, spec.norm_epsilon), weights.gate_up)
        gate, up = x[:, : block.ffn.width], x[:, block.ffn.width :]
        hidden = hidden + linear("down", _silu(gate) * up, weights.down)
    elif isinstance(block.ffn, Linear):
        x = rms_norm(hidden, weights.ffn_norm, spec.norm_epsilon)
        hidden = hidden + linear("ffn_linear", x, weights.ffn_linear)
    return hidden


def head(spec: ModelSpec, ends: EndWeights, hidden: Array, linear: LinearFn = linear) -> Array:
    """Logits (N, vocab) of residual rows (N, hidden); pass only the rows whose next token is wanted."""
    return linear("head", rms_norm(hidden, ends.norm, spec.norm_epsilon), ends.head)


def forward(
    spec: ModelSpec,
    ends: EndWeights,
    blocks: Iterable[BlockWeights],
    prompts: Sequence[Sequence[int]],
    linear: LinearFn = linear,
) -> list[Array]:
    """Logits (T, vocab) at every position of each prompt. ``blocks`` is consumed once, one block at a time."""
    lengths = [len(prompt) for prompt in prompts]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    xp, place = _namespace(ends.norm)
    hidden = embed(ends, xp.asarray(np.concatenate([np.asarray(p, np.int64) for p in prompts]), **place))
    step = make_step(spec, [Segment(s, 0, n) for s, n in zip(starts, lengths, strict=True)], hidden)
    for block, weights in zip(spec.blocks, blocks, strict=True):
        cache = new_cache(spec, block, sum(lengths), hidden)
        hidden = run_block(spec, block, weights, hidden, step, cache, linear)
    return [head(spec, ends, hidden[s : s + n], linear) for s, n in zip(starts, lengths, strict=True)]


def new_cache(spec: ModelSpec, block: Block, rows: int, like: Array) -> KvCache | None:
    """An empty float32 cache of ``rows`` tokens for ``block``; ``None`` when it has no attention."""
    if not isinstance(block.attention, Attention):
        return None
    xp, place = _namespace(like)
    shape = (block.attention.kv_heads, rows, spec.head_size)
    keys, values = (xp.zeros(shape, dtype=xp.float32, **place) for _ in range(2))
    return KvCache(keys, values)


def hf_ends(spec: ModelSpec, read: Callable[[str], Array]) -> EndWeights:
    """``EndWeights`` from ``read``, which gives a tensor by its Hugging Face name."""
    embedding = read("model.embed_tokens.weight")
    lm_head = embedding if spec.tied_embeddings else read("lm_head.weight")
    return EndWeights(embedding, read("model.norm.weight"), lm_head)


def hf_block(
    spec: ModelSpec,
    index: int,
    read: Callable[[str], Array],
    stack: Callable[[list[Array]], Array] | None = None,
) -> BlockWeights:
    """``BlockWeights`` of block ``index`` from ``read``, which gives a tensor by its Hugging Face name.

    ``stack`` puts matrices of one input one below the other; needed where ``read`` gives something else than arrays.
    """
    stack = stack or _stack
    block, prefix = spec.blocks[index], f"model.layers.{index}"
    parts: dict[str, Array] = {}
    if not isinstance(block.attention, NoOp):
        parts["attention_norm"] = read(f"{prefix}.input_layernorm.weight")
    if isinstance(block.attention, Attention):
        parts["qkv"] = stack([read(f"{prefix}.self_attn.{x}_proj.weight") for x in "qkv"])
        parts["o"] = read(f"{prefix}.self_attn.o_proj.weight")
    elif isinstance(block.attention, Linear):
        parts["attention_linear"] = read(f"{prefix}.self_attn.linear_attn.weight")
    if not isinstance(block.ffn, NoOp):
        parts["ffn_norm"] = read(f"{prefix}.post_attention_layernorm.weight")
    if isinstance(block.ffn, Mlp):
        parts["gate_up"] = stack([read(f"{prefix}.mlp.{x}_proj.weight") for x in ("gate", "up")])
        parts["down"] = read(f"{prefix}.mlp.down_proj.weight")
    elif isinstance(block.ffn, Linear):
        parts["ffn_linear"] = read(f"{prefix}.mlp.linear_mlp.weight")
    return BlockWeights(**parts)


def hf_blocks(spec: ModelSpec, read: Callable[[str], Array]) -> Iterator[BlockWeights]:
    """All blocks in order, each read when it is asked for."""
    return (hf_block(spec, i, read) for i in range(len(spec.blocks)))


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """``x / sqrt(mean(x ** 2) + epsilon) * weight`` over the last axis of x (N, hidden)."""
    xp, _ = _namespace(x)
    power = xp.einsum("nh,nh->n", x, x) / x.shape[1]
    return x / xp.sqrt(power + epsilon)[:, None] * weight


def _silu(x: Array) -> Array:
    # x * sigmoid(x), with tanh because exp overflows for large negative x.
    xp, _ = _namespace(x)
    return (xp.tanh(x * 0.5) + 1) * x * 0.5


def _attend(spec: ModelSpec, attention: Attention, qkv: Array, step: Step, cache: KvCache) -> Array:
    """Context (N, query width) of fused projections (N, (query heads + 2 x KV heads) x head size)."""
    xp, _ = _namespace(qkv)
    heads, kv_heads, size = spec.query_heads, attention.kv_heads, spec.head_size
    count, group = qkv.shape[0], heads // kv_heads
    qkv = qkv.reshape(count, heads + 2 * kv_heads, size)
    rotated = _rotate(qkv[:, : heads + kv_heads], step.cos, step.sin)
    cache.keys[:, step.rows] = rotated[:, heads:].swapaxes(0, 1)
    cache.values[:, step.rows] = qkv[:, heads + kv_heads :].swapaxes(0, 1)
    # Query head h reads KV head h // group.
    queries = (rotated[:, :heads] * size**-0.5).reshape(count, kv_heads, group, size)
    context = xp.empty_like(queries)
    if step.decodes:
        _attend_decodes(queries, step.decodes, cache, context)
    for span in step.prefills:
        context[span.first : span.last] = _attend_prefill(queries[span.first : span.last], span, cache)
    return context.reshape(count, heads * size)


def _attend_decodes(queries: Array, spans: tuple[Span, ...], cache: KvCache, context: Array) -> None:
    """Single tokens, each with its own cache rows: two products per sequence, one softmax for all."""
    xp, place = _namespace(queries)
    longest = max(span.keys for span in spans)
    scores = xp.full((len(spans), *queries.shape[1:3], longest), -math.inf, dtype=xp.float32, **place)
    for i, span in enumerate(spans):
        keys = cache.keys[:, span.row : span.row + span.keys]
        scores[i, :, :, : span.keys] = queries[span.first] @ keys.swapaxes(1, 2)
    scores = _softmax(scores)
    for i, span in enumerate(spans):
        values = cache.values[:, span.row : span.row + span.keys]
        context[span.first] = scores[i, :, :, : span.keys] @ values


def _attend_prefill(queries: Array, span: Span, cache: KvCache) -> Array:
    """Several tokens of one sequence, (T, KV heads, group, head size) in and out."""
    xp, place = _namespace(queries)
    count, kv_heads, group, size = queries.shape
    keys = cache.keys[:, span.row : span.row + span.keys]
    values = cache.values[:, span.row : span.row + span.keys]
    folded = queries.swapaxes(0, 1).swapaxes(1, 2).reshape(kv_heads, group * count, size)
    scores = (folded @ keys.swapaxes(1, 2)).reshape(kv_heads, group, count, span.keys)
    # Only the last ``count`` keys can lie in a token's future.
    future = xp.full((count, count), -math.inf, dtype=xp.float32, **place)
    scores[..., span.keys - count :] += xp.triu(future, 1)
    context = _softmax(scores).reshape(kv_heads, group * count, span.keys) @ values
    return context.reshape(kv_heads, group, count, size).swapaxes(1, 2).swapaxes(0, 1)


def _softmax(scores: Array) -> Array:
    """Softmax over the last axis, in place."""
    xp, _ = _namespace(scores)
    scores -= xp.amax(scores, axis=-1, keepdims=True)
    xp.exp(scores, out=scores)
    scores /= xp.sum(scores, axis=-1, keepdims=True)
    return scores


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE on x (N, heads, head size): channel i is paired with i + head size / 2 (Hugging Face's order)."""
    xp, _ = _namespace(x)
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    return xp.concatenate((left * cos - right * sin, right * cos + left * sin), -1)


def _stack(parts: list[Array]) -> Array:
    xp, _ = _namespace(parts[0])
    return xp.concatenate(parts, 0)


def _namespace(array: Array) -> tuple[Any, dict[str, Any]]:
    """The module whose functions take ``array``, and the keyword that puts a new array beside it."""
    if type(array).__module__.startswith("torch"):
        return sys.modules["torch"], {"device": array.device}
    return np, {}
