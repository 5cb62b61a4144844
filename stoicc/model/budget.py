"""A budget over the layers of a rule: uneven sparsity or bits, measured on the dense model before anything else.

One run of all batches collects what every layer's channels carry (no gram matrices, so K numbers a layer);
`stoicc.ops.budgets` says what follows.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stoicc.ir.errors import InputError
from stoicc.ops._hooks import watching
from stoicc.ops.budgets import WIDTHS, bit_budget, bit_sensitivity, outlier_ratio, sparsity_budget
from stoicc.ops.lookup import find_operator
from stoicc.ops.statistics import Collector, Statistics
from stoicc.ops.wanda import wanda

if TYPE_CHECKING:
    from stoicc.model.calibration import Calibration
    from stoicc.model.layers import Layer
    from stoicc.model.recipe import Step


SHARED = ("sparsity", "bits", "bytes_per_weight")
"""What layers may have together."""


@dataclass(frozen=True)
class LayerBudget:
    """What the layers of a rule may have together; steps that leave `sparsity` or `bits` open get their share.

    Attributes:
        sparsity: share of all weights to drop, spread over blocks or layers by what `by` says of them.
        bytes_per_weight: of all tiles, for steps of `budget_mosaic`: one multiplier over the tiles of all layers,
            errors weighed by what they do to the model's output.
        bits: mean bits a weight, scales not counted, spread by a Hessian sensitivity (its diagonal).
        spread, times: OWL's lambda and M.
        per: "block": layers whose names agree up to the first number have one share of sparsity, as in OWL's paper;
            "layer": each has its own.
        by: "outliers": OWL's outlier ratios; "output": in the order of what the model's output changes on the
            calibration inputs, per weight, when a block (or layer) alone is pruned by Wanda: a run for each.
        widths: bits that a layer may have.
    """

    sparsity: float | None = None
    bits: float | None = None
    spread: float = 0.08
    times: float = 5.0
    widths: tuple[int, ...] = WIDTHS
    bytes_per_weight: float | None = None
    per: str = "block"
    by: str = "outliers"

    def __post_init__(self) -> None:
        for name in (*SHARED, "spread", "times"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and (value is not None or name not in SHARED):
                raise InputError(f"budget: expected a number for {name}, found {value!r}")
        for name, known in (("per", ("block", "layer")), ("by", ("outliers", "output"))):
            if getattr(self, name) not in known:
                raise InputError(f"budget: expected {name} to be {' or '.join(known)}, found {getattr(self, name)!r}")
        if not isinstance(self.widths, Sequence) or not all(isinstance(width, int) for width in self.widths):
            raise InputError(f"budget: expected widths as a list of bits, found {self.widths!r}")
        object.__setattr__(self, "widths", tuple(self.widths))
        if all(getattr(self, name) is None for name in SHARED):
            raise InputError(f"budget: expected {', '.join(SHARED[:-1])} or {SHARED[-1]}, found none; give one")

    @staticmethod
    def of(given: object) -> "LayerBudget | None":
        """A budget from its plain data."""
        if given is None or isinstance(given, LayerBudget):
            return given
        fields = tuple(LayerBudget.__dataclass_fields__)
        if not isinstance(given, Mapping) or not set(given) <= set(fields):
            raise InputError(f"budget: expected {', '.join(fields)}, found {given!r}")
        return LayerBudget(**{str(name): value for name, value in given.items()})

    @property
    def data(self) -> dict[str, Any]:
        """As `of` takes it."""
        found = {name: getattr(self, name) for name in LayerBudget.__dataclass_fields__}
        changed = {
            name: value for name, value in found.items() if value != LayerBudget.__dataclass_fields__[name].default
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}

    @property
    def reads_sums(self) -> bool:
        """Whether sums over the inputs' channels are needed."""
        return self.sparsity is not None or self.bits is not None

    def check(self, steps: Sequence["Step"]) -> None:
        """InputError where no step leaves open what the budget gives."""
        for option in SHARED:
            if getattr(self, option) is not None and not any(is_open(step, option) for step in steps):
                raise InputError(
                    f"budget: expected a step that takes {option} and leaves it open, found none in "
                    f"{', '.join(map(str, steps)) or 'no steps'}; take {option} (or n and m) out of its options"
                )


def is_open(step: "Step", option: str) -> bool:
    """Whether an operator takes an option that the step does not settle."""
    settled = {"sparsity": {"sparsity", "n", "m"}}.get(option, {option})
    return option in find_operator(step.operator).options and settled.isdisjoint(step.options)


def spread_budgets(model: nn.Module, layers: Sequence["Layer"], calibration: "Calibration | None") -> list["Layer"]:
    """The layers, in their order, with their share of the budget of their rule in the options of its steps.

    Raises:
        InputError: a budget without calibration, a layer that no batch reaches, or what `stoicc.ops.budgets` refuses.
    """
    meant = [layer for layer in layers if layer.rule.budget is not None]
    if not meant:
        return list(layers)
    if calibration is None:
        raise InputError("budget: expected calibration batches to measure layers with, found none; give some")
    of_sums = [layer for layer in meant if layer.rule.budget is not None and layer.rule.budget.reads_sums]
    statistics = _statistics(model, of_sums, calibration) if of_sums else {}
    shares: dict[str, dict[str, float]] = {layer.name: {} for layer in meant}
    for rule in {id(layer.rule): layer.rule for layer in meant}.values():
        own = [layer for layer in meant if layer.rule is rule]
        assert rule.budget is not None
        for option, found in _shares(model, rule.budget, own, statistics, calibration).items():
            for name, share in found.items():
                shares[name][option] = share
        if rule.budget.bytes_per_weight is not None:
            for name, options in _mosaic_shares(model, own, calibration, rule.budget.bytes_per_weight).items():
                shares[name].update(options)
    return [_with(layer, shares[layer.name]) if layer.name in shares else layer for layer in layers]


