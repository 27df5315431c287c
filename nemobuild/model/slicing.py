"""A few blocks of a large model as a model of its own: which blocks, and what ``config.json`` says then.

A slice runs through every step that the whole model runs through, at a small part of its size. What it answers means
nothing; what its conversion does to each kind of block is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemobuild.errors import UsageError
from nemobuild.model.spec import Block, ModelSpec

# Lists of config.json with one entry per block, in any dialect.
_PER_BLOCK = ("block_configs", "num_key_value_heads_per_layer", "layer_types")


def sliced_spec(spec: ModelSpec, blocks: Sequence[int]) -> ModelSpec:
    """``spec`` with these blocks only. Raises ``UsageError`` for a number that is out of range, or there twice."""
    outside = [i for i in blocks if not 0 <= i < len(spec.blocks)]
    twice = [i for k, i in enumerate(blocks) if i in blocks[:k]]
    if outside or twice or not blocks:
        problem = (
            f"block {outside[0]} does not exist" if outside else f"block {twice[0]} is named twice" if twice else ""
        )
        raise UsageError(
            "bad-blocks",
            f"These blocks cannot be cut out: {problem or 'there are none'}.",
            why=f"The model has the blocks 0 to {len(spec.blocks) - 1}; a slice holds each at most once.",
            next="Name some of them, such as --blocks 0,1, or let --blocks auto choose.",
        )
    return replace(spec, blocks=tuple(spec.blocks[i] for i in blocks))


def distinct_blocks(spec: ModelSpec) -> tuple[int, ...]:
    """As few blocks as hold every kind of attention and every kind of FFN (each width is one); small ones first.

    Blocks are edges between the two kinds, so this is a smallest edge cover: a largest matching, found by augmenting
    paths, and one more edge for every kind that it leaves alone (Gallai 1959).
    """
    first: dict[Block, int] = {}
    for i, block in enumerate(spec.blocks):
        first.setdefault(block, i)
    edges = sorted(first, key=lambda b: (replace(spec, blocks=(b,)).parameter_count, first[b]))
    matched: dict[object, Block] = {}  # by FFN

    def match(attention: object, seen: set[object]) -> bool:
        for edge in edges:
            if edge.attention == attention and edge.ffn not in seen:
                seen.add(edge.ffn)
                if edge.ffn not in matched or match(matched[edge.ffn].attention, seen):
                    matched[edge.ffn] = edge
                    return True
        return False

    for edge in edges:
        if edge.attention not in {m.attention for m in matched.values()}:
            match(edge.attention, set())
    chosen = list(matched.values())
    for edge in edges:
        if edge.attention not in {c.attention for c in chosen} or edge.ffn not in {c.ffn for c in chosen}:
            chosen.append(edge)
    return tuple(sorted(first[edge] for edge in chosen))


def sliced_config(config: Mapping[str, Any], blocks: Sequence[int]) -> dict[str, Any]:
    """``config.json`` of the slice; all that is not said block by block stays as it is."""
    lists = {key: [config[key][i] for i in blocks] for key in _PER_BLOCK if isinstance(config.get(key), list)}
    return {**config, "num_hidden_layers": len(blocks), **lists}


def sliced_names(spec: ModelSpec, blocks: Sequence[int]) -> dict[str, str]:
    """Tensors of the slice, in the order of the model: new name -> name in the source."""
    names = {}
    for name in sliced_spec(spec, blocks).tensor_shapes():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(blocks[int(parts[2])])
        names[name] = ".".join(parts)
    return names
