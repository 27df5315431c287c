"""Token ids to text while they arrive: the joined pieces equal the one-shot decode, at constant cost per token.

Nemotron and Llama 3 use byte-level BPE: a token is a run of bytes, and a character of Thai, Hindi or an emoji may
span several tokens. So each id is looked up as bytes once, and an incremental UTF-8 decoder holds an unfinished
character back until its last byte arrives. ``U+FFFD`` appears only where the model really wrote invalid UTF-8, as
in the one-shot decode. With other tokenizers a few tokens are decoded again together with each new one. That is done
here because ``tokenizers.decoders.DecodeStream`` raises on, or garbles, runs of single bytes that are no UTF-8.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

_SINGLE_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Vocabulary:
    """Bytes of every token of a tokenizer; made once, shared by all streams.

    Special tokens are control marks, not text, and decode to nothing. ``token_text`` is the text of a token
    of whole characters, the usual case, and ``None`` for one that needs its neighbours.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_level = _uses_byte_level(json.loads(tokenizer.to_str()).get("decoder"))
        self.token_bytes: list[bytes] = []
        self.token_text: list[str | None] = []
        if self.byte_level:
            byte_of = _byte_alphabet()
            for i in range(tokenizer.get_vocab_size(with_added_tokens=True)):
                token = tokenizer.id_to_token(i)
                data = b"" if token is None or i in self.special_ids else _to_bytes(token, byte_of)
                self.token_bytes.append(data)
                self.token_text.append(_text_or_none(data))

    def stream(self) -> Detokenizer:
        return Detokenizer(self) if self.byte_level else _WindowDetokenizer(self)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as it stands, without BOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """One-shot decode without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


class Detokenizer:
    """State of one stream. ``push`` ids as they come, ``finish`` once at the end."""

    midway = False  # inside a character

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._texts = vocabulary.token_text
        self._bytes = vocabulary.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Text that is certain after ``ids``; may be empty. Ids outside the vocabulary decode to nothing."""
        return "".join(map(self.push_one, ids))

    def push_one(self, token: int) -> str:
        """As ``push``, for one id."""
        if not 0 <= token < len(self._texts):
            return ""
        if not self.midway and (known := self._texts[token]) is not None:
            return known
        text = self._decoder.decode(self._bytes[token])
        self.midway = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """What was held back: an unfinished character becomes ``U+FFFD``, as in the one-shot decode."""
        self.midway = False
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer(Detokenizer):
    """For tokenizers whose decoder looks at neighbours: spaces at the beginning, and runs of single bytes.

    Such a run is text only if all of it is valid UTF-8, so it is held back until it ends.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._known: list[int] = []  # the last tokens whose text is out
        self._held: list[int] = []

    def push_one(self, token: int) -> str:
        word = self._vocabulary.tokenizer.id_to_token(token) if token >= 0 else None
        if word is None or token in self._vocabulary.special_ids:
            return ""
        self._held.append(token)
        self.midway = _SINGLE_BYTE.fullmatch(word) is not None
        return "" if self.midway else self.finish()

    def finish(self) -> str:
        self.midway = False
        if not self._held:
            return ""
        text = self._vocabulary.decode(self._known + self._held)[len(self._vocabulary.decode(self._known)) :]
        self._known, self._held = self._held, []
        return text


def _text_or_none(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


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
