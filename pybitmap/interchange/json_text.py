# SPDX-License-Identifier: MIT
"""JSON that is read piece by piece: long lists of small objects, one after the other.

Workload: lists of millions of extents, each an object of a few numbers. The elements that a chunk
of text has are parsed together, by the C code of :mod:`json`; only where that fails they are parsed
one by one, so that the error is about the right one. A value that is read as a whole has at most
MAX_LINE characters. Duplicate keys, NaN and infinities, and integers of more than 20 digits are
refused. Source: RFC 8259 (https://www.rfc-editor.org/rfc/rfc8259).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from json.decoder import JSONDecodeError
from typing import Any, Callable, NoReturn, TypeVar

from .base import MAX_LINE, Malformed, Order, Source, shown

_Made = TypeVar("_Made")

#: Of an object that is not read as a whole; those of the formats have a few.
_MOST_KEYS = 64

_BLANKS = " \t\r\n"
_BLANK = re.compile(f"[{_BLANKS}]*")


class JsonText:
    """The text of a source, and how far it has been read."""

    def __init__(self, source: Source) -> None:
        self.source = source
        source.as_text()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._tried = -1  # up to there, the elements cannot be made together
        self._line = 1  # in which the text begins
        self._ended = False

    @property
    def line(self) -> int:
        """That of what comes next."""
        return self._line + self._text.count("\n", 0, self._at)

    def refuse(self, why: str, line: int | None = None) -> NoReturn:
        """
        :raises FormatError: always
        """
        self.source.refuse(why, line=self.line if line is None else line)

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            assert blank is not None
            self._at = blank.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        """This character comes next."""
        found = self.peek()
        if found != expected:
            what = shown(found) if found else "the end of the text"
            self.refuse(f"expected {expected!r}, found {what}")
        self._at += 1

    def end(self) -> None:
        """Nothing comes any more."""
        if found := self.peek():
            self.refuse(f"{shown(found)} behind the end of the value")

    def value(self) -> Any:
        """The next value, of at most MAX_LINE characters."""
        return self._parsed(lambda value: value)

    def _parsed(self, make: Callable[[Any], _Made]) -> _Made:
        if not self.peek():
            self.refuse("it ends where a value should be")
        while True:
            # What follows a number tells that it has ended.
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():
                    made = make(value)
                    self._at = end
                    return made
            except JSONDecodeError as error:
                if len(self._text) - self._at > MAX_LINE:
                    self.refuse(f"a value of more than {MAX_LINE} characters, or none")
                if not self._more():
                    line = self._line + self._text.count("\n", 0, error.pos)
                    whole = len(self._text.rstrip(_BLANKS))
                    if error.pos >= whole or error.msg.startswith("Unterminated"):
                        self.refuse("it ends within a value", line)
                    self.refuse(f"no JSON: {error.msg}", line)
            except Malformed as error:
                self.refuse(str(error))
            except RecursionError:
                self.refuse("values within values, too many")

    def members(self) -> Iterator[str]:
        """Those of the object that comes next; the value of each is to be read before the next."""
        known: set[str] = set()
        for _ in self._parts("{", "}"):
            if self.peek() != '"':
                self.refuse("expected a key in quotes")
            key = str(self.value())
            if key in known:
                self.refuse(f"key {shown(key)} comes twice")
            if len(known) == _MOST_KEYS:
                self.refuse(f"an object of more than {_MOST_KEYS} keys")
            known.add(key)
            self.take(":")
            yield key

    def items(self) -> Iterator[None]:
        """For each value of the list that comes next, which is to be read before the next."""
        return self._parts("[", "]")

    def _parts(self, begin: str, end: str) -> Iterator[None]:
        self.take(begin)
        if self.peek() != end:
            yield None
            while self.peek() == ",":
                self._at += 1
                yield None
            if self.peek() != end:
                self.take(",")
        self._at += 1

    def elements(self, make: Callable[[Any], _Made], order: Order) -> Iterator[_Made]:
        """What ``make`` makes of each element of the list that comes next.

        :param make: may raise Malformed
        :param order: that it makes extents by
        """
        for _ in self.items():
            yield from self._some(make, order)

    def _some(self, make: Callable[[Any], _Made], order: Order) -> list[_Made]:
        """Of as many elements as the text has, or of one, if they cannot be made together."""
        self.peek()
        last = self._text.rfind("}", self._at)
        if last > self._tried:
            self._tried, end = last, order.end
            with suppress(ValueError, RecursionError, Malformed):
                # If this is a list, it is so whatever follows: its last element ends here.
                made = [
                    make(each) for each in _DECODER.decode(f"[{self._text[self._at : last + 1]}]")
                ]
                self._at = last + 1
                return made
            order.end = end
        return [self._parsed(make)]

    def _more(self) -> bool:
        """More text, in the place of what was read; False at the end."""
        more = ""
        while not more:
            chunk = b"" if self._ended else self.source.read()
            self._ended = not chunk
            try:
                more = self._utf8.decode(chunk, final=self._ended)
            except UnicodeDecodeError as error:
                self.source.refuse(f"no UTF-8: {error.reason}", line=self.line)
            if self._ended:
                return False
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at, self._tried = self._text[self._at :] + more, 0, -1
        return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Malformed(f"key {shown(twice)} comes twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 21:
        raise Malformed(f"a number of {len(text)} digits")
    return int(text)


def _constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is no number of bytes")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
