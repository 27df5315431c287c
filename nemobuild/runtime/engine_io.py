"""Between a checked request and the tensors of the ``tensorrt_llm`` model (the engine-era contract)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer

from .request import Request
from .wire import Array, pack_words


def generation_tensors(request: Request, tokenizer: Tokenizer, generated: Sequence[int] = ()) -> dict[str, Array]:
    """Tensors for one request by name, each with the batch axis in front: scalars (1, 1), ids (1, n).

    ``generated``: what the answer has already, when the generation goes on from there.
    """
    ids = [*request.prompt.ids, *generated]
    scalars = {
        "input_lengths": np.int32(len(ids)),
        "request_output_len": np.int32(request.max_tokens - len(generated)),
        "end_id": np.int32(request.end_ids[0] if request.end_ids else -1),
        "pad_id": np.int32(request.end_ids[0] if request.end_ids else 0),
        "min_tokens": np.int32(max(0, request.min_tokens - len(generated))),
        "temperature": np.float32(request.temperature),
        "runtime_top_k": np.int32(1 if request.temperature == 0 else request.top_k),
        "runtime_top_p": np.float32(request.top_p),
        "repetition_penalty": np.float32(request.repetition_penalty),
        "presence_penalty": np.float32(request.presence_penalty),
        "frequency_penalty": np.float32(request.frequency_penalty),
        "seed": np.uint64(request.seed),
        "streaming": np.bool_(request.stream),
        "return_log_probs": np.bool_(request.return_log_probs),
        "exclude_input_in_output": np.bool_(True),
    }
    # The engine knows one end id; the others end the answer as stop words of one token each.
    stops = [[end] for end in request.end_ids[1:]] + _encode_all(tokenizer, request.stop_words)
    spaced = (word for bad in request.bad_words for word in (bad, f" {bad}"))
    tensors = {name: np.array([[value]]) for name, value in scalars.items()}
    tensors["input_ids"] = np.array([ids], dtype=np.int32)
    tensors["stop_words_list"] = pack_words(stops)[None]
    tensors["bad_words_list"] = pack_words(_encode_all(tokenizer, spaced))[None]
    return tensors


def _encode_all(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    encoded = (tokenizer.encode(word, add_special_tokens=False).ids for word in words)
    return [ids for ids in encoded if ids]
