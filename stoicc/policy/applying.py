"""A weight under a budget, as tiles: choose, round with compensation, encode, and see that an error is kept."""

from dataclasses import dataclass, replace

from torch import Tensor

from stoicc.inspector import Usable, inspect_for
from stoicc.ir.errors import InputError
from stoicc.ops._output import output_error
from stoicc.ops.combine import permute
from stoicc.policy.choose import WHO, Choice, Order, Task, choose, mosaic_of, within_error
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


def tiled_within(task: Task, wanted: Wanted) -> tuple[TiledWeight, Choice]:
    """The tiles of a weight under its budget, and the choice that they are of.

    Raises:
        InputError: a budget that no choice of the candidates keeps.
    """
    found, order = choose(task)
    tiled = _tiled(task, found, order, wanted)
    goal = task.policy.error
    if goal is None:
        return tiled, replace(found, energy=task.energy())
    aim, dense, reached = goal, task.weight.dense(), 0.0
    for _ in range(TRIES):
        reached = output_error(dense, tiled.to_dense(), task.statistics)
        if reached <= goal:
            return tiled, found
        aim *= 0.99 * goal / reached
        found = within_error(found, aim)
        tiled = _tiled(task, found, order, wanted)
    raise InputError(
        f"{WHO}: expected formats that reach an error of {goal:g}, found {reached:.3g} at best; raise it, or "
        "add 'dense' to formats"
    )


def _tiled(task: Task, found: Choice, order: Order, wanted: Wanted) -> TiledWeight:
    """In a sweep, codes are carried and tiles are found again by what they hold; else formats encode what they get."""
    swept = task.compensates
    if swept:
        weight = mosaic_of(task, found, order)
    else:
        weight = task.weight if found.columns is None else permute(task.weight, columns=found.columns)
    return inspect_for(
        wanted.usable,
        weight,
        task.formats if swept else None,
        task.tile,
        None if swept else found.table.map(found.choice),
        approximate=not swept,
        importance=None if swept or order.seen is None else order.seen.mean_square,
        name=wanted.name,
        bias=wanted.bias,
        activation=wanted.activation,
    )
