"""A weight under a budget, as tiles: choose, round with compensation, encode, and see that an error is kept."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stoicc.inspector import Usable, inspect_for
from stoicc.ir.errors import InputError
from stoicc.ops._output import output_error
from stoicc.ops.combine import permute
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.mosaic import swept_mosaic
from stoicc.policy.choose import WHO, Choice, Order, Task, choose, within_error
from stoicc.pools import TiledWeight

TRIES = 6
"""How often a bound on the error is tightened where what was made misses it."""


@dataclass(frozen=True)
class Wanted:
    """What the inspector is told beside the tiles."""

    usable: Usable
    name: str
    bias: Tensor | None
    activation: str | None


def mosaic_of(task: Task, found: Choice, order: Order) -> CompressedWeight:
    """The weight in the order of the choice, its tiles rounded in a sweep."""
    ordered = task.weight if found.columns is None else permute(task.weight, columns=found.columns)
    assert order.inverse is not None
    return swept_mosaic(ordered, order.inverse, found.table.map(found.choice), task.tile)


def tiled_within(task: Task, wanted: Wanted) -> tuple[TiledWeight, Choice]:
    """The tiles of a weight under its budget, and the choice that they are of.

    Raises:
        InputError: a budget that no choice of the candidates keeps.
    """
    found, order = choose(task)
    tiled = _tiled(task, found, order, wanted)
    goal = task.policy.error
    if goal is None:
        return tiled, found
    aim, dense, reached = goal, task.weight.dense(), 0.0
    for _ in range(TRIES):
        reached = output_error(dense, tiled.to_dense(), task.statistics)
        if reached <= goal:
            return tiled, found
        aim *= 0.99 * goal / reached
        found = within_error(found, aim)
        tiled = _tiled(task, found, order, wanted)
    raise InputError(
        f"{WHO}: expected formats that reach an error of {goal:g}, found {reached:.3g} at best; raise it, or add 'dense' "
        "to formats"
    )


def _tiled(task: Task, found: Choice, order: Order, wanted: Wanted) -> TiledWeight:
    beside = {"name": wanted.name, "bias": wanted.bias, "activation": wanted.activation}
    if task.compensates:
        weight = mosaic_of(task, found, order)
        return inspect_for(wanted.usable, weight, task.formats, task.tile, None, approximate=False, **beside)
    ordered = task.weight if found.columns is None else permute(task.weight, columns=found.columns)
    importance = None if order.seen is None else order.seen.mean_square
    return inspect_for(
        wanted.usable,
        ordered,
        None,
        task.tile,
        found.table.map(found.choice),
        approximate=True,
        importance=importance,
        **beside,
    )
