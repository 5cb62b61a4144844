"""Bytes over the layers of a model: one multiplier for all their tiles, errors weighed by the model's own output.

The error of a layer counts by what it does to what the model returns: each layer alone is swept to 3-bit codes for one
half of the calibration inputs and for the other, the model is run with each half through the weight that was swept for
the other (`stoicc.model.cross_fit`), and the change of its output is set against the error that the layer's table
foretold. That is a forward-only measure of the layer's Gauss-Newton weight, and of how much the table of this layer
foretells too little; it takes two sweeps, and a run of all batches from that layer on, for each layer.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import InputError
from stoicc.model.calibration import Calibration, CalibrationLike, collect_stage, survey
from stoicc.model.cross_fit import HalfCollector, running_apart
from stoicc.model.replay import Read, Replay
from stoicc.ops._hessian import settled
from stoicc.ops._hooks import watching
from stoicc.ops._output import squared_output
from stoicc.ops.statistics import Statistics
from stoicc.policy.budget import Budget
from stoicc.policy.choose import USUAL, Choice, Task, choose, mosaic_of, within_bytes
from stoicc.policy.table import TileTable, merged
from stoicc.policy.uniform import one_format

if TYPE_CHECKING:
    from stoicc.model.layers import Layer

PROBE = Budget(bytes_per_weight=USUAL, formats=("int3",), compensate=True, sort_inputs=False)
"""How a layer is rounded where its effect on the output is measured: above a dtype's rounding."""
FACTOR_BITS = 10
"""Leading bits of what a layer counts: a code that a sweep rounds the other way on other threads does not show."""


@dataclass(frozen=True, eq=False)
class LayerTable:
    """A layer's table, and what its squared errors count in the model's output.

    Attributes:
        factor: change of the model's output, as a share of its squared norm, per unit of the table's errors.
        sorted: the table is in the order of the inputs' energy.
        alone: `[F]`, errors of each format for all tiles, columns as they are; infinite where they are to be sorted.
    """

    table: TileTable
    factor: float
    sorted: bool
    alone: NDArray[np.float64]


def layer_tables(
    model: nn.Module, layers: Sequence["Layer"], calibration: Calibration, policies: Mapping[str, Mapping[str, Any]]
) -> dict[str, LayerTable]:
    """Measure layers on the dense model, those that share an input at a time.

    Args:
        policies: options of `budget_mosaic` by layer, with the bytes per weight of all.

    Raises:
        InputError: a layer that no batch calls, or what a budget refuses.
    """
    found = survey(model, layers, calibration)
    if found.unseen:
        raise InputError(
            f"budget: expected batches that call every layer of the rule, found none for {found.unseen[0].name}; "
            "exclude it, or calibrate with other batches"
        )
    calibration.processes.agree([[layer.name for layer in stage.layers] for stage in found.stages])
    reference = model_output(model, calibration)
    replay, tables = Replay(layers, changing=False), dict[str, LayerTable]()
    for stage in found.stages:
        halves: list[HalfCollector] = []

        def collector(name: str = stage.layers[0].name, halves: list[HalfCollector] = halves) -> Any:
            halves[:] = [HalfCollector(name=name)]
            return halves[0].add

        statistics = collect_stage(model, stage, calibration, torch.float32, replay, also=collector)
        seen = Seen(statistics, halves[0].statistics(calibration.processes))
        for layer in stage.layers:
            factor = layer_factor(model, layer, calibration, seen, reference, replay)
            tables[layer.name] = layer_table(layer.weight.cpu(), statistics, policies[layer.name], factor)
        replay.settle(stage.layers)
    return tables


@dataclass(frozen=True)
class Spread:
    """Bytes over layers.

    Attributes:
        options: of `budget_mosaic` by layer: bytes per weight, and whether inputs are sorted.
        error: of the model's output that is foretold, as a share of its squared norm.
    """

    options: dict[str, dict[str, Any]]
    error: float


def spread_bytes(tables: Mapping[str, LayerTable], bytes_per_weight: float) -> Spread:
    """Bytes per weight of each layer, from one choice over the tiles of all: one multiplier.

    Where one format for all tiles of all layers does about as well, every layer has that.

    Raises:
        InputError: fewer bytes than the formats take, or layers of different formats.
    """
    whole = _joined(tables)
    nothing = np.zeros(len(whole.errors), dtype=np.int64)
    choice = within_bytes(Choice(whole, nothing, (0, 0), 1.0), bytes_per_weight).choice
    alone = np.sum([each.alone * each.factor for each in tables.values()], 0)
    plain = one_format(whole, whole.error(choice), bytes_per_weight * whole.weights, alone)
    options, first = {}, 0
    for name, each in tables.items():
        own = choice[first : first + len(each.table.errors)]
        first += len(own)
        size = each.table.bytes_of(own) if plain is None else float(each.table.bytes[:, plain].sum())
        sort_inputs = each.sorted and plain is None
        options[name] = {"bytes_per_weight": size / each.table.weights, "sort_inputs": sort_inputs}
    return Spread(options, whole.error(choice) if plain is None else float(alone[plain]))


