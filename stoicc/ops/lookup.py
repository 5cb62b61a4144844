"""Operators by name, as recipes write them: an operator's options are read off its signature."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops.graph import CompressedWeight

Apply = Callable[..., CompressedWeight]


@dataclass(frozen=True)
class Operator:
    """An operator whose options can stand in a recipe.

    Attributes:
        options: names of its keyword options, in order; those that take a tensor are left out.
        required: options without a default.
        statistics: "needed" where it has no default for them, "taken" where it has, "none" otherwise.
        argument: the parameter that statistics go to.
    """

    name: str
    function: Apply
    options: tuple[str, ...]
    required: tuple[str, ...]
    statistics: str
    argument: str = "statistics"

    def check(self, options: Mapping[str, Any]) -> None:
        """InputError where an option is unknown, or a required one is missing."""
        for option in options:
            if option not in self.options:
                raise InputError(
                    f"operator {self.name}: expected options {', '.join(self.options) or '(none)'}, found "
                    f"{option!r}{near(option, self.options)}"
                )
        if missing := [option for option in self.required if option not in options]:
            raise InputError(f"operator {self.name}: expected a value for {', '.join(missing)}, found none; give one")

    def __call__(
        self, weight: Tensor | CompressedWeight, options: Mapping[str, Any], statistics: object | None = None
    ) -> CompressedWeight:
        """Apply it; statistics go to operators that take them."""
        if self.statistics == "needed" and statistics is None:
            raise InputError(
                f"operator {self.name}: expected statistics of the layer's inputs, found none; give calibration "
                "batches on which the model calls this layer"
            )
        extra = {} if self.statistics == "none" or statistics is None else {self.argument: statistics}
        return self.function(weight, **options, **extra)


def near(name: object, known: tuple[str, ...]) -> str:
    """ "; did you mean ...?" where a known name is close."""
    found = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


@cache
def operators() -> dict[str, Operator]:
    """Every operator of `stoicc.ops` that a recipe can name, by name."""
    from stoicc import ops  # it exports what this module reads

    found = {name: _operator(name, getattr(ops, name)) for name in ops.__all__}
    return {name: operator for name, operator in found.items() if operator is not None}


def find_operator(name: object) -> Operator:
    """The operator of this name; InputError, with names that are near, where there is none."""
    known = operators()
    if not isinstance(name, str) or name not in known:
        raise InputError(f"operator: expected one of {', '.join(known)}, found {name!r}{near(name, tuple(known))}")
    return known[name]


def _operator(name: str, function: object) -> Operator | None:
    """What a signature says; None for what is no operator, or has only tensors to decide with."""
    if not inspect.isfunction(function):
        return None
    first, *others = inspect.signature(function).parameters.values()
    if first.name != "weight" or any(other.kind is other.VAR_POSITIONAL for other in (first, *others)):
        return None
    statistics, argument = "none", "statistics"
    options, required = [], []
    for parameter in others:
        if parameter.name == "statistics" or "Statistics" in str(parameter.annotation):
            statistics, argument = "needed" if parameter.default is parameter.empty else "taken", parameter.name
        elif "Tensor" not in str(parameter.annotation):
            options.append(parameter.name)
            required += [parameter.name] * (parameter.default is parameter.empty)
        elif parameter.default is parameter.empty:
            return None
    if not options and statistics == "none":
        return None
    return Operator(name, function, tuple(options), tuple(required), statistics, argument)
