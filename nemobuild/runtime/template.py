"""Render the model's own chat template, in jinja2's immutable sandbox, as transformers would.

The template comes from the weights' folder, so it is a stranger's program: it gets the messages and a few fixed names,
cannot change what it is given, cannot reach Python's insides, and cannot take more time or memory than ``sandbox``
grants. It is fixed when the repository is emitted; no request can bring its own.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from .sandbox import Sandbox, bounded, check_size, time_limit

MAX_TEMPLATE_CHARACTERS = 1 << 20


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; at inference it only wraps its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template. Raises ``ValueError`` when the text is not a template."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ValueError(f"the chat template is longer than {MAX_TEMPLATE_CHARACTERS} characters")
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = bounded("tojson", _to_json)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template cannot be compiled: {error}") from error

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None = None, **variables: Any) -> str:
        """The prompt with the assistant's header at its end. Raises ``ValueError`` with the template's own words."""
        values = {"messages": messages, "tools": tools, "add_generation_prompt": True} | variables
        pieces, size = [], 0
        try:
            with time_limit():
                for piece in self._template.generate(values):
                    pieces.append(piece)
                    size += len(piece)
                    check_size(size)
            return "".join(pieces)
        except Exception as error:  # a stranger's program may raise anything
            raise ValueError(f"the chat template refused the messages: {error or type(error).__name__}") from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML escapes, as transformers gives it to templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
