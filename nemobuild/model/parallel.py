"""How a model is split over ranks: which blocks each pipeline rank has, and what tensor parallelism must divide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from nemobuild.errors import UsageError
from nemobuild.model.spec import Attention, Linear, Mlp, ModelSpec


def check_parallel(spec: ModelSpec, tp: int, pp: int) -> None:
    """Raise ``UsageError`` when the model cannot be split over ``tp`` x ``pp`` ranks."""
    layers = len(spec.blocks)
    if tp < 1 or pp < 1:
        raise _cannot_split(f"tp {tp} and pp {pp} must be at least 1")
    if pp > layers:
        raise _cannot_split(f"pp {pp} is more than the {layers} blocks of the model")
    if spec.query_heads % tp:
        raise _cannot_split(f"tp {tp} does not divide the {spec.query_heads} query heads")
    for i, block in enumerate(spec.blocks):
        if isinstance(block.attention, Attention):
            kv_heads = block.attention.kv_heads
            if kv_heads % tp and tp % kv_heads:
                raise _cannot_split(f"tp {tp} neither divides the {kv_heads} KV heads of block {i} nor is a multiple")
        if isinstance(block.ffn, Mlp) and block.ffn.width % tp:
            raise _cannot_split(f"tp {tp} does not divide the {block.ffn.width} FFN channels of block {i}")
        if spec.hidden_size % tp and Linear in (type(block.attention), type(block.ffn)):
            raise _cannot_split(f"tp {tp} does not divide the {spec.hidden_size} channels of the linear block {i}")


def pipeline_ranges(layers: int, pp: int) -> list[range]:
    """Blocks of every pipeline rank, as ``torch.tensor_split`` cuts: the first ``layers % pp`` ranks get one more."""
    size, more = divmod(layers, pp)
    starts = [rank * size + min(rank, more) for rank in range(pp + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def _cannot_split(problem: str) -> UsageError:
    return UsageError("cannot-split", f"The model cannot be split so: {problem}.", next="Choose another --tp or --pp.")


def balanced_ranges(work: Sequence[float], pp: int) -> list[range]:
    """Blocks of every pipeline rank so that the most work of one rank is least; every rank has a block.

    ``work`` is that of each block, in any unit. Where several cuts are as good, the earliest ranks are the shortest.

    >>> balanced_ranges([5, 1, 1, 1, 1, 1], 2)
    [range(0, 1), range(1, 6)]
    """
    blocks = len(work)
    sums = [0.0, *accumulate(work)]
    # best[end]: least worst work of the first ``end`` blocks on the ranks so far; where[r][end]: where the last begins.
    best = sums[:]
    where: list[list[int]] = []
    for rank in range(1, pp):
        now, cuts = [float("inf")] * (blocks + 1), [0] * (blocks + 1)
        for end in range(rank + 1, blocks + 1):
            for cut in range(rank, end):
                worst = max(best[cut], sums[end] - sums[cut])
                if worst < now[end]:
                    now[end], cuts[end] = worst, cut
        best = now
        where.append(cuts)
    starts = [blocks]
    for cuts in reversed(where):
        starts.append(cuts[starts[-1]])
    starts = [0, *starts[::-1]]
    return [range(a, b) for a, b in pairwise(starts)]
