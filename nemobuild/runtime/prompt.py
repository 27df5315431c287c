"""From a request's messages or raw text to prompt token ids: reasoning switch, template, exactly one BOS.

Two promises are kept here. The model's control tokens come from its template only: a user who writes
``<|eot_id|>`` has written ten ordinary characters. And a reasoning mode that is asked for by field never touches
the user's own words, although the template deletes its directives wherever they occur ("Visit /thinking" would
become "Visit ing"). Both work the same way: the words are marked with private-use characters that no template
looks for, and the marks are taken out again after rendering.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from .fields import RequestError
from .settings import ReasoningPolicy, Settings
from .splitter import ANSWER, MAYBE, REASONING
from .template import ChatTemplate

# Private-use characters: never in a vocabulary's special tokens, and removed from what a client sends.
_LITERAL_BEGIN, _LITERAL_END, _SHIELD = "\ue0f0", "\ue0f1", "\ue0f2"
_MARKS = re.compile(f"[{_LITERAL_BEGIN}{_LITERAL_END}{_SHIELD}]")
MODES = ("on", "off", "auto")
_LONG_TEXT = 4  # characters for each token that a prompt may have
_PIECE_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, and how its end leaves the model: thinking, answering, or free to choose."""

    ids: list[int]
    text: str
    start: str  # splitter state: reasoning, answer or maybe
    mode: str  # on or off: which sampling defaults hold


