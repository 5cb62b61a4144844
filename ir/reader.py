"""Tokens of the textual IR: where the parser stands, what may stand there, what is wrong there.

Whatever the text, reading it takes time and memory in proportion to its length, plus what its runs
repeat, which is bounded.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

from stoicc.ir.errors import InputError, ParseError, brief
from stoicc.ir.options import DIGITS
from stoicc.ir.printer import WORD

_T = TypeVar("_T")

_MOST = 1 << 24
"""More entries than this from the runs of one text are a mistake, not a module."""

INT = re.compile(r"-?\d+", re.ASCII)

_STRING = r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
# a string that is not closed ends with its line: no quote in it is looked at again as a start
_COMMENT = re.compile(rf"({_STRING}?)|//[^\n]*")
_SPACE = re.compile(r"\s*")
_RUN = r"-?\d+(?:\s*x\s*\d+|\s*\.\.\s*-?\d+)?"
_INTS = re.compile(rf"{_RUN}(?:\s*,\s*{_RUN})*", re.ASCII)
_SEGMENT_RUN = r"%-?\d+(?:\s*x\s*\d+)?"
_SEGMENT_RUNS = re.compile(rf"{_SEGMENT_RUN}(?:\s*,\s*{_SEGMENT_RUN})*", re.ASCII)
_PARTS = re.compile(r"(-?\d+)(?:\s*(x|\.\.)\s*(-?\d+))?", re.ASCII)


class Reader:
    """A place in a text, and the tokens that may stand there."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise InputError(f"parse: expected text, found {type(text).__name__}; a module need not be parsed")
        self.original = text
        # blanks in place of comments keep every position
        self.text = _COMMENT.sub(lambda m: m.group(1) or " " * len(m.group()), text)
        self.at = 0
        self.repeated = 0
        self._skip()

    def fail(self, expected: str, way_out: str = "correct the text", at: int | None = None) -> NoReturn:
        """Raise a ParseError at `at` (default: here)."""
        place = self.at if at is None else at
        if self.text.startswith("...", place):
            expected = "exact text"
            way_out = "this text is elided: print it with stoicc.ir.print_module(module, exact=True)"
        line = self.text.count("\n", 0, place) + 1
        start = self.text.rfind("\n", 0, place) + 1
        stop = self.text.find("\n", place)
        shown = self.original[start : stop if stop >= 0 else len(self.text)]
        raise ParseError(f"expected {expected}, found {self._found(place)}; {way_out}", line, place - start + 1, shown)

    def end(self) -> None:
        if self.at < len(self.text):
            self.fail("the end of the text")

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self.text, self.at)
        if found is not None:
            self.at = found.end()
            self._skip()
        return found

    def peek(self, keyword: str) -> bool:
        return re.compile(rf"{keyword}\b").match(self.text, self.at) is not None

    def take(self, token: str) -> bool:
        """Step over a keyword or punctuation mark where it stands here."""
        pattern = rf"{re.escape(token)}\b" if token[-1].isalnum() else re.escape(token)
        return self.match(re.compile(pattern)) is not None

    def expect(self, token: str) -> None:
        if not self.take(token):
            self.fail(repr(token))

    def string(self) -> str | None:
        at = self.at
        found = self.match(re.compile(_STRING))
        if found is None:
            return None
        try:
            return str(json.loads(found.group()))
        except ValueError:
            self.fail("a JSON string", at=at)

    def word(self, what: str, pattern: str = WORD) -> str:
        quoted = self.string()
        if quoted is not None:
            return quoted
        found = self.match(re.compile(pattern, re.ASCII))
        return found.group() if found else self.fail(what)

    def integer(self, what: str) -> int:
        at, found = self.at, self.match(INT)
        return self._number(found.group(), at) if found else self.fail(what)

    def repeat(self, entries: int, at: int) -> None:
        """Count entries that the text says by how often, not one by one; too many are a mistake."""
        self.repeated += entries
        if self.repeated > _MOST:
            self.fail("at most 2**24 entries in all runs together", at=at)

    def segment(self) -> int:
        self.expect("%")
        return self.integer("the number of a segment")

    def list(self, entry: Callable[[], _T]) -> tuple[_T, ...]:
        entries = [entry()]
        while self.take(","):
            entries.append(entry())
        return tuple(entries)

    def ints(self) -> tuple[int, ...]:
        """One or more runs of integers."""
        at, found = self.at, self.match(_INTS)
        if found is None:
            self.fail("an integer")
        if self.take(","):
            self.fail("an integer")
        return tuple(self._expand(found.group(), at))

    def segments(self) -> tuple[int, ...]:
        """One or more runs of segments, as in a map row."""
        at, found = self.at, self.match(_SEGMENT_RUNS)
        if found is None:
            self.fail("a string of symbols, or runs such as %0 x4")
        if self.take(","):
            self.fail("a segment such as %0")
        return tuple(self._expand(found.group(), at))

    def _expand(self, runs: str, at: int) -> Iterator[int]:
        for run in _PARTS.finditer(runs):
            value, kind, other = run.groups()
            first = self._number(value, at + run.start())
            if kind is None:
                yield first
                continue
            last = self._number(other, at + run.start())
            length = last if kind == "x" else last - first + 1
            if length < 1:
                self.fail("a run of 1 or more integers", at=at + run.start())
            self.repeat(length, at + run.start())
            yield from (first,) * length if kind == "x" else range(first, last + 1)

    def _number(self, digits: str, at: int) -> int:
        if len(digits.lstrip("-")) > DIGITS:
            self.fail(f"a whole number of at most {DIGITS} digits", at=at)
        return int(digits)

    def _found(self, place: int) -> str:
        token = re.compile(rf"{_STRING}|\.\.\.|[\w.\-]+|\S").match(self.text, place)
        return repr(brief(token.group(), 60)) if token else "the end of the text"

    def _skip(self) -> None:
        space = _SPACE.match(self.text, self.at)
        assert space is not None, "the pattern matches the empty string"
        self.at = space.end()
