"""Token sequences as the ``tensorrt_llm`` model takes and gives them. NumPy only: the CPU adapter needs no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def pack_words(words: Sequence[Sequence[int]]) -> Array:
    """Token sequences as (2, n): all ids in a row, and where each sequence ends, padded with -1."""
    ids = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    size = max(1, len(ids))
    return np.array([ids + [0] * (size - len(ids)), ends + [-1] * (size - len(ends))], dtype=np.int32)


def unpack_words(packed: Array) -> list[list[int]]:
    """Inverse of ``pack_words``; also takes a leading batch axis of one."""
    ids, ends = packed.reshape(2, -1).tolist()
    words, begin = [], 0
    for end in ends:
        if end < 0:
            break
        words.append(ids[begin:end])
        begin = end
    return words


def output_tokens(output_ids: Array, sequence_length: Array) -> list[int]:
    """Generated ids of one response: the first beam of the first sequence, without padding."""
    first = output_ids[(0,) * (output_ids.ndim - 1)]
    return [int(token) for token in first[: int(sequence_length.reshape(-1)[0])]]
