"""What a pass is: a frozen dataclass from module to module, whose fields are its text options."""

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from stoicc.ir.errors import PassError
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, TileProgram


@dataclass(frozen=True)
class Pass(ABC):
    """A scheduling decision. Subclass as a frozen dataclass, set `name`, write `apply`.

    Fields are the options of the pass's text, `name{field=value,...}`; their types are int,
    bool, str, `Literal[...]` or a union of those.

    Class attributes:
        name: the name in a pipeline's text.
        requires: passes that must have run before this one.
        after: passes that, where a pipeline has them too, must come before this one, because
            they would undo it.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, module: Module) -> Module:
        """A new module; the input stays as it was. The result satisfies `stoicc.ir.verify`."""

    def __str__(self) -> str:
        """The pipeline text: the first option always, the others where they differ from their default."""
        options = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for index, field in enumerate(dataclasses.fields(self))
            if index == 0 or getattr(self, field.name) != field.default
        ]
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    @classmethod
    def from_text(cls, options: Mapping[str, str]) -> Self:
        """Build the pass from the options of its text; PassError names a wrong one."""
        hints = typing.get_type_hints(cls)
        known = [field.name for field in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise PassError(
                    f"pass {cls.name}: expected {_options_known(known)}, found {option!r}; correct the name"
                )
        return cls(**{option: _value(hints[option], text, cls.name, option) for option, text in options.items()})

    def check(self, option: str, holds: bool, expected: str) -> None:
        """Raise a PassError about an option of this pass unless `holds`."""
        if not holds:
            found = _text(getattr(self, option))
            raise PassError(
                f"pass {self.name}, option {option}: expected {expected}, found {found!r}; correct the value"
            )


def initial_schedule(program: TileProgram) -> Schedule:
    """The schedule before any pass: every segment live, tile rows in natural order."""
    return Schedule(live=tuple(range(len(program.segments))), row_order=tuple(range(program.grid[0])))


def scheduled(module: Module) -> Schedule:
    """The module's schedule, or the initial one of a module that has none yet."""
    return initial_schedule(module.tiles) if module.schedule is None else module.schedule


def with_schedule(module: Module, schedule: Schedule) -> Module:
    """The same tiles under another schedule."""
    return replace(module, schedule=schedule)


def _options_known(known: list[str]) -> str:
    return f"one of the options {', '.join(known)}" if known else "no options"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(hint: Any, text: str, name: str, option: str) -> Any:
    """An option's text read as one of the types that its hint allows."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    choices = typing.get_args(hint) if union else (hint,)
    for choice in choices:
        try:
            return _READERS[choice](text) if choice in _READERS else _literal(choice, text)
        except (KeyError, ValueError):
            continue
    expected = " or ".join(_describe(choice) for choice in choices)
    raise PassError(f"pass {name}, option {option}: expected {expected}, found {text!r}; correct the value")


def _literal(choice: Any, text: str) -> Any:
    return {_text(value): value for value in typing.get_args(choice)}[text]


def _describe(choice: Any) -> str:
    if typing.get_origin(choice) is Literal:
        return " or ".join(_text(value) for value in typing.get_args(choice))
    return str(choice.__name__)


_READERS: dict[Any, Any] = {int: int, str: str, bool: lambda text: {"true": True, "false": False}[text]}
