"""A real model that says given texts: weights in which each token leads to exactly one next token.

Embeddings are one-hot, blocks add nothing, and the head maps token t to its successor; so what comes out of the whole
road is known in advance, in any language, with tokens that break inside characters and inside tags. A text begins
after a *cue*: the last token of the prompt.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nemobuild.model.hf_config import spec_from_config
from tests.tiny import SPECIAL_TOKENS, llama_config, write_weights

HIDDEN = 1024
CLOSED = "</think>\n\n"  # one token, so that a prompt with reasoning off ends differently


def write_scripted(
    folder: Path, scripts: dict[str, str], template: str, loops: tuple[str, ...] = (), spelled: str = ""
) -> Path:
    """``scripts``: cue -> text. A cue in ``loops`` says its text again and again and never ends.

    ``spelled``: after the first letter of it come the others, a token each, and a control token.
    """
    alphabet = dict(zip(_alphabet_by_byte(), range(256), strict=True))
    letters = {byte: letter for letter, byte in _byte_of().items()}
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    chains: dict[str, list[int]] = {}
    for cue, text in scripts.items():
        chains[cue] = []
        for fragment in _fragments(text.encode(), {bytes(_byte_of()[c] for c in t) for t in vocab}):
            vocab["".join(letters[b] for b in fragment)] = len(vocab)
            chains[cue].append(len(vocab) - 1)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(CLOSED, special=False, normalized=False)])
    size = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id("<|eot_id|>")
    successor = dict.fromkeys(range(size), end)
    for cue, chain in chains.items():
        path = [tokenizer.encode(cue, add_special_tokens=False).ids[-1], *chain]
        successor |= dict(pairwise(path))
        successor[path[-1]] = path[1] if cue in loops else end
    if spelled:
        letters_ids = [tokenizer.encode(letter, add_special_tokens=False).ids[-1] for letter in spelled]
        successor |= dict(pairwise([*letters_ids, tokenizer.token_to_id("<|start_header_id|>"), end]))
    config = llama_config(
        model_type="nemotron-nas",
        architectures=["DeciLMForCausalLM"],
        hidden_size=HIDDEN,
        vocab_size=size,
        num_hidden_layers=2,
        num_key_value_heads=None,
        intermediate_size=None,
        tie_word_embeddings=False,
        max_position_embeddings=1 << 20,
        eos_token_id=[tokenizer.token_to_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")],
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        block_configs=[
            {"attention": {"n_heads_in_group": 4, "no_op": False}, "ffn": {"no_op": True}},
            {"attention": {"no_op": True}, "ffn": {"no_op": True}},
        ],
    )
    assert size <= HIDDEN
    weights = {}
    for name, shape in spec_from_config(config).tensor_shapes().items():
        value = np.ones(shape) if len(shape) == 1 else np.zeros(shape)
        weights[name] = value.astype(ml_dtypes.bfloat16)
    weights["model.embed_tokens.weight"][np.arange(size), np.arange(size)] = 1
    for token, following in successor.items():
        weights["lm_head.weight"][following, token] = 8
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights, 1)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": template})
    )
    return folder


def _fragments(data: bytes, taken: set[bytes]) -> list[bytes]:
    """``data`` cut into pieces of 2 to 7 bytes, none of them used before, with no regard for characters."""
    pieces, at = [], 0
    while at < len(data):
        for length in (2, 3, 5, 4, 7, 6, 9, 11, 13):
            piece = data[at : at + length]
            if piece not in taken and len(data) - at - length != 1:
                break
        at += len(piece)
        if piece in taken:  # only at the end, where nothing longer is left
            piece = pieces.pop() + piece
        assert piece not in taken
        taken.add(piece)
        pieces.append(piece)
    return pieces


def _alphabet_by_byte() -> list[str]:
    return sorted(_byte_of(), key=lambda letter: _byte_of()[letter])


def _byte_of() -> dict[str, int]:
    """The GPT-2 byte alphabet, by its published rule."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in printable]
    return table | {chr(256 + k): b for k, b in enumerate(others)}
