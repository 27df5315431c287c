"""The tokenizer of a model folder, loaded without trust and checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nemobuild.errors import IntegrityError
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