class PromptBuilder:
    """Builds prompts for one model; safe to share between threads once made."""

    def __init__(self, tokenizer: Tokenizer, settings: Settings, template: ChatTemplate | None) -> None:
        # A second copy reads control tokens as plain text; the flag is state of the tokenizer itself.
        self._tokenizer = tokenizer
        self._plain = Tokenizer.from_str(tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._settings = settings
        self._template = template
        added = tokenizer.get_added_tokens_decoder().values()
        specials = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        policy = settings.reasoning
        self._directives = (policy.off, policy.on) if policy.switch == "directive" else ()
        bos = settings.bos_token
        self._bos_id = tokenizer.token_to_id(bos) if bos else None
        self._adds_bos = self._bos_id is not None and tokenizer.encode("a").ids[:1] == [self._bos_id]

    def from_text(self, text: str, mode: str) -> Prompt:
        """A raw prompt, control tokens included. One BOS: the tokenizer's own, unless the text begins with it."""
        if mode != "auto":
            raise RequestError("reasoning_mode", "it works on messages; a raw text_input is used as it is")
        self._check_length("text_input", text)
        ids = _encode(self._tokenizer, text)
        if self._adds_bos and self._bos_id is not None and ids[:1] != [self._bos_id]:
            ids = [self._bos_id, *ids]
        return self._finished(text, ids, mode)

    def from_messages(self, messages: list[dict[str, Any]], tools: list[Any] | None, mode: str) -> Prompt:
        """Messages through the model's template. Raises ``RequestError`` naming the field."""
        if self._template is None:
            raise RequestError("messages", "this model has no chat template; send text_input")
        messages = _map_strings(messages, self._protect)
        said = _said_mode(messages[0], self._settings.reasoning)
        if mode == "auto" and said is None:
            mode = self._settings.default_mode
        messages = self._switch(messages, mode)
        try:
            rendered = self._template.render(
                messages,
                _map_strings(tools, self._protect) if tools else None,
                bos_token=self._settings.bos_token or "",
                **self._settings.template_variables,
            )
        except ValueError as error:
            raise RequestError("messages", str(error)) from error
        rendered = rendered.replace(_SHIELD, "")
        self._check_length("messages", rendered)
        ids = self._encode(rendered)
        if self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]:
            ids = ids[1:]
        return self._finished(_MARKS.sub("", rendered), ids, said or mode if mode == "auto" else mode)

    def _switch(self, messages: list[dict[str, Any]], mode: str) -> list[dict[str, Any]]:
        """Tell the model the mode, in the way its policy says, in the first system message."""
        policy = self._settings.reasoning
        if mode == "auto":
            return messages
        if policy.switch == "none":
            raise RequestError("reasoning_mode", "this model has no reasoning mode; use auto or leave it out")
        has_system = messages[0]["role"] == "system"
        words = messages[0]["content"] if has_system else ""
        rest = messages[1:] if has_system else messages
        if policy.switch == "directive":
            words = _shield(words, (policy.off, policy.on))
            words = f"{words} {policy.off}".lstrip() if mode == "off" else words
            if mode == "on" and not has_system:
                return messages
        else:  # system_text
            wanted = policy.on if mode == "on" else policy.off
            words = "\n\n".join(filter(None, (wanted, _without_line(words, (policy.on, policy.off)))))
        return [{"role": "system", "content": words}, *rest]

    def _protect(self, text: str) -> str:
        """Client text with our marks taken out and its control-token look-alikes marked as literal."""
        text = _MARKS.sub("", text)
        if self._special is None:
            return text
        rest = self._special.sub("\0", text)
        for directive in self._directives:
            rest = rest.replace(directive, "")
        grows = self._special.search(rest) is not None
        text = self._special.sub(lambda m: f"{_LITERAL_BEGIN}{m[0]}{_LITERAL_END}", text)
        if grows:  # to a control token, when the template deletes the directives; so leave something in their place
            for directive in self._directives:
                text = text.replace(directive, f"{directive}{_LITERAL_BEGIN}{_LITERAL_END}")
        return text

    def _check_length(self, field: str, text: str) -> None:
        """Refuse a text that is far too long before it is tokenised whole, which takes 400 bytes for each of its own.

        Its pieces have nearly as many tokens as the whole, so with twice as many as allowed there is no doubt.
        """
        limit, count = self._settings.limits.max_prompt_tokens, 0
        if len(text) <= _LONG_TEXT * limit:
            return
        for at in range(0, len(text), _PIECE_CHARACTERS):
            count += len(_encode(self._plain, text[at : at + _PIECE_CHARACTERS]))
            if count > 2 * limit:
                raise RequestError(field, f"the prompt has more than {count // 2} tokens, the limit is {limit}")

    def _encode(self, rendered: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(re.split(f"{_LITERAL_BEGIN}(.*?){_LITERAL_END}", rendered, flags=re.DOTALL)):
            if piece:
                tokenizer = self._plain if i % 2 else self._tokenizer
                ids += _encode(tokenizer, _MARKS.sub("", piece))
        return ids

    def _finished(self, text: str, ids: list[int], mode: str) -> Prompt:
        if not ids:
            raise RequestError("text_input", "the prompt is empty")
        policy = self._settings.reasoning
        tail = text.rstrip()
        if policy.switch == "none" or (policy.close_tag and tail.endswith(policy.close_tag)):
            start = ANSWER
        elif policy.open_tag and tail.endswith(policy.open_tag):
            start = REASONING
        else:
            start = ANSWER if mode == "off" and policy.switch == "system_text" else MAYBE
        return Prompt(ids, text, start, "off" if start == ANSWER else "on")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids without BOS. As a batch of one: unlike ``encode``, that lets other threads run meanwhile."""
    return list(tokenizer.encode_batch([text], add_special_tokens=False)[0].ids)


def _said_mode(message: dict[str, Any], policy: ReasoningPolicy) -> str | None:
    """The mode that a first message chooses in the model's own words, if any; then no default replaces them."""
    if message["role"] != "system" or policy.switch == "none":
        return None
    words: str = message["content"]
    for mode, phrase in (("off", policy.off), ("on", policy.on)):
        if policy.switch == "directive":  # the template finds it wherever it stands; but "/thinking" is a word
            found = re.search(rf"{re.escape(phrase)}(?!\w)", words) is not None
        else:
            found = _without_line(words, (phrase,)) != words
        if found:
            return mode
    return None


def _alone(directives: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, directives))})(?!\S)")


def _shield(words: str, directives: tuple[str, ...]) -> str:
    """``words`` without directives that stand alone; where one is part of a longer word, hidden from the template."""
    words = _alone(directives).sub("", words)
    for directive in directives:
        words = words.replace(directive, directive[0] + _SHIELD + directive[1:])
    return words


def _without_line(words: str, lines: tuple[str, ...]) -> str:
    """``words`` without a first line that is one of ``lines``: the mode given by field replaces it."""
    first, _, rest = words.partition("\n")
    return rest.strip() if first.strip().lower() in {line.lower() for line in lines} else words


def _map_strings(value: Any, change: Any) -> Any:
    """A copy of JSON-like ``value`` with ``change`` applied to every string, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(v, change) for v in value]
    if isinstance(value, dict):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    return value
