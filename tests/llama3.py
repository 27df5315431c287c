"""The real Llama-3 tokenizer as a ``tokenizer.json``, made from the ``tokenizer.model`` in the wheel ``llama-models``.

That file lists tokens by rank, without the merges of byte-pair encoding: each token of two parts that are tokens
themselves is a merge, and its own rank orders it.
"""

from __future__ import annotations

import base64
import functools
import os

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from nemobuild.runtime.detokenizer import _byte_alphabet
from nemobuild.wheels import cache_folder, fetch_wheel, unpack

REQUIREMENT = "llama-models==0.3.0"
SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
BOS, END_OF_TEXT, EOM, EOT = 128000, 128001, 128008, 128009
_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.cache
def llama3_tokenizer() -> Tokenizer:
    """128,000 tokens and 256 special ones; adds BOS like the published file."""
    kept = cache_folder() / f"llama3-tokenizer-{SHA256[:16]}.json"
    if not kept.exists():
        folder = unpack(
            fetch_wheel(REQUIREMENT, SHA256),
            ["llama_models/llama3/tokenizer.model"],
            cache_folder() / f"llama3-{SHA256[:16]}",
        )
        stage = kept.with_name(f"{kept.name}.{os.getpid()}")
        _build((folder / "llama_models/llama3/tokenizer.model").read_bytes()).save(str(stage))
        stage.rename(kept)
    return Tokenizer.from_file(str(kept))


def _build(ranks: bytes) -> Tokenizer:
    lines = [line.split() for line in ranks.splitlines()]
    rank_of = {base64.b64decode(token): int(rank) for token, rank in lines}
    letter_of = {byte: letter for letter, byte in _byte_alphabet().items()}
    words = {token: "".join(letter_of[byte] for byte in token) for token in rank_of}
    merges = []
    for token in sorted(rank_of, key=lambda token: rank_of[token]):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(left, right) for left, right in pairs if left in rank_of and right in rank_of]
        merges += [
            (words[left], words[right]) for left, right in sorted(known, key=lambda p: (rank_of[p[0]], rank_of[p[1]]))
        ]
    tokenizer = Tokenizer(models.BPE({words[t]: rank for t, rank in rank_of.items()}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    unnamed = iter(range(256))
    names = [_NAMED.get(i) or f"reserved_special_token_{next(unnamed)}" for i in range(256)]
    tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    bos = f"<|{_NAMED[0]}|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS)]
    )
    return tokenizer
