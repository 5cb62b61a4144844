"""What is done to which layer of a model: a recipe, as dataclasses, plain data or YAML.

rules:
- layers: ["encoder.*.dense", "re:head[0-9]+"]      # patterns on module names; "*" also matches dots
  exclude: ["*.pooler.*"]
  steps:                                            # operators of stoicc.ops, in order
  - nm_magnitude: {n: 2, m: 4}
  - group_absmax: {bits: 4, group_size: 128}
  compile: {tile: [64, 64]}                         # options of stoicc.compile
  # budget: {sparsity: 0.6}                         # or bits, bytes_per_weight: uneven over layers, where open
width:                                              # first of all: channels that go from coupled layers
- {producers: "encoder.{}.up", consumers: "encoder.{}.down", keep: 0.75}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from stoicc.ir.errors import InputError, brief
from stoicc.model.budget import LayerBudget
from stoicc.model.width_rule import Width
from stoicc.ops.lookup import find_operator, near

COMPILE_OPTIONS = ("formats", "tile", "pipeline", "target", "on_missing")
"""What a rule may say to `stoicc.compile`."""

REGEX = "re:"


@dataclass(frozen=True)
class Step:
    """One operator with its options; checked against its signature.

    Raises:
        InputError: an unknown operator or option, or a required option that is missing.
    """

    operator: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", {name: _plain(value) for name, value in self.options.items()})
        find_operator(self.operator).check(self.options)

    @staticmethod
    def of(given: object) -> "Step":
        """A step from `"operator"` or `{"operator": {option: value}}`."""
        if isinstance(given, Step):
            return given
        if isinstance(given, str):
            return Step(given)
        if not isinstance(given, Mapping) or len(given) != 1:
            raise InputError(f"step: expected one operator, as 'name' or {{name: {{option: value}}}}, found {given!r}")
        ((name, options),) = given.items()
        if options is not None and not isinstance(options, Mapping):
            raise InputError(f"step {name}: expected options as {{option: value}}, found {options!r}")
        return Step(name, options or {})

    @property
    def data(self) -> str | dict[str, Any]:
        """As `of` takes it."""
        return (
            {self.operator: {name: _listed(value) for name, value in self.options.items()}}
            if self.options
            else (self.operator)
        )

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.operator}({options})"


@dataclass(frozen=True)
class Rule:
    """Steps for the layers that its patterns name.

    Attributes:
        layers: patterns on module names: shell globs, whose `*` also matches dots, or regular
            expressions behind "re:"; a name must match as a whole.
        steps: operators in order, as `Step` or in any form that `Step.of` takes; with none, the layer is
            compiled as it is.
        exclude: patterns of layers that the rule leaves to later rules.
        compile: options of `stoicc.compile`: formats, tile, pipeline, target, on_missing.
        budget: sparsity, bits or bytes_per_weight that the layers have together, for steps that leave them open.
    """

    layers: tuple[str, ...]
    steps: tuple[Step, ...] = ()
    exclude: tuple[str, ...] = ()
    compile: Mapping[str, Any] = field(default_factory=dict)
    budget: LayerBudget | None = None

    def __init__(
        self,
        layers: str | Sequence[str],
        steps: Sequence[object] = (),
        exclude: str | Sequence[str] = (),
        compile: Mapping[str, Any] | None = None,
        budget: object = None,
    ) -> None:
        if isinstance(steps, (str, Mapping)) or not isinstance(steps, Sequence):
            raise InputError(f"steps: expected a list of operators, found {steps!r}; write [...] around it")
        options = {name: _plain(value) for name, value in (compile or {}).items()}
        for name in options:
            if name not in COMPILE_OPTIONS:
                raise InputError(
                    f"compile: expected options {', '.join(COMPILE_OPTIONS)}, found "
                    f"{name!r}{near(name, COMPILE_OPTIONS)}"
                )
        object.__setattr__(self, "layers", _patterns("layers", layers))
        object.__setattr__(self, "steps", tuple(_placed(f"step {i + 1}", Step.of, s) for i, s in enumerate(steps)))
        object.__setattr__(self, "exclude", _patterns("exclude", exclude))
        object.__setattr__(self, "compile", options)
        object.__setattr__(self, "budget", LayerBudget.of(budget))
        if self.budget is not None:
            self.budget.check(self.steps)

    def names(self, layer: str) -> bool:
        """Whether the rule is for a layer of this name."""
        return matches(layer, self.layers) and not matches(layer, self.exclude)

    def with_steps(self, steps: Sequence[Step]) -> "Rule":
        """The rule with steps that leave nothing to a budget."""
        return Rule(self.layers, steps, self.exclude, self.compile)

    @property
    def loading(self) -> dict[str, Any]:
        """The part of the compile options that `stoicc.load` takes too."""
        return {name: value for name, value in self.compile.items() if name in ("target", "on_missing")}

    @property
    def data(self) -> dict[str, Any]:
        """Plain data, as a recipe's YAML has it."""
        data: dict[str, Any] = {"layers": list(self.layers)}
        if self.exclude:
            data["exclude"] = list(self.exclude)
        data["steps"] = [step.data for step in self.steps]
        if self.compile:
            data["compile"] = {name: _listed(value) for name, value in self.compile.items()}
        if self.budget is not None:
            data["budget"] = self.budget.data
        return data


