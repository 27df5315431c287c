"""The sandbox that chat templates run in: Jinja's immutable one, with bounds on time and on size.

A template is a stranger's program. Jinja keeps it from Python's insides, but lets it loop without end or fill the
memory, and Python cannot stop a thread from outside. So the program is made to look at the clock by itself, at every
turn of a loop, every call and every filter, and no number, text or list in it may grow beyond a bound. What could
make something huge in one step is checked before, or not offered. Time is that of the rendering thread alone: a busy
machine refuses nothing that an idle one would render.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_RENDER_S = 5.0
MAX_SIZE = 1 << 26  # characters or entries of anything that a template makes; a request has 2^23 bytes at most
_MAX_NUMBER = 1 << 16  # as an argument
_MAX_BITS = 1024
_MAX_INDENT = 64  # it is multiplied by the number of lines
# Methods of texts. Left out are those that pad to a width and those that map one character to many.
_TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)
_NOT_OFFERED = ("center", "pprint", "urlize", "wordwrap", "xmlattr")  # filters; also lipsum(), of any length
_MAKE_TEXT = frozenset("e escape format forceescape indent join lower replace string tojson trim upper".split())
_WIDE = re.compile(r"\d{4}|\*")  # a width in a format

_deadline_s: ContextVar[float] = ContextVar("deadline_s", default=float("inf"))


class OutOfBounds(TemplateError):
    """The template took too long, or would have made something too large."""


class Sandbox(ImmutableSandboxedEnvironment):
    """See the module. ``time_limit`` must surround the rendering."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_printed, **options)
        del self.globals["lipsum"]
        for name in _NOT_OFFERED:
            del self.filters[name]
        self.filters = {name: bounded(name, function) for name, function in self.filters.items()}
        self.filters["_turns"] = _turns

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Jinja's step from text to tree; then loops get a clock, and ``~`` becomes a filter like any other."""
        tree: nodes.Template = _Rewriter().visit(super()._parse(source, name, filename))
        return tree

    # Named as Jinja names them, so that a template's keyword arguments cannot clash.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps ``format``
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            if name not in _TEXT_METHODS:
                raise OutOfBounds(f"the method {name!r} of texts is not offered")
            args = _before(name, (text, *args), kwargs)[1:]
        else:
            _before("", args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _before("format", (left, right), {})
        elif operator == "**":
            _before("", (left, right), {})
        elif operator == "*" and not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            check_size(_length(left) * _length(right))
        return _checked(super().call_binop(context, operator, left, right))


class _Rewriter(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_turns", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)


@contextmanager
def time_limit(seconds: float | None = None) -> Iterator[None]:
    """Let this thread render for so many seconds of its own time; default: ``MAX_RENDER_S``."""
    token = _deadline_s.set(time.thread_time() + (MAX_RENDER_S if seconds is None else seconds))
    try:
        yield
    finally:
        _deadline_s.reset(token)


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``function`` with its arguments and its result checked; what Jinja marks on it stays."""
    first = 1 if getattr(function, "jinja_pass_arg", None) else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _checked(function(*args[:first], *_before(name, args[first:], kwargs), **kwargs))

    return run


def check_size(size: float) -> None:
    if size > MAX_SIZE:
        raise OutOfBounds(f"it makes something of more than {MAX_SIZE} characters or entries")


def _before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Check the arguments of a call or filter for what it could make of them. A generator to be joined is unrolled."""
    if name == "join" and isinstance(args[0], str):  # the method: separator, then parts
        args = (args[0], list(_turns(args[1])))
        check_size(len(args[0]) * len(args[1]))
    elif name == "join":
        args = (list(_turns(args[0])), *args[1:])
        check_size(sum(map(_length, args[1:])) * len(args[0]))
    values = (*args, *kwargs.values())
    most = _MAX_INDENT if name in ("indent", "tojson") else _MAX_NUMBER
    if any(isinstance(value, int) and abs(value) > most for value in values[name != "" :]):
        raise OutOfBounds(f"a number is larger than {most}")
    if name == "format" and _WIDE.search(str(args[0])):
        raise OutOfBounds("a format has a width of more than three digits")
    if name == "indent" and any(isinstance(value, str) for value in values[1:]):
        raise OutOfBounds("only a number can be the width of an indentation")
    if name == "replace" and len(args) > 2:
        check_size(len(str(args[0])) + (str(args[0]).count(str(args[1])) + 1) * len(str(args[2])))
    if name in _MAKE_TEXT:
        for value in values:
            _walk(value)
    return args


def _walk(value: Any) -> None:
    """Meet every entry, as what turns ``value`` into text will: a list of lists of the same list has no end."""
    if isinstance(value, (list, tuple, dict)):
        _check_time()
        for entry in value.values() if isinstance(value, dict) else value:
            _walk(entry)


def _turns(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _printed(value: Any) -> Any:
    _walk(value)
    return value


def _length(value: Any) -> float:
    return len(value) if isinstance(value, (str, list, tuple)) else abs(value) if isinstance(value, (int, float)) else 1


def _checked(value: Any) -> Any:
    _check_time()
    if isinstance(value, (str, list, tuple, dict)):
        check_size(len(value))
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise OutOfBounds(f"a number has more than {_MAX_BITS} bits")
    return value


def _check_time() -> None:
    if time.thread_time() > _deadline_s.get():
        raise OutOfBounds("it takes too long")
