"""A conversion as data: which rectangle of which source tensor becomes which rows of which target tensor.

Nothing here touches a weight. The point of writing the work down first is that it can be proved before it
starts: ``check`` shows that every target element is produced exactly once, that every source element is
consumed as often as the rules of the format say (once, but for what tensor parallelism replicates), and that
shapes and dtypes agree. A converter written as code that copies can only be tested; this can be checked for
the model at hand, in milliseconds, also for one that nobody has seen before.

All tensors are seen as matrices (rows, columns); a vector is one row.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from nemobuild.errors import IntegrityError
from nemobuild.weights.safetensors import TensorInfo

Span = tuple[int, int]
"""First index and the index after the last."""

CONVERSIONS = frozenset({("BF16", "BF16"), ("F16", "BF16"), ("F32", "BF16")})
# With a scale, that is for pieces with a group.
CASTS = frozenset({("BF16", "F8_E4M3"), ("F16", "F8_E4M3"), ("F32", "F8_E4M3"), ("F8_E4M3", "F8_E4M3")})


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows x columns of ``source``, put into the target from row ``at`` on, over the target's whole width.

    ``source`` None stands for zeros (rows that only pad a vocabulary). ``group`` is the group of linear layers whose
    scale casts the piece to FP8; None: no scale.
    """

    source: str | None
    rows: Span
    columns: Span
    at: int
    group: str | None = None


@dataclass(frozen=True, slots=True)
class ScaleRef:
    """A scale of a block: ``weight`` or ``input`` of ``group``, or ``key``, ``value`` or ``kv`` (their maximum)."""

    block: int
    kind: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of one rank file and the pieces that it is made of, or the scale that it holds."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    scale: ScaleRef | None = None


@dataclass(frozen=True, slots=True)
class TensorMap:
    """Targets of every rank file, and how often each source is used where that is not once."""

    ranks: tuple[tuple[Target, ...], ...]
    copies: Mapping[str, int]

    def digest(self) -> str:
        """sha256 (hex) of the whole map: equal maps do equal work."""
        ranks = [[asdict(target) for target in rank] for rank in self.ranks]
        text = json.dumps([ranks, dict(self.copies)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a matrix, (1, n) of a vector."""
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 1:
        return 1, shape[0]
    raise ValueError(f"neither a vector nor a matrix: {shape}")


def check(tensor_map: TensorMap, sources: Mapping[str, TensorInfo]) -> None:
    """Prove the map against the sources. Raises ``IntegrityError`` that names the first tensor at fault."""
    uses: defaultdict[str, list[tuple[Span, Span]]] = defaultdict(list)
    casts: dict[str, tuple[str, str | None]] = {}
    for number, rank in enumerate(tensor_map.ranks):
        names = [target.name for target in rank]
        for name in names:
            if names.count(name) > 1:
                raise _bad(f"{name!r} of rank {number} is produced twice")
        for target in rank:
            _check_target(target, f"{target.name!r} of rank {number}", sources)
            for piece in target.pieces:
                if piece.source is not None:
                    uses[piece.source].append((piece.rows, piece.columns))
                    # A source is read and cast once, whatever it is used for.
                    if casts.setdefault(piece.source, (target.dtype, piece.group)) != (target.dtype, piece.group):
                        raise _bad(f"source {piece.source!r} is cast in two ways")
    for name, info in sources.items():
        copies = tensor_map.copies.get(name, 1)
        least, most = coverage(as_matrix(info.shape), uses[name])
        if (least, most) != (copies, copies):
            raise _bad(f"source {name!r} is used {least} to {most} times instead of {copies}")


def _check_target(target: Target, where: str, sources: Mapping[str, TensorInfo]) -> None:
    if target.scale is not None:
        if target.pieces or target.dtype != "F32" or target.shape not in ((), (1,)):
            raise _bad(f"{where} is not one float32 scale")
        return
    rows, columns = as_matrix(target.shape)
    filled: list[tuple[Span, Span]] = []
    for piece in target.pieces:
        (r0, r1), (c0, c1) = piece.rows, piece.columns
        filled.append(((piece.at, piece.at + r1 - r0), (0, columns)))
        if r0 >= r1 or c1 - c0 != columns:
            raise _bad(f"{where} takes rows {r0} to {r1}, columns {c0} to {c1} of {piece.source!r}: wrong shape")
        if piece.source is None:
            continue
        info = sources.get(piece.source)
        if info is None:
            raise _bad(f"{where} needs {piece.source!r}, which the snapshot lacks")
        if (info.dtype, target.dtype) not in (CONVERSIONS if piece.group is None else CASTS):
            raise _bad(f"{where} is {target.dtype}, and {piece.source!r} is {info.dtype}: no such conversion")
        height, width = as_matrix(info.shape)
        if r0 < 0 or r1 > height or c0 < 0 or c1 > width:
            raise _bad(f"{where} reaches outside of {piece.source!r}, which has shape {info.shape}")
    if coverage((rows, columns), filled) != (1, 1):
        raise _bad(f"{where} is not produced exactly once")


def coverage(shape: tuple[int, int], rectangles: Iterable[tuple[Span, Span]]) -> tuple[int, int]:
    """How often the least and the most covered element of a matrix is covered; outside counts as most + 1."""
    rectangles = list(rectangles)
    row_cuts = sorted({0, shape[0], *(x for rows, _ in rectangles for x in rows)})
    column_cuts = sorted({0, shape[1], *(x for _, columns in rectangles for x in columns)})
    counts = np.zeros((max(1, len(row_cuts) - 1), max(1, len(column_cuts) - 1)), np.int64)
    row_at = {x: i for i, x in enumerate(row_cuts)}
    column_at = {x: i for i, x in enumerate(column_cuts)}
    for (r0, r1), (c0, c1) in rectangles:
        counts[row_at[r0] : row_at[r1], column_at[c0] : column_at[c1]] += 1
    inside = counts[row_at[0] : row_at[shape[0]], column_at[0] : column_at[shape[1]]]
    if inside.sum() != counts.sum():
        return int(inside.min()), int(counts.max()) + 1
    return int(inside.min()), int(inside.max())


def _bad(problem: str) -> IntegrityError:
    return IntegrityError(
        "bad-tensor-map",
        f"The conversion does not add up: {problem}.",
        why="The map from source to target tensors was checked before any weight was read.",
        next="Please report this with the model's config.json.",
    )
