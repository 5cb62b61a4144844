"""Options of formats and passes as text: the fields of a frozen dataclass, printed and read back.

A field's type is int, float, bool, str, `Literal[...]`, None or a union of those, or a tile format. What is printed
reads back as the same value; a value that would not is refused when it is printed.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeGuard, TypeVar

import numpy as np

from stoicc.ir.errors import StoiccError, brief

_T = TypeVar("_T")

DIGITS = 18
"""The most digits of a whole number, in options and in the IR: any such number and a sum of several fit in 64 bits."""

_INT = re.compile(rf"[+-]?[0-9]{{1,{DIGITS}}}")
_RESERVED = frozenset(",<>{}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is an integer (True and False are not) of at most `DIGITS` digits."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(value) < 10**DIGITS


def option_text(value: object) -> str:
    """A value as it stands in the text of a format or pass."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def split_list(text: str, separators: str = ",") -> list[str]:
    """The parts of a text between separators; those between < and > separate nothing."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter in separators and depth <= 0:
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]


def split_options(text: str, where: str, kind: type[StoiccError]) -> dict[str, str]:
    """`a=1, b=2` as a dict of texts; "" has no options.

    Args:
        where: who the options belong to, for the message: `format int4`.
        kind: the error to raise where the text is no list of options, or names one twice.
    """
    pairs: dict[str, str] = {}
    for part in split_list(text) if text.strip() else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise kind(f"{where}: expected option=value, found {brief(repr(part.strip()))}; correct the text")
        if name in pairs:
            raise kind(f"{where}: expected every option once, found {brief(repr(name))} twice; drop one")
        pairs[name] = value
    return pairs


def read_options(cls: type[_T], options: Mapping[str, str], where: str, kind: type[StoiccError]) -> _T:
    """An instance of a dataclass from the texts of its fields; `kind` names the option that is wrong."""
    hints, known = _hints(cls), [field.name for field in _fields(cls)]
    for option in options:
        if option not in known:
            expected = f"one of the options {', '.join(known)}" if known else "no options"
            raise kind(f"{where}: expected {expected}, found {brief(repr(option))}; correct the name")
    values = {name: _read(hints[name], text, f"{where}, option {name}", kind) for name, text in options.items()}
    try:
        return cls(**values)
    except StoiccError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:  # what a user's own class says of its values
        given = ", ".join(f"{name}={text}" for name, text in options.items()) or "none"
        raise kind(f"{where}: expected options that it takes, found {brief(given)}: {error}; correct them") from error


def print_options(owner: object, where: str, kind: type[StoiccError], first: bool = False) -> list[str]:
    """The fields of a dataclass that differ from their default, each as `name=value`.

    Args:
        first: print the first field in any case.

    Raises:
        kind: a value has the wrong type, or its text would not read back.
    """
    hints = _hints(type(owner))
    printed = []
    for index, field in enumerate(_fields(type(owner))):
        value = getattr(owner, field.name)
        if (first and index == 0) or value != field.default:
            printed.append(f"{field.name}={_print(hints[field.name], value, f'{where}, option {field.name}', kind)}")
    return printed


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


def _print(hint: Any, value: object, where: str, kind: type[StoiccError]) -> str:
    text = option_text(value)
    try:
        back = _read(hint, text, where, kind)
    except StoiccError:
        back = _RESERVED
    nested = any(choice in NESTED for choice in _choices(hint))
    if back != value or isinstance(back, bool) != isinstance(value, bool) or (_RESERVED & set(text) and not nested):
        raise kind(
            f"{where}: expected {_describe(hint)} that reads back from its text, found {brief(repr(value))}; "
            "correct the value, and use none of , < > { } in it"
        )
    return text


def _read(hint: Any, text: str, where: str, kind: type[StoiccError]) -> Any:
    for choice in _choices(hint):
        if choice in NESTED:
            return NESTED[choice](text)
        try:
            return _READERS[choice](text) if choice in _READERS else _literal(choice, text)
        except (KeyError, ValueError):
            continue
    raise kind(f"{where}: expected {_describe(hint)}, found {brief(repr(text))}; correct the value")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The types of a union, None first and str last: what is more than any text goes before it."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if union else (hint,)
    return tuple(sorted(choices, key=lambda choice: (choice is str) - (choice is types.NoneType)))


def _describe(hint: Any) -> str:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return " or ".join(_describe_one(choice) for choice in (typing.get_args(hint) if union else (hint,)))


def _describe_one(choice: Any) -> str:
    if choice is types.NoneType:
        return "none"
    if typing.get_origin(choice) is Literal:
        return " or ".join(option_text(value) for value in typing.get_args(choice))
    return str(getattr(choice, "__name__", choice))


def _literal(choice: Any, text: str) -> Any:
    return {option_text(value): value for value in typing.get_args(choice)}[text]


def _integer(text: str) -> int:
    if not _INT.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _string(text: str) -> str:
    return text.strip()


NESTED: dict[type, Callable[[str], object]] = {}
"""How a field that holds a format is read: text with options of its own, and sentences of its own where it is wrong."""

_READERS: dict[Any, Any] = {
    int: _integer,
    float: float,
    str: _string,
    bool: lambda text: {"true": True, "false": False}[text],
    types.NoneType: lambda text: {"none": None}[text],
}