def model_table(
    model: nn.Module,
    calibration: "CalibrationLike | None",
    options: Mapping[str, Any],
    patterns: str | Sequence[str],
) -> tuple[TileTable, list[tuple[int, int]], str]:
    """All tiles of the layers that the patterns name, with errors as shares of the model's squared output.

    With it the layers' shapes in the order of the tiles, and the dtype of their weights.
    """
    from stoicc.model.layers import find_layers
    from stoicc.model.recipe import Recipe, Rule

    if calibration is None:
        raise InputError("pareto: expected calibration batches with a model, found none; give some")
    layers = find_layers(model, Recipe([Rule(patterns)]))
    found = layer_tables(model, layers, Calibration(calibration), {layer.name: options for layer in layers})
    tables = {layer.name: found[layer.name] for layer in layers}
    shapes = [(layer.weight.shape[0], layer.weight.shape[1]) for layer in layers]
    return _joined(tables), shapes, DTYPE_NAMES[layers[0].weight.dtype]


def _joined(tables: Mapping[str, LayerTable]) -> TileTable:
    return merged([each.table for each in tables.values()], [each.factor for each in tables.values()])


def layer_table(weight: Tensor, statistics: Statistics, options: Mapping[str, Any], factor: float) -> LayerTable:
    """The table of one layer, for options of `budget_mosaic` with the bytes per weight of all layers."""
    policy = Budget(compensate=True, **{name: value for name, value in options.items() if name != "tile"})
    table, order = Task.of(weight, statistics, policy, options.get("tile")).table()
    alone = table.errors.sum(0) * (1.0 if order.unsorted is None else order.unsorted)
    if policy.sort_inputs:
        alone = np.full_like(alone, np.inf)
    return LayerTable(table, factor, order.columns is not None, alone)


@dataclass(frozen=True, eq=False)
class Seen:
    """Statistics of a layer's inputs, and of their halves, where both have any."""

    whole: Statistics
    halves: tuple[Statistics, Statistics] | None


def layer_factor(
    model: nn.Module,
    layer: "Layer",
    calibration: Calibration,
    seen: Seen,
    reference: Tensor | None,
    replay: Replay | None = None,
) -> float:
    """What a unit of a layer's foretold error does to the output, as a share of its squared norm.

    Args:
        reference: what `model_output` gives; None: the layer's own output stands for the model's.
        replay: what earlier runs of the dense model left, to go on from.
    """
    dense = layer.weight.cpu()
    if reference is None:
        energy = squared_output(dense, seen.whole)
        return 1 / energy if energy > 0 else 0.0
    lost = float(Task.of(dense, seen.whole, PROBE, None).table()[0].errors.sum())
    one, other = seen.halves or (seen.whole, seen.whole)
    with running_apart(layer, (_probe(dense, other), _probe(dense, one))):
        changed = model_output(model, calibration, replay, layer)
    if changed is None:
        return 0.0
    squares = [float(x.square().sum(dtype=torch.float64)) for x in (changed - reference, reference)]
    change, scale = (sum(parts) for parts in zip(*calibration.processes.told(squares), strict=True))
    if lost <= 0:
        return 0.0
    factor = torch.tensor(change / max(scale, 1e-300) / lost, dtype=torch.float64)
    return float(settled(factor, FACTOR_BITS))


def _probe(dense: Tensor, statistics: Statistics) -> Tensor:
    """A weight swept as `PROBE` says for these inputs."""
    task = Task.of(dense, statistics, PROBE, None)
    return mosaic_of(task, *choose(task)).dense()


def model_output(
    model: nn.Module, calibration: Calibration, replay: Replay | None = None, layer: "Layer | None" = None
) -> Tensor | None:
    """All floats that the model returns on all batches, `[floats]`; None where it returns none.

    Args:
        replay, layer: runs go on from where earlier ones left what comes before the layer.
    """
    while True:
        parts: list[Tensor] = []
        try:
            with (
                watching(model, (), lambda name, x: None),
                replay.over(model) if replay is not None else nullcontext(),
                replay.probing(layer) if replay is not None and layer is not None else nullcontext(),
            ):
                for number, forward in enumerate(calibration.runs()):
                    if replay is not None:
                        replay.begin(number)
                    leaves = tree_leaves(forward(model))
                    floats = (x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
                    parts += [x.detach().float().flatten().cpu() for x in floats]
            return torch.cat(parts) if parts else None
        except Read as read:
            assert replay is not None
            replay.keep(read.kind)
