"""What a recipe says about width pruning: whose rows go, whose columns go with them, and how many stay."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from stoicc.ir.errors import InputError

SAME = "{}"
"""In a pattern: the same text in producers and consumers, which then are coupled for each such text."""


@dataclass(frozen=True)
class Width:
    """Layers that share channels, of which the least active go.

    Patterns are shell globs on module names. `{}` stands for a text that is the same on both sides:
    producers "blocks.{}.up" and consumers "blocks.{}.down" are a pair in every block, each with
    channels of its own. Without it, all layers that the patterns name share one set of channels.

    Attributes:
        producers: `nn.Linear` (their rows) and `nn.Embedding` that make the channels.
        consumers: `nn.Linear` that read them (their columns).
        keep: share of the channels that stay, over 0 and below 1.
        group: channels that stay or go together: the width of a head.
        through: modules between the two with a weight per channel, such as norms.
        remove: take rows and columns out; False: zero them, which leaves shapes as they are (where code counts
            heads), and lets the compiler drop tiles that are empty.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    keep: float
    group: int = 1
    through: tuple[str, ...] = ()
    remove: bool = True

    def __post_init__(self) -> None:
        for side in ("producers", "consumers", "through"):
            given = getattr(self, side)
            patterns = (given,) if isinstance(given, str) else given
            if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
                raise InputError(f"{side}: expected patterns on module names, found {given!r}")
            object.__setattr__(self, side, tuple(patterns))
        if not self.producers or not self.consumers:
            raise InputError("width: expected patterns of producers and consumers, found none of one of them")
        number = isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool)
        if not number or not 0 < self.keep < 1:
            raise InputError(f"width: expected keep over 0 and below 1, a share of the channels, found {self.keep!r}")
        if not isinstance(self.group, int) or self.group < 1:
            raise InputError(f"width: expected a group of at least 1 channel, found {self.group!r}")
        if not isinstance(self.remove, bool):
            raise InputError(f"width: expected remove to be true or false, found {self.remove!r}")
        if self.through and not self.remove:
            raise InputError("width: expected remove with norms in `through`, found remove: false; a norm sees zeros")

    @staticmethod
    def of(given: object) -> "Width":
        """A rule from its plain data."""
        if isinstance(given, Width):
            return given
        fields = tuple(Width.__dataclass_fields__)
        if not isinstance(given, Mapping) or not set(given) <= set(fields):
            raise InputError(f"width: expected {', '.join(fields)}, found {given!r}")
        missing = [name for name in ("producers", "consumers", "keep") if name not in given]
        if missing:
            raise InputError(f"width: expected {', '.join(missing)}, found none")
        return Width(**{str(name): value for name, value in given.items()})

    @property
    def data(self) -> dict[str, Any]:
        """As `of` takes it."""
        data: dict[str, Any] = {"producers": list(self.producers), "consumers": list(self.consumers), "keep": self.keep}
        if self.group != 1:
            data["group"] = self.group
        if self.through:
            data["through"] = list(self.through)
        return data if self.remove else {**data, "remove": False}


def named_by(patterns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Names that match, in their order, each with the text that `{}` stands for ("" without one)."""
    found: dict[str, str] = {}
    for name in names:
        for pattern in patterns:
            before, same, after = pattern.partition(SAME)
            middle = "(.*)" if same else "()"
            match = re.fullmatch(_inner(before) + middle + _inner(after), name, re.DOTALL)
            if match is not None:
                found[name] = match[1]
                break
    return found


def _inner(glob: str) -> str:
    """A glob's regular expression without the end of the text: `(?s:...)`."""
    return translate(glob).removesuffix("\\Z").removesuffix("\\z")
