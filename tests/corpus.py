"""Text that breaks text layers, and ways to cut it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer

# The eight languages of the family, CJK, right-to-left, emoji with joiners, combining marks, code, tags.
CORPUS = (
    "The quick brown fox; it costs 3.14 dollars, i.e. nothing.\n",
    "Grüße aus Köln – ß, Ä, „Zitat“.",
    "L'été, où ça ? Œuvre d'art.\n\n",
    "Perché no? È così, città.",
    "Coração, ação, avó, pão.",
    "¿Cuándo? El niño cumplió años.",
    "नमस्ते दुनिया, यह परीक्षण है। क्षत्रिय ज्ञान",
    "สวัสดีครับ ตอบทันที น้ำใจไมตรี",
    "你好，世界。漢字かな交じり文！안녕하세요?",
    "مرحبا بالعالم؟ שלום עולם ‏abc‎",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇹🇭 e\u0301 \U0001f9d1\u200d\U0001f680",
    "\ufffd\x00\u2028\ufeff\ue0f0",
    'def f(x):\n    return {"a": [1, "}"], \'b\': "\\u00e9\\n"}\n',
    "<think>",
    "</think>",
    "<TOOLCALL>",
    "</TOOLCALL>",
    "</thi",
    "<",
    '[{"name": "get_weather", "arguments": {"city": "Zürich", "n": [1, {"x": "]}"}]}}]',
    '{"name": "f", "parameters": "{\\"a\\": \\"\\ud83d\\ude00\\"}"}',
    "\n",
    "\n\n",
    ". ",
)

mixed_texts = st.lists(st.one_of(st.sampled_from(CORPUS), st.text(max_size=8)), max_size=8).map("".join)


def token_runs(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids as a model may give them: of text, or any at all, control tokens and broken characters included."""
    anything = st.integers(0, tokenizer.get_vocab_size() - 1)
    byte = st.sampled_from([tokenizer.token_to_id(letter) for letter in "ðŁĻĤà¸ªÃ"])
    text = mixed_texts.map(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    return st.one_of(text, st.lists(st.one_of(anything, byte), max_size=40), st.tuples(text, text).map(_interleaved))


def _interleaved(pair: tuple[list[int], list[int]]) -> list[int]:
    """Two texts token by token in turn: characters break in the middle."""
    return [token for both in zip(*pair, strict=False) for token in both]


def cut(data: Any, items: Any) -> list[Any]:
    """``items`` in pieces, at places that hypothesis chooses."""
    marks = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=8)))
    return [items[a:b] for a, b in zip([0, *marks], [*marks, len(items)], strict=True)]


def one_by_one(items: Iterable[Any]) -> list[Any]:
    return [[item] for item in items]
