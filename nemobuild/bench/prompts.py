"""What is asked under load: prompts of a file, or made-up ones of a given number of tokens.

The made-up ones differ from the first word on, so that no cache of earlier prompts answers. Their length is found by
asking: two short requests tell how many tokens a word is and how many the template adds, on any endpoint that counts
its tokens, whatever its tokenizer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemobuild.bench.targets import Failed, Target
from nemobuild.errors import RemoteError, UsageError
from nemobuild.model.hf_config import read_text

Messages = list[dict[str, Any]]
Prompts = Callable[[int], Messages]  # the number of a request -> its messages
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father"
).split()
_PROBE_WORDS = (16, 272)
_PROBE_TIMEOUT_S = 300.0
_DEFAULT_TASK = "Explain in a few sentences how a {} is made, and why it matters to a {}."


def prompts_from_file(file: Path) -> Prompts:
    """The file's prompts, again and again in its order. Lines of text, or JSON lines (``.jsonl``).

    A JSON line is a text, ``{"prompt": text}`` or ``{"messages": [...]}``. Raises ``UsageError`` naming a bad line.
    """
    found: list[Messages] = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if line.strip():
            found.append(_from_json(file, number, line) if file.suffix == ".jsonl" else _user(line))
    if not found:
        raise UsageError("no-prompts", f"{file} holds no prompt.")
    return lambda number: found[number % len(found)]


def short_prompts(seed: int) -> Prompts:
    """Small questions, all different."""

    def prompt(number: int) -> Messages:
        choice = random.Random(f"{seed}/{number}")
        return _user(_DEFAULT_TASK.format(choice.choice(_WORDS), choice.choice(_WORDS)))

    return prompt


async def sized_prompts(target: Target, tokens: int, seed: int) -> Prompts:
    """Prompts of about ``tokens`` tokens, the template's own included. Raises ``UsageError`` for too few."""
    few, many = _PROBE_WORDS
    at_few, at_many = [await _count(target, _words(seed, -1, count)) for count in _PROBE_WORDS]
    per_word = (at_many - at_few) / (many - few)
    around = at_few - few * per_word
    if per_word <= 0 or tokens < around + per_word:
        raise UsageError(
            "short-prompt",
            f"A prompt of {tokens} tokens is too short.",
            why=f"Around any text {target.url} puts {around:.0f} tokens.",
        )
    count = round((tokens - around) / per_word)
    return lambda number: _words(seed, number, count)


async def _count(target: Target, messages: Messages) -> int:
    """Tokens of a prompt, by asking for one token of an answer."""
    counted = None
    try:
        async for outputs in target.ask({"messages": messages, "max_tokens": 1}, _PROBE_TIMEOUT_S):
            counted = outputs.get("prompt_tokens", counted)
    except Failed as error:
        raise RemoteError("probe-failed", f"{target.url} does not answer a short request.", why=f"{error}.") from error
    if counted is None:
        raise RemoteError("no-usage", f"{target.url} does not count its tokens.", next="Give the prompts in a file.")
    return int(counted)


def _words(seed: int, number: int, count: int) -> Messages:
    return _user(" ".join(random.Random(f"{seed}/{number}").choices(_WORDS, k=count)))


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _from_json(file: Path, number: int, line: str) -> Messages:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError("bad-prompts", f"Line {number} of {file} is not valid JSON.", why=f"{error}.") from error
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return list(value["messages"])
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UsageError("bad-prompts", f"Line {number} of {file} has neither messages nor a prompt.")
    return _user(text)
