"""Token ids to text while they arrive: the joined pieces equal the one-shot decode, at constant cost per token.

Nemotron and Llama 3 use byte-level BPE: a token is a run of bytes, and a character of Thai, Hindi or an emoji may
span several tokens. So each id is looked up as bytes once, and an incremental UTF-8 decoder holds an unfinished
character back until its last byte arrives. ``U+FFFD`` appears only where the model really wrote invalid UTF-8, as
in the one-shot decode. Tokenizers that are not byte-level go through ``tokenizers.decoders.DecodeStream``.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.decoders import DecodeStream


class Vocabulary:
    """Bytes of every token of a tokenizer; made once, shared by all streams.

    ``skip`` holds the ids of special tokens: they are control marks, not text, and decode to nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.special_tokens = tuple(sorted((added[i].content for i in self.special_ids), key=len, reverse=True))
        self.byte_level = _uses_byte_level(json.loads(tokenizer.to_str()).get("decoder"))
        self.token_bytes: list[bytes] = []
        if self.byte_level:
            byte_of = _byte_alphabet()
            for i in range(tokenizer.get_vocab_size(with_added_tokens=True)):
                token = tokenizer.id_to_token(i)
                self.token_bytes.append(b"" if token is None or i in self.special_ids else _to_bytes(token, byte_of))

    def stream(self) -> Detokenizer:
        return Detokenizer(self)

    def decode(self, ids: Iterable[int]) -> str:
        """One-shot decode without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class Detokenizer:
    """State of one stream. ``push`` ids as they come, ``finish`` once at the end."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stream = None if vocabulary.byte_level else DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._sent = 0

    def push(self, ids: Iterable[int]) -> str:
        """Text that is certain after ``ids``; may be empty. Ids outside the vocabulary decode to nothing."""
        if self._stream is None:
            table = self._vocabulary.token_bytes
            return self._decoder.decode(b"".join(table[i] for i in ids if 0 <= i < len(table)))
        pieces = []
        for token in ids:
            self._ids.append(token)
            pieces.append(self._stream.step(self._vocabulary.tokenizer, token) or "")
        text = "".join(pieces)
        self._sent += len(text)
        return text

    def finish(self) -> str:
        """What was held back: an unfinished character becomes ``U+FFFD``, as in the one-shot decode."""
        if self._stream is None:
            return self._decoder.decode(b"", final=True)
        return self._vocabulary.decode(self._ids)[self._sent :]


def _uses_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders", [])
        return len(parts) == 1 and _uses_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """The byte of each letter of the byte-level alphabet.

    Printable Latin-1 bytes stand for themselves; the others take the letters from U+0100 on, in order of the
    byte. The library gives the letters; the order gives the bytes.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(letter) for letter in letters if ord(letter) < 256}
    shifted = iter(byte for byte in range(256) if byte not in own)
    return {letter: ord(letter) if ord(letter) < 256 else next(shifted) for letter in letters}


def _to_bytes(token: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes(byte_of[letter] for letter in token)
    except KeyError:
        # An added token is kept as it is written, not in the byte-level alphabet.
        return token.encode("utf-8")
