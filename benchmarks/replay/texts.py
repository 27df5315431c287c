"""Text in eight languages, and what else breaks streams: emoji with joiners, CJK, right to left."""

from __future__ import annotations

from tokenizers import Tokenizer

SENTENCES = (
    "The engine gives one token at a time, and a reader wants whole words. ",
    "Der Grüne Bär läuft über die Straße; das kostet 12,50 €. ",
    "L'été dernier, l'élève a mangé des crêpes à la crème. ",
    "Perché è così? Città, università, virtù — e più. ",
    "A manhã começou com pão, maçã e um café. Não é ótimo? ",
    "¿Qué pasó mañana? El niño soñó con un pingüino. ",
    "नमस्ते दुनिया, आप कैसे हैं? यह एक परीक्षण है। ",
    "สวัสดีครับ วันนี้อากาศดีมาก เราไปเดินเล่นกันเถอะ ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇹🇭 e\u0301 ∑∞≠ ",
    "今日は天気がいいですね。我们去散步吧。안녕하세요? ",
    "שלום עולם, مرحبا بالعالم، كيف الحال؟ ",
)


def token_streams(tokenizer: Tokenizer, count: int, tokens: int) -> list[list[int]]:
    """``count`` different texts of exactly ``tokens`` tokens; the last character of some is cut."""
    streams = []
    for k in range(count):
        turned = SENTENCES[k % len(SENTENCES) :] + SENTENCES[: k % len(SENTENCES)]
        ids: list[int] = []
        while len(ids) < tokens:
            ids += tokenizer.encode(f"{k}. " + "".join(turned), add_special_tokens=False).ids
        streams.append(ids[:tokens])
    return streams
