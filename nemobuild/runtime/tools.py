"""Read the tool calls that a model writes between its tool-call tags, while it writes them.

The block should be a JSON list of ``{"name": ..., "arguments": ...}``, but brackets get lost, ``parameters`` stands for
``arguments``, and arguments come as an object or as a string. A call is told as it comes: its name first, then its
arguments piece by piece; an object as the model wrote it, a string without its quotes and escapes. What cannot be read
is not dropped: ``unread`` is the raw text after the last whole call. The result depends on the text only, not on
how it was cut.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Generator
from typing import TypedDict

_GAP = re.compile(r"[\s,]*")
_STRING_MARK = re.compile(r'["\\]')
_NESTED_MARK = re.compile(r'["{}\[\]]')
_SCALAR = re.compile(r'[^\s,:"{}\[\]]*')
_READABLE = re.compile(r'(?:[^\\]+|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*')


class _ToolDelta(TypedDict):
    index: int
    id: str
    arguments: str


class ToolDelta(_ToolDelta, total=False):
    """A piece of one call, ready for JSON. The first piece of a call, and only that, has its ``name``."""

    name: str


class _UnreadableError(ValueError):
    pass


class ToolReader:
    """Reads one block. ``first_index`` is the index of its first call in the answer.

    ``calls`` are the whole ones, each ``{"name": str, "arguments": JSON text}``. Once ``broken``, nothing more is read;
    pieces of a call may have been told before that.
    """

    def __init__(self, first_index: int = 0) -> None:
        self.calls: list[dict[str, str]] = []
        self.broken = False
        self.next_index = first_index
        self._raw: list[str] = []
        self._text, self._at, self._ended = "", 0, False
        self._out: list[ToolDelta] = []
        self._steps = self._block()
        next(self._steps)

    @property
    def unread(self) -> str:
        """Raw text of the block after the last whole call: what is left to show when the block is broken."""
        return "".join(self._raw)

    def push(self, text: str, out: list[ToolDelta]) -> None:
        """Read on in ``text`` and append what became certain to ``out``."""
        self._raw.append(text)
        self._text, self._at, self._out = text, 0, out
        self._run()

    def finish(self, *, closed: bool) -> None:
        """The block ends here: with its closing tag, or because the answer ends."""
        self._text, self._at, self._ended = "", 0, True
        self._run()
        self.broken = self.broken or not (closed or self.calls)

    def _run(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            pass
        except (ValueError, RecursionError):
            self.broken = True

    # The reader is a generator that stops wherever the text ends for now, and goes on in the next push.

    def _block(self) -> Generator[None, None, None]:
        letter = yield from self._letter()
        if letter == "[":
            self._at += 1
            letter = yield from self._letter()
        while letter == "{":
            self._at += 1
            yield from self._call()
            letter = yield from self._letter()
        if letter == "]":
            self._at += 1
            letter = yield from self._letter()
        if letter:
            raise _UnreadableError

    def _call(self) -> Generator[None, None, None]:
        call = _Call(self.next_index, self._tell)
        while True:
            letter = yield from self._letter()
            if letter == '"':
                yield from self._entry(call)
            elif letter == "}" or (letter in ("]", "") and call.arguments is not None):  # its brace may be lost
                break
            else:
                raise _UnreadableError
        self._at += letter == "}"
        self.calls.append(call.finished())
        self._raw = [self._text[self._at :]]

    def _entry(self, call: _Call) -> Generator[None, None, None]:
        key = json.loads((yield from self._value()))
        if (yield from self._letter()) != ":":
            raise _UnreadableError
        self._at += 1
        letter = yield from self._letter()
        if key == "name":
            call.set_name(json.loads((yield from self._value()), strict=False))
        elif key in ("arguments", "parameters"):
            call.begin_arguments(letter)
            yield from self._value(call.take)
            call.end_arguments()
        else:
            json.loads((yield from self._value()))  # such as an id: valid, and of no use here

    def _tell(self, piece: ToolDelta) -> None:
        if self._out and self._out[-1]["index"] == piece["index"]:
            self._out[-1]["arguments"] += piece["arguments"]
        else:
            self._out.append(piece)
            self.next_index = piece["index"] + 1

    def _letter(self) -> Generator[None, None, str]:
        """The next letter after white space and commas, not taken yet; empty at the end of the block."""
        while True:
            self._at = _GAP.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            yield

    def _value(self, take: Callable[[str, bool], None] | None = None) -> Generator[None, None, str]:
        """The raw text of the JSON value that begins here. Its pieces go to ``take`` as they come."""
        pieces: list[str] = []
        depth, quoted, escaped = 0, False, False
        if self._at == len(self._text):  # the block ends here
            raise _UnreadableError
        plain = self._text[self._at] not in '"{['
        while True:
            start, done = self._at, False
            while self._at < len(self._text) and not done:
                if escaped:
                    self._at, escaped = self._at + 1, False
                    continue
                if plain:
                    self._at = _SCALAR.match(self._text, self._at).end()  # type: ignore[union-attr]
                    done = self._at < len(self._text)
                    continue
                mark = (_STRING_MARK if quoted else _NESTED_MARK).search(self._text, self._at)
                if mark is None:
                    self._at = len(self._text)
                    continue
                self._at = mark.end()
                if mark[0] == "\\":
                    escaped = True
                elif mark[0] == '"':
                    quoted = not quoted
                else:
                    depth += 1 if mark[0] in "{[" else -1
                done = not quoted and not escaped and depth == 0
            piece = self._text[start : self._at]
            pieces.append(piece)
            if take is not None:
                take(piece, done)
            if done:
                return "".join(pieces)
            if self._ended:
                raise _UnreadableError
            yield


class _Call:
    """One call while it is read. It is told from its name on; arguments that come before the name wait."""

    def __init__(self, index: int, tell: Callable[[ToolDelta], None]) -> None:
        self.name: str | None = None
        self.arguments: list[str] | None = None
        self._index, self._tell = index, tell
        self._id = f"call_{uuid.uuid4().hex[:24]}"
        self._kind, self._held, self._high, self._quotes = "", "", "", 1

    def set_name(self, name: object) -> None:
        if self.name is not None or not isinstance(name, str) or not name:
            raise _UnreadableError
        self.name = _whole_characters(name)
        text = "".join(self.arguments or ())
        self._tell({"index": self._index, "id": self._id, "name": self.name, "arguments": text})

    def begin_arguments(self, kind: str) -> None:
        if self.arguments is not None:
            raise _UnreadableError
        self.arguments, self._kind = [], kind

    def take(self, piece: str, last: bool) -> None:
        """A raw piece of the arguments."""
        if self._kind == '"':
            begin, self._quotes = self._quotes, 0
            self._add(self._unescaped(piece[begin : len(piece) - last]))
        elif self._kind in "{[":
            self._add(piece)
        else:
            self._held += piece

    def end_arguments(self) -> None:
        if self._kind == '"':
            if self._held:
                raise _UnreadableError
            self._add(_whole_characters(self._high))
        elif self._kind in "{[":
            json.loads("".join(self.arguments or ()))
        else:
            self._add("{}" if json.loads(self._held) is None else self._held)

    def finished(self) -> dict[str, str]:
        if self.name is None:
            raise _UnreadableError
        if not self.arguments:  # none, or an empty string
            self.arguments = []
            self._add("{}")
        return {"name": self.name, "arguments": "".join(self.arguments)}

    def _add(self, text: str) -> None:
        if not text or self.arguments is None:
            return
        self.arguments.append(text)
        if self.name is not None:
            self._tell({"index": self._index, "id": self._id, "arguments": text})

    def _unescaped(self, piece: str) -> str:
        """Text of a piece of a JSON string; from a half or wrong escape on, and half a surrogate pair, wait."""
        raw = self._held + piece
        end = _READABLE.match(raw).end()  # type: ignore[union-attr]
        self._held = raw[end:]
        text: str = self._high + json.loads(f'"{raw[:end]}"', strict=False)
        self._high = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return _whole_characters(text.removesuffix(self._high))


def _whole_characters(text: str) -> str:
    """``text`` with surrogate pairs joined; half a pair is no character and becomes ``U+FFFD``."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
