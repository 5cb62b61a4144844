"""Where tile formats are known by name.

Built-in formats, formats of installed packages (entry-point group `stoicc.formats`) and a
user's own all come through `register_format`.
"""

import difflib
import re
from collections.abc import Iterable

from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import FormatError, brief
from stoicc.ir.format import TileFormat
from stoicc.ir.options import NESTED, split_options

_TEXT = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:<(.*)>)?\s*", re.DOTALL)
_MOST_NESTED = 8
"""Formats inside formats; more are a mistake."""


class Registry:
    """Formats by name; a name holds a default instance, its class parses options."""

    def __init__(self) -> None:
        self._formats: dict[str, TileFormat] = {}

    def register(self, fmt: TileFormat) -> TileFormat:
        """Make a format known by its name; a second, different class of that name is an error."""
        if not isinstance(fmt, TileFormat):
            raise FormatError(
                f"register_format: expected an instance of a TileFormat subclass, found {fmt!r}; "
                "derive from stoicc.TileFormat and pass MyFormat()"
            )
        if not re.fullmatch(r"[a-z_][a-z0-9_]*", getattr(fmt, "name", "")):
            raise FormatError(
                f"register_format: expected a name of a-z, 0-9 and _, found {getattr(fmt, 'name', None)!r}; "
                "set the class variable `name`"
            )
        if not _is_default(fmt):
            raise FormatError(
                f"register_format: expected {type(fmt).__qualname__}() with default options, found {fmt}; give every "
                "field a default and register that: options are named where the format is used"
            )
        if type(fmt.revision) is not int or fmt.revision < 1:
            raise FormatError(
                f"register_format: expected a revision of 1, 2, .., found {fmt.revision!r} for {fmt.name}; set the "
                "class variable `revision` to how many layouts its planes have had"
            )
        _check_planes(fmt)
        held = self._formats.get(fmt.name)
        if held is not None and _origin(held) != _origin(fmt):
            raise FormatError(
                f"register_format: expected a new name, found {fmt.name!r} which {type(held).__qualname__} "
                "holds; choose another name"
            )
        self._formats[fmt.name] = fmt
        return fmt

    def unregister(self, name: str) -> None:
        """Forget a format (tests use this)."""
        self._formats.pop(name, None)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._formats))

    def parse(self, text: str) -> TileFormat:
        """The format that a text such as `int4<group_size=128>` names."""
        match = _TEXT.fullmatch(text)
        if match is None or not _nests(match.group(2) or ""):
            raise FormatError(f"format {brief(repr(text))}: expected name or name<option=value, ...>; correct the text")
        name, options = match.groups()
        if name not in self._formats:
            near = difflib.get_close_matches(name[:64], self.names(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known formats are {', '.join(self.names())}"
            raise FormatError(
                f"format {brief(repr(name))}: expected a registered format, found an unknown name; {hint}"
            )
        if options is None:
            return self._formats[name]
        return type(self._formats[name]).from_text(split_options(options, f"format {name}", FormatError))


def _check_planes(fmt: TileFormat) -> None:
    """A plane of a dtype that does not exist would break every later compile; refuse it at the door."""
    try:
        planes = fmt.planes((64, 64), "f32")
    except FormatError:  # its default parameters may not suit this tile
        return
    for plane in planes:
        if plane.dtype not in TORCH_DTYPES:
            raise FormatError(
                f"register_format: expected planes of {', '.join(TORCH_DTYPES)}, found {plane.dtype!r} for plane "
                f"{plane.name!r} of {fmt.name}"
            )


def _is_default(fmt: TileFormat) -> bool:
    """Whether the bare name, which prints no options, reads back as this instance."""
    try:
        return type(fmt)() == fmt
    except TypeError:  # a field without a default
        return False


def _origin(fmt: TileFormat) -> tuple[str, str]:
    """Where a class was defined: the same class run again (a notebook cell) may replace itself."""
    return type(fmt).__module__, type(fmt).__qualname__


def _nests(text: str) -> bool:
    """Whether every < of a text has its >."""
    depth = 0
    for letter in text:
        depth += (letter == "<") - (letter == ">")
        if not 0 <= depth < _MOST_NESTED:
            return False
    return depth == 0


REGISTRY = Registry()
NESTED[TileFormat] = REGISTRY.parse


def register_format(fmt: TileFormat) -> TileFormat:
    """Make a tile format known to the whole process, by its `name`."""
    return REGISTRY.register(fmt)


def find_format(fmt: str | TileFormat) -> TileFormat:
    """A format from its text, or the format itself."""
    return fmt if isinstance(fmt, TileFormat) else REGISTRY.parse(fmt)


def find_formats(formats: Iterable[str | TileFormat]) -> tuple[TileFormat, ...]:
    """Several formats, without repeats, in the order given."""
    return tuple(dict.fromkeys(find_format(fmt) for fmt in formats))
