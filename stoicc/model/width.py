"""Width pruning over coupled layers: the least active channels go, from all that make and read them.

Source: Muralidharan et al. 2024, Compact Language Models via Pruning and Knowledge Distillation
(Minitron, arXiv 2407.14679), Section 2.2: neurons, heads and embedding channels are scored by the L2 norm of
their activations over calibration samples, all at once on the dense model. The activations taken here are
the inputs of the consumers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stoicc.ir.errors import InputError
from stoicc.model.calibration import Calibration
from stoicc.model.cutting import Cut, cut_module
from stoicc.model.layers import Surgery, is_linear
from stoicc.model.width_rule import SAME, Width, named_by
from stoicc.ops._hooks import watching
from stoicc.ops.statistics import Collector, Statistics

TOLERANCE = 5e-2
"""Two models that are the same but for rounding differ by less than this share."""


@dataclass(frozen=True, eq=False)
class Coupled:
    """Layers that share a set of channels.

    Attributes:
        channels: how many.
        where: of the rule, for messages.
    """

    rule: Width
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    through: tuple[str, ...]
    channels: int
    where: str


@dataclass
class _Seen:
    """What the input of a consumer was in one run: of channels that go, and of those that stay, boiled down."""

    lowest: Tensor | None = None
    highest: Tensor | None = None
    sketches: list[Tensor] = field(default_factory=list)


def prune_width(model: nn.Module, rules: Sequence[Width], calibration: Calibration | None, surgery: Surgery) -> None:
    """Cut the channels of every rule out of the model, through `surgery`.

    What a channel that goes would have given its consumers (f(0) of what stands between) is added to their
    biases, so the result is the model with these rows at zero. A run of the first batch shows
    that; through norms, whose mean and variance lose the channels, it cannot be shown.

    Raises:
        InputError: layers that do not share channels, or that the model does not couple so.
    """
    coupled = [found for index, rule in enumerate(rules) for found in find_coupled(model, rule, f"width {index + 1}")]
    if calibration is None:
        raise InputError("width: expected calibration batches to score channels with, found none; give some")
    consumers = dict.fromkeys(name for each in coupled for name in each.consumers)
    kept = _kept(coupled, _statistics(model, consumers, calibration))
    cuts = _producers_cut(coupled, kept)
    before = len(surgery)
    surgery.replace(_cut(model, {name: cut.zeroed() for name, cut in cuts.items()}))
    zeroed = _look(model, coupled, kept, calibration, narrow=False)
    surgery.undo(before)
    for each, keep in zip(coupled, kept, strict=True):
        for name in each.consumers:
            shift = None if each.through else _constant(each, name, zeroed[name], keep)
            cuts[name] = cuts.get(name, Cut()).with_columns(keep, each.rule.remove, shift)
        for name in each.through:
            cuts[name] = cuts.get(name, Cut()).with_rows(keep, True)
    surgery.replace(_cut(model, cuts))
    _compare(coupled, zeroed, _look(model, coupled, kept, calibration, narrow=True))


def find_coupled(model: nn.Module, rule: Width, where: str) -> list[Coupled]:
    """The sets of layers that a rule couples, in the order of the model.

    Raises:
        InputError: a side that names nothing, a layer of another kind, or of another width.
    """
    modules = dict(model.named_modules())
    sides = {side: named_by(getattr(rule, side), list(modules)) for side in ("producers", "consumers", "through")}
    for side in ("producers", "consumers", "through"):
        if getattr(rule, side) and not sides[side]:
            raise InputError(
                f"{where}: expected {side} that name a layer, found none for {', '.join(getattr(rule, side))}; "
                "model.named_modules() lists them"
            )
    coupled = []
    for key in dict.fromkeys(sides["producers"].values()):
        names = {side: tuple(name for name, same in found.items() if same == key) for side, found in sides.items()}
        if not names["consumers"]:
            raise InputError(
                f"{where}: expected consumers for {', '.join(names['producers'])}, found none with {key!r} for {SAME}"
            )
        widths = {name: _width(side, name, modules[name], where) for side in names for name in names[side]}
        channels = widths[names["producers"][0]]
        for name, found in widths.items():
            if found != channels:
                raise InputError(
                    f"{where}: expected {channels} channels as {names['producers'][0]} makes, found {found} in {name}"
                )
        if channels % rule.group:
            raise InputError(f"{where}: expected a group that divides {channels} channels, found {rule.group}")
        coupled.append(Coupled(rule, names["producers"], names["consumers"], names["through"], channels, where))
    return coupled


def _width(side: str, name: str, module: nn.Module, where: str) -> int:
    """How many channels a module has on its side of the coupling."""
    weight = getattr(module, "weight", None)
    if side == "producers" and is_linear(module):
        return int(module.weight.shape[0])
    if side == "producers" and isinstance(module, nn.Embedding):
        return int(module.weight.shape[1])
    if side == "consumers" and is_linear(module):
        return int(module.weight.shape[1])
    if side == "through" and isinstance(weight, Tensor) and weight.ndim == 1:
        return int(weight.shape[0])
    kinds = {"producers": "nn.Linear or nn.Embedding", "consumers": "nn.Linear", "through": "a weight per channel"}
    raise InputError(f"{where}, {side}: expected {kinds[side]}, found {type(module).__name__} at {name}")


def _statistics(model: nn.Module, names: Iterable[str], calibration: Calibration) -> dict[str, Statistics]:
    collectors = {name: Collector(gram=False, dtype=torch.float64, name=name) for name in names}
    with watching(model, collectors, lambda name, x: collectors[name].add(x)):
        for forward in calibration.runs():
            forward(model)
    return calibration.processes.summed({name: collector.statistics() for name, collector in collectors.items()})


def _kept(coupled: Sequence[Coupled], statistics: dict[str, Statistics]) -> list[Tensor]:
    """Bool `[channels]` for each set: the groups with the largest norm; the first of equal ones."""
    result = []
    for each in coupled:
        energy = torch.stack([statistics[name].mean_square for name in each.consumers]).sum(0)
        scores = energy.view(-1, each.rule.group).sum(1)
        count = max(1, round(each.rule.keep * len(scores)))
        mask = torch.zeros(len(scores), dtype=torch.bool)
        mask[scores.argsort(descending=True, stable=True)[:count]] = True
        result.append(mask.repeat_interleave(each.rule.group))
    return result


def _producers_cut(coupled: Sequence[Coupled], kept: Sequence[Tensor]) -> dict[str, Cut]:
    cuts: dict[str, Cut] = {}
    for each, keep in zip(coupled, kept, strict=True):
        for name in each.producers:
            if name in cuts:
                raise InputError(f"{each.where}: expected rows that no other rule prunes, found {name} in two")
            cuts[name] = Cut().with_rows(keep, each.rule.remove)
    columns = [name for each in coupled for name in each.consumers]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise InputError(f"width: expected columns that no other rule prunes, found {twice[0]} in two")
    return cuts


def _cut(model: nn.Module, cuts: Mapping[str, Cut]) -> dict[str, nn.Module]:
    """Modules after their cuts, at every name at which they stand."""
    made = {model.get_submodule(name): cut_module(model.get_submodule(name), cut) for name, cut in cuts.items()}
    return {name: made[module] for name, module in model.named_modules(remove_duplicate=False) if module in made}


def _look(
    model: nn.Module, coupled: Sequence[Coupled], kept: Sequence[Tensor], calibration: Calibration, narrow: bool
) -> dict[str, _Seen]:
    """Run the first batch and note what consumers see; `narrow`: channels that go are gone already."""
    keeps = {name: (each, keep) for each, keep in zip(coupled, kept, strict=True) for name in each.consumers}
    seen = {name: _Seen() for name in keeps}

    def see(name: str, x: Tensor) -> None:
        each, keep = keeps[name]
        x = x.detach().reshape(-1, x.shape[-1]).double().cpu()
        cut = narrow and each.rule.remove
        stay = x if cut else x[:, keep]
        generator = torch.Generator().manual_seed(0)
        seen[name].sketches.append(stay @ torch.randn(int(keep.sum()), 4, generator=generator, dtype=torch.float64))
        if not cut and len(x):
            low, high = x[:, ~keep].amin(0), x[:, ~keep].amax(0)
            old = seen[name]
            seen[name].lowest = low if old.lowest is None else torch.minimum(low, old.lowest)
            seen[name].highest = high if old.highest is None else torch.maximum(high, old.highest)

    with watching(model, keeps, see):
        try:
            next(calibration.runs())(model)
        except Exception as error:
            raise InputError(
                f"width: expected the model to run without these channels, found {type(error).__name__}: {error}; "
                "couple all layers that share them, or set remove: false"
            ) from error
    return seen


def _constant(each: Coupled, name: str, seen: _Seen, keep: Tensor) -> Tensor | None:
    """What channels that go give a consumer whatever x is, `[channels]`; None where that is nothing."""
    if seen.lowest is None or seen.highest is None:
        raise InputError(f"{each.where}: expected the first batch to reach {name}, found that it does not")
    reach = (seen.highest - seen.lowest).abs()
    if bool((reach > 1e-4 * (1 + seen.lowest.abs())).any()):
        channel = int((~keep).nonzero().flatten()[int(reach.argmax())])
        raise InputError(
            f"{each.where}: expected channels of {name} that come from {', '.join(each.producers)} alone, each from "
            f"one row, found channel {channel} alive with these rows at zero; couple what makes it"
        )
    constant = torch.zeros(each.channels, dtype=torch.float64)
    constant[~keep] = (seen.highest + seen.lowest) / 2
    return constant if bool(constant.any()) else None


def _compare(coupled: Sequence[Coupled], zeroed: dict[str, _Seen], cut: dict[str, _Seen]) -> None:
    """The cut model is the one with zeros; a norm in any rule changes all that come after it."""
    if any(each.through for each in coupled):
        return
    for each in coupled:
        for name in each.consumers:
            expected, found = torch.cat(zeroed[name].sketches), torch.cat(cut[name].sketches)
            if expected.shape != found.shape or (expected - found).norm() > TOLERANCE * expected.norm():
                raise InputError(
                    f"{each.where}: expected {name} to see what zeros in place of the channels give, found something "
                    "else; where code counts heads or channels, set remove: false"
                )