def _shares(
    model: nn.Module,
    budget: LayerBudget,
    layers: Sequence["Layer"],
    statistics: Mapping[str, Statistics],
    calibration: "Calibration",
) -> dict[str, Mapping[str, float]]:
    sizes = {layer.name: layer.weight.numel() for layer in layers}
    shares: dict[str, Mapping[str, float]] = {}
    if budget.sparsity is not None:
        groups = blocks_of(layers) if budget.per == "block" else [[layer] for layer in layers]
        if budget.by == "output":
            change = output_change(model, groups, statistics, calibration, budget.sparsity)
            needed = [float(sum(other < own for other in change)) for own in change]
        else:
            needed = [
                outlier_ratio([each.weight for each in group], [statistics[each.name] for each in group], budget.times)
                for group in groups
            ]
        ratios = {layer.name: need for group, need in zip(groups, needed, strict=True) for layer in group}
        found = sparsity_budget(ratios, sizes, budget.sparsity, budget.spread)
        shares["sparsity"] = {name: round(share, 6) for name, share in found.items()}
    if budget.bits is not None:
        measured = {layer.name: bit_sensitivity(layer.weight, statistics[layer.name]) for layer in layers}
        shares["bits"] = bit_budget(measured, sizes, budget.bits, budget.widths)
    return shares


def blocks_of(layers: Sequence["Layer"]) -> list[list["Layer"]]:
    """Layers whose names agree up to the first number between dots; one without a number is its own block."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        found = re.match(r"(.*?\.)?\d+\.", layer.name)
        blocks.setdefault(found[0] if found else layer.name, []).append(layer)
    return list(blocks.values())


def output_change(
    model: nn.Module,
    groups: Sequence[Sequence["Layer"]],
    statistics: Mapping[str, Statistics],
    calibration: "Calibration",
    sparsity: float,
) -> list[float]:
    """By how much each group alone, pruned by Wanda, changes the model's output: squared, per weight of the group.

    Every batch runs once densely and once for each group; nothing but one batch's outputs is held.

    Raises:
        InputError: a model, or a function that runs it, that returns no floats.
    """
    change = [0.0] * len(groups)
    with watching(model, (), lambda name, x: None):
        for forward in calibration.runs():
            dense = _floats(forward(model))
            if not dense:
                raise InputError(
                    "budget: expected a model that returns floats to weigh layers by its output, found none; return "
                    "what the model does from the calibration function, or take by: outliers"
                )
            for index, group in enumerate(groups):
                with _pruned(group, statistics, sparsity):
                    pairs = zip(_floats(forward(model)), dense, strict=True)
                    change[index] += sum(float((y - d).square().sum(dtype=torch.float64)) for y, d in pairs)
    everyone = calibration.processes.told(change)
    weights = [sum(layer.weight.numel() for layer in group) for group in groups]
    return [sum(parts) / count for *parts, count in zip(*everyone, weights, strict=True)]


def _floats(output: object) -> list[Tensor]:
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return [leaf.detach().float() for leaf in leaves]


@contextmanager
def _pruned(group: Sequence["Layer"], statistics: Mapping[str, Statistics], sparsity: float) -> Iterator[None]:
    """The weights of a group by Wanda; afterwards they are the dense ones."""
    dense = [(layer.modules[layer.name].weight, layer.weight) for layer in group]
    try:
        for layer, (weight, values) in zip(group, dense, strict=True):
            weight.data = wanda(values, statistics[layer.name], sparsity).dense().to(values.device)
        yield
    finally:
        for weight, values in dense:
            weight.data = values


def _mosaic_shares(
    model: nn.Module, layers: Sequence["Layer"], calibration: "Calibration", bytes_per_weight: float
) -> dict[str, dict[str, float]]:
    """Bytes per weight of each layer, and whether its inputs are sorted."""
    from stoicc.model.mosaic_budget import layer_tables, spread_bytes  # it imports the policy, and this the recipe

    step = layers[0].rule.steps[0]
    if not is_open(step, "bytes_per_weight"):
        raise InputError(
            f"budget: expected the first step to leave bytes_per_weight open, found {step}; tiles are chosen from the "
            "dense weight, so put it first"
        )
    options = {**step.options, "bytes_per_weight": bytes_per_weight}
    tables = layer_tables(model, layers, calibration, {layer.name: options for layer in layers})
    return spread_bytes(tables, bytes_per_weight).options


def _statistics(model: nn.Module, layers: Sequence["Layer"], calibration: "Calibration") -> dict[str, Statistics]:
    collectors = {layer.name: Collector(gram=False, name=layer.name) for layer in layers}
    of_name = {name: collectors[layer.name] for layer in layers for name in layer.modules}

    def see(name: str, x: Tensor) -> None:
        of_name[name].add(x)

    with watching(model, of_name, see):
        for forward in calibration.runs():
            forward(model)
    return calibration.processes.summed({name: collector.statistics() for name, collector in collectors.items()})


def _with(layer: "Layer", shares: Mapping[str, float]) -> "Layer":
    """The layer with its shares as options of the steps that leave them open."""
    steps = tuple(
        replace(step, options={**step.options, **{o: share for o, share in shares.items() if is_open(step, o)}})
        for step in layer.rule.steps
    )
    return replace(layer, rule=layer.rule.with_steps(steps))