@dataclass(frozen=True)
class Recipe:
    """Rules for the linear layers of a model; the first rule that names a layer is the one.

    Layers that no rule names stay as they are. `str()` is YAML, which `Recipe.parse` reads back.

    Attributes:
        rules: as `Rule` or as plain data.
        untie: compress a weight that it shares with a module that is not a linear layer (an
            embedding), which keeps the dense one; without it such a layer is refused.
        width: channels that go from coupled layers before anything else.
    """

    rules: tuple[Rule, ...]
    untie: bool = False
    width: tuple[Width, ...] = ()

    def __init__(self, rules: Sequence[object] = (), untie: bool = False, width: Sequence[object] = ()) -> None:
        for what, given in (("rules", rules), ("width rules", width)):
            if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
                raise InputError(f"recipe: expected a list of {what}, found {given!r}; write [...] around it")
        if not rules and not width:
            raise InputError("recipe: expected a list of rules, found none; write [{layers: ..., steps: ...}]")
        if not isinstance(untie, bool):
            raise InputError(f"recipe: expected untie to be true or false, found {untie!r}")
        made = tuple(_placed(f"recipe, rule {index + 1}", _rule, rule) for index, rule in enumerate(rules))
        widths = tuple(_placed(f"recipe, width {index + 1}", Width.of, rule) for index, rule in enumerate(width))
        object.__setattr__(self, "rules", made)
        object.__setattr__(self, "untie", untie)
        object.__setattr__(self, "width", widths)

    @staticmethod
    def of(given: "RecipeLike") -> "Recipe":
        """A recipe from plain data, YAML text, a YAML file (a `Path`), or a list of steps for all layers.

        Raises:
            InputError: what cannot be read as a recipe, and where.
        """
        if isinstance(given, Recipe):
            return given
        if isinstance(given, PathLike):
            return Recipe.read(given)
        if isinstance(given, str):
            return Recipe.parse(given)
        if isinstance(given, Mapping):
            _known("recipe", given, ("rules", "untie", "width"))
            return Recipe(given.get("rules") or (), given.get("untie", False), given.get("width") or ())
        if isinstance(given, Sequence):
            return Recipe([Rule("*", given)])
        raise InputError(f"recipe: expected a Recipe, rules, steps, YAML text or a path, found {type(given).__name__}")

    @staticmethod
    def parse(text: str) -> "Recipe":
        """The recipe of a YAML text."""
        import yaml

        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"recipe: expected YAML, found {brief(str(error))}") from None
        if not isinstance(data, (Mapping, list)):
            raise InputError(
                f"recipe: expected YAML with rules or a list of steps, found {brief(repr(data))}; "
                "give the path of a file as pathlib.Path"
            )
        return Recipe.of(data)

    @staticmethod
    def read(path: str | PathLike[str]) -> "Recipe":
        """The recipe of a YAML file."""
        try:
            return Recipe.parse(Path(path).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {path}: expected a file of YAML, found {brief(str(error))}") from None

    @property
    def data(self) -> dict[str, Any]:
        """Plain data, as `of` takes it."""
        data: dict[str, Any] = {"width": [width.data for width in self.width]} if self.width else {}
        return {**data, "rules": [rule.data for rule in self.rules], **({"untie": True} if self.untie else {})}

    def rule_of(self, layer: str) -> Rule | None:
        """The first rule that names a layer."""
        return next((rule for rule in self.rules if rule.names(layer)), None)

    def __str__(self) -> str:
        import yaml

        return yaml.safe_dump(self.data, sort_keys=False, default_flow_style=None, width=100)


RecipeLike: TypeAlias = Recipe | Mapping[str, Any] | Sequence[Any] | str | PathLike[str]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns matches the whole name."""
    return any(re.fullmatch(_regex(pattern), name) is not None for pattern in patterns)


def _regex(pattern: str) -> str:
    return pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else translate(pattern)


def _patterns(what: str, given: object) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"{what}: expected patterns on layer names, found {given!r}")
    for pattern in patterns:
        try:
            re.compile(_regex(pattern))
        except re.error as error:
            raise InputError(
                f"{what}: expected a regular expression behind 're:', found {pattern!r} ({error})"
            ) from None
    return tuple(patterns)


def _rule(given: object) -> Rule:
    if isinstance(given, Rule):
        rule = given
    elif isinstance(given, Mapping):
        _known("rule", given, ("layers", "steps", "exclude", "compile", "budget"))
        if "layers" not in given:
            raise InputError("rule: expected layers, found none; write layers: '*' for all")
        steps, exclude = given.get("steps") or (), given.get("exclude") or ()
        rule = Rule(given["layers"], steps, exclude, given.get("compile"), given.get("budget"))
    else:
        raise InputError(f"rule: expected {{layers: ..., steps: [...]}}, found {given!r}")
    if not rule.layers:
        raise InputError("rule: expected at least one pattern in layers, found none")
    return rule


def _known(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise InputError(f"{what}: expected {', '.join(known)}, found {key!r}{near(key, known)}")


def _placed(where: str, make: Any, given: object) -> Any:
    """make(given), whose complaints say where in the recipe it stood."""
    try:
        return make(given)
    except InputError as error:
        raise InputError(f"{where}, {error}") from None


def _plain(value: object) -> object:
    """A value of an option that YAML holds; lists become tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(_plain(part) for part in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"option: expected numbers, texts, true, false, null or lists of them, found {value!r:.60}")


def _listed(value: object) -> object:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value
