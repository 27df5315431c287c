"""Tokenizer, special tokens and chat template of a model folder, read without trust and checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemobuild.errors import IntegrityError
from nemobuild.model.hf_config import read_text
from nemobuild.model.spec import ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(folder: Path, spec: ModelSpec) -> Tokenizer:
    """``tokenizer.json`` of ``folder``. Raises ``IntegrityError`` when it is missing, damaged, or of another model."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise IntegrityError("no-tokenizer", f"{folder} has no tokenizer.json.", next="Fetch the whole model folder.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise IntegrityError("bad-tokenizer", f"{file} cannot be read.", why=f"{error}.") from error
    if tokenizer.get_vocab_size(with_added_tokens=True) > spec.vocab_size:
        raise IntegrityError(
            "tokenizer-mismatch",
            f"{file} has more tokens than the model's vocab_size {spec.vocab_size}.",
            why="It belongs to another model.",
        )
    return tokenizer


def chat_template(source: Path, config: dict[str, Any]) -> str | None:
    """The model's own template: ``chat_template.jinja``, or the one in ``tokenizer_config.json``."""
    file = source / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0] if named else None
    if template is not None and not isinstance(template, str):
        raise IntegrityError("bad-template", f"chat_template in {source / 'tokenizer_config.json'} is not text.")
    return template


def special_token(config: Mapping[str, Any], key: str, tokenizer: Any) -> str | None:
    """Text of a special token in ``tokenizer_config.json``, which the tokenizer must know."""
    token = config.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and (not isinstance(text, str) or tokenizer.token_to_id(text) is None):
        raise IntegrityError(
            "bad-special-token", f"{key} in tokenizer_config.json is {text!r}, not a token of the model."
        )
    return text
