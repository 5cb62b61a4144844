"""`stoicc.sparsify_for_training`: linear layers of a model become SlopeLinear, and kernels when they are trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import nn

from stoicc.ir.errors import InputError, StoiccError
from stoicc.kernel import Kernel
from stoicc.model.layers import Layer, Surgery, find_layers
from stoicc.model.recipe import Recipe, Rule
from stoicc.nn.masks import MaskRule, check_structure
from stoicc.nn.slope import SlopeLinear
from stoicc.record import LayerRecord


@dataclass(frozen=True)
class Slope:
    """What the layers that a rule names become.

    Attributes:
        layers, exclude: patterns on module names, as in `stoicc.Rule`.
        n, m: weights kept of each group of a row.
        rank: of the lazy adapters; a float is a share of the smaller side, 0 is none.
        mask: "magnitude" or "random".
        seed: of random masks and adapters; each layer draws from its own.
    """

    layers: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    n: int = 2
    m: int = 4
    rank: int | float = 0
    mask: MaskRule = "magnitude"
    seed: int = 0

    def __post_init__(self) -> None:
        check_structure(self.n, self.m)
        Rule(self.layers, (), self.exclude)  # which says what is wrong with patterns

    @staticmethod
    def of(given: object) -> "Slope":
        """A rule as it is, or from its fields as plain data."""
        if isinstance(given, Slope):
            return given
        known = [field.name for field in fields(Slope)]
        if not isinstance(given, Mapping) or not set(given) <= set(known):
            raise InputError(f"slope: expected {', '.join(known)}, found {given!r:.80}; correct the recipe")
        return Slope(**given)

    def applied(self, linear: nn.Linear, index: int) -> SlopeLinear:
        """The layer in place of a linear one."""
        rank = self.rank if isinstance(self.rank, int) else round(self.rank * min(linear.weight.shape))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return SlopeLinear.of(linear, self.n, self.m, rank, self.mask, generator)


SlopeLike: TypeAlias = Slope | Mapping[str, Any] | Sequence[Any]


def sparsify_for_training(model: nn.Module, recipe: SlopeLike) -> nn.Module:
    """Make linear layers of a model sparse before it is trained, in place; nothing dense is kept of them.

    Make the optimizer afterwards, and a `stoicc.nn.SlopeSchedule`; `stoicc.nn.compile_trained` makes kernels of what
    was trained.

    Args:
        recipe: a `stoicc.nn.Slope`, its fields as plain data, or a list of those; the first rule that names a layer
            is the one.

    Returns:
        The model.

    Raises:
        InputError: a recipe or a layer that cannot be used; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"sparsify_for_training: expected a torch.nn.Module, found {type(model).__name__}")
    slopes = [Slope.of(rule) for rule in ([recipe] if isinstance(recipe, Slope | Mapping) else recipe)]
    rules = [Rule(slope.layers, (), slope.exclude) for slope in slopes]
    of_rule = {id(rule): slope for rule, slope in zip(rules, slopes, strict=True)}
    places: dict[str, nn.Module] = {}
    layers = find_layers(model, Recipe(rules))
    for index, layer in enumerate(layers):
        made = _made(layer, of_rule[id(layer.rule)], index)
        places.update(dict.fromkeys((layer.name, *layer.tied), made))
    surgery = Surgery(model)
    surgery.leave_fast_path(module for layer in layers for module in layer.modules.values())
    surgery.replace(places)
    return model


def compile_trained(model: nn.Module, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
    """Put kernels in the places of the SlopeLinear layers of a model, in place; `stoicc.save_model` writes it.

    Args:
        dtype: of the kernels' weights; default: that of each layer.
        options: of `stoicc.compile`.

    Raises:
        StoiccError: no such layer, or one that does not compile; the model is then as it was.
    """
    places: dict[SlopeLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SlopeLinear) and name:
            places.setdefault(module, []).append(name)
    if not places:
        raise InputError(
            f"model {type(model).__name__}: expected SlopeLinear layers inside, found none; "
            "sparsify_for_training makes them"
        )
    kernels: dict[str, nn.Module] = {}
    for layer, names in places.items():
        kernels.update(dict.fromkeys(names, _kernel(layer, names[0], dtype, options)))
    Surgery(model).replace(kernels)
    return model


def _made(layer: Layer, slope: Slope, index: int) -> SlopeLinear:
    """One layer for all modules of a weight, which must share their bias too."""
    biases = {id(module.bias) for module in layer.modules.values()}
    if len(biases) > 1:
        raise InputError(
            f"layer {layer.name}: expected one bias for a weight that several layers share, found {len(biases)}; "
            "exclude the layer"
        )
    try:
        return slope.applied(layer.modules[layer.name], index)
    except InputError as error:
        raise InputError(f"layer {layer.name}: {error}") from None


def _kernel(layer: SlopeLinear, name: str, dtype: torch.dtype | None, options: Mapping[str, Any]) -> Kernel:
    try:
        kernel = layer.to_kernel(dtype, name=name, **options)
    except StoiccError as error:
        raise type(error)(f"layer {name}: {error}") from error
    kernel.record = LayerRecord((f"slope({layer.extra_repr()})",))
    return kernel
