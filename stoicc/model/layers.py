"""The linear layers of a model that a recipe names: found once per weight, replaced, and put back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from stoicc.ir.errors import InputError
from stoicc.model.recipe import Recipe, Rule


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight `[M, K]` and every linear layer that holds it.

    Attributes:
        name: of the layer in the model, the first one in the order of `named_modules`.
        places: every name under which a layer of this weight stands, by the layer's own first name.
        modules: the distinct `nn.Linear` modules (tied weights: more than one), by first name.
        rule: what the recipe does to it.
    """

    name: str
    places: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, nn.Linear]
    rule: Rule

    @property
    def weight(self) -> Tensor:
        """The dense weight, without gradient."""
        return self.modules[self.name].weight.detach()

    @property
    def tied(self) -> tuple[str, ...]:
        """Names beside `name` under which the weight stands."""
        return tuple(place for places in self.places.values() for place in places if place != self.name)


def find_layers(model: nn.Module, recipe: Recipe) -> list[Layer]:
    """The layers that the rules name, one for each weight, in the order of the model.

    Layers that share a weight are one, under the first rule that names any of them. A subclass of
    `nn.Linear` with a forward of its own is none, nor is `out_proj` of `nn.MultiheadAttention`, which
    reads its weight and never calls it.

    Raises:
        InputError: a rule that names no layer, a model without linear layers, or a weight that a
            module of another kind shares.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    linears = {module: names for module, names in places.items() if is_linear(module)}
    if not linears or isinstance(model, nn.Linear):
        raise InputError(
            f"model {type(model).__name__}: expected linear layers inside, found "
            f"{'a single one; use stoicc.compile' if linears else 'none'}"
        )
    by_weight: dict[int, list[nn.Linear]] = {}
    for module in linears:
        assert isinstance(module, nn.Linear)
        by_weight.setdefault(id(module.weight), []).append(module)
    layers = []
    for modules in by_weight.values():
        names = [name for module in modules for name in linears[module]]
        rule = _rule_of(recipe, names)
        if rule is not None:
            held = {linears[module][0]: module for module in modules}
            layer = Layer(names[0], {first: tuple(linears[m]) for first, m in held.items()}, held, rule)
            _refuse_shared(layer, places, recipe.untie)
            layers.append(layer)
    _refuse_idle(recipe, [name for names in linears.values() for name in names])
    return layers


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a module is F.linear with its weight and bias, so that a kernel can take its place."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    )


def _rule_of(recipe: Recipe, names: list[str]) -> Rule | None:
    return next((rule for rule in recipe.rules if any(rule.names(name) for name in names)), None)


def _refuse_idle(recipe: Recipe, names: list[str]) -> None:
    """Every rule has a layer that it names; that an earlier rule has taken it is the recipe's business."""
    for index, rule in enumerate(recipe.rules):
        if not any(rule.names(name) for name in names):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise InputError(
                f"recipe, rule {index + 1}: expected patterns that name a linear layer, found none for "
                f"{', '.join(rule.layers)}; the model has {shown}"
            )


def _refuse_shared(layer: Layer, places: Mapping[nn.Module, list[str]], untie: bool) -> None:
    weight = layer.modules[layer.name].weight
    for module, names in places.items():
        if untie or isinstance(module, nn.Linear):
            continue
        if any(parameter is weight for parameter in module.parameters(recurse=False)):
            raise InputError(
                f"layer {layer.name}: expected a weight of linear layers alone, found it shared with "
                f"{names[0] or 'the model'} ({type(module).__name__}), which would keep a dense copy; exclude the "
                "layer, or set untie in the recipe"
            )


class Surgery:
    """Changes attributes of modules, submodules among them, and can change them back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changed: list[tuple[nn.Module, str, object]] = []

    def replace(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules in the places of these names."""
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            self.set(self._model.get_submodule(parent), child, module)

    def set(self, module: nn.Module, attribute: str, value: object) -> None:
        """setattr, remembered."""
        self._changed.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    def leave_fast_path(self, layers: Iterable[nn.Module]) -> None:
        """Have torch's own transformer encoders call these layers, whose weights their fused kernels would read."""
        chosen = set(layers)
        for module in self._model.modules():
            if chosen.isdisjoint(module.modules()):
                continue
            if isinstance(module, nn.TransformerEncoderLayer):
                self.set(module, "activation_relu_or_gelu", 0)  # what its forward asks first; `activation` is used
            elif isinstance(module, nn.TransformerEncoder):
                self.set(module, "use_nested_tensor", False)

    def undo(self, left: int = 0) -> None:
        """The model as it was, or as it was after the first `left` changes."""
        while len(self) > left:
            module, attribute, value = self._changed.pop()
            setattr(module, attribute, value)

    def forget(self) -> None:
        """Let go of what was changed: there is nothing to undo any more."""
        self._changed.clear()

    def __len__(self) -> int:
        """How many changes there are to undo."""
        return len(self._changed)
