"""The multiple-choice knapsack of a budget: one format for each tile, least error at a bounded cost.

Along the lower convex hull of a tile's (cost, error) points, each step from one format to the next saves less error
per unit of cost than the step before it. So all steps of all tiles, sorted by what they save, are taken from the best
down until the budget is spent: the last one's saving is the Lagrange multiplier, and every tile then has the format of
least error + multiplier * cost (Everett 1963). The remainder, less than a step, is filled
greedily, and the tiles that are nearest to the multiplier are then chosen together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

OPEN = 96
"""Tiles, those whose formats are least settled by the multiplier, that are chosen together at the end."""
STATES = 8192
"""Combinations of their formats that are followed at a time."""
ROUNDS = 2000
"""No more changes of single tiles than this."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Every step along the hulls, the one that saves most error per unit of cost first.

    Attributes:
        start: `[T]`, each tile's format of least cost.
        tile, to: `[S]`, the tile and the format it goes to.
        cost, saved: `[S]`, what the step costs more, and the error that it saves; both > 0.
    """

    start: Ints
    tile: Ints
    to: Ints
    cost: Floats
    saved: Floats

    @property
    def slope(self) -> Floats:
        """Error saved per unit of cost, falling."""
        slope: Floats = self.saved / self.cost
        return slope

    def after(self, count: int) -> Ints:
        """The formats once the first `count` steps are taken."""
        choice = self.start.copy()
        choice[self.tile[:count]] = self.to[:count]  # of equal tiles the last one stays: the furthest step
        return choice


def hull_steps(errors: Floats, costs: Floats) -> Steps:
    """The lower convex hulls of all tiles at once, by marching from the cheapest format on.

    Args:
        errors, costs: `[T, F]`; a format that a tile cannot have is infinite in both.
    """
    tiles = np.arange(len(errors))
    cheapest = np.where(costs == costs.min(1, keepdims=True), errors, np.inf)
    start = cheapest.argmin(1)
    current, found = start.copy(), []
    for _ in range(errors.shape[1]):
        more = costs - costs[tiles, current][:, None]
        less = errors[tiles, current][:, None] - errors
        possible = np.isfinite(more) & (more > 0) & (less > 0)
        slope = np.divide(less, more, out=np.zeros_like(less), where=possible)
        to = slope.argmax(1)
        goes = (slope[tiles, to] > 0).nonzero()[0]
        if not len(goes):
            break
        found.append((goes, to[goes], more[goes, to[goes]], less[goes, to[goes]]))
        current[goes] = to[goes]
    if not found:
        none = np.empty(0)
        return Steps(start, none.astype(np.int64), none.astype(np.int64), none, none)
    tile, to, cost, saved = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(-saved / cost, kind="stable")  # stable: a tile's steps stay in their order
    return Steps(start, tile[order], to[order], cost[order], saved[order])


def solve(errors: Floats, costs: Floats, budget: float) -> Ints:
    """The format of each tile `[T]`: little error in sum, at costs of at most `budget` in sum.

    Args:
        errors, costs: `[T, F]`, errors >= 0; a format that a tile cannot have is infinite in both.

    Raises:
        ValueError: a budget below the sum of each tile's least cost.
    """
    steps = hull_steps(errors, costs)
    least = float(costs[np.arange(len(costs)), steps.start].sum())
    slack = 1e-9 * max(abs(budget), 1e-30)
    if least > budget + slack:
        raise ValueError(least)
    spent = least + np.cumsum(steps.cost)
    count = int(np.searchsorted(spent, budget + slack, side="right"))
    choice = steps.after(count)
    multiplier = float(steps.slope[count]) if count < len(steps.cost) else 0.0
    left = budget + slack - float(costs[np.arange(len(costs)), choice].sum())
    _fill(errors, costs, choice, left)
    return _refined(errors, costs, choice, budget + slack, multiplier) if multiplier > 0 else choice


def _fill(errors: Floats, costs: Floats, choice: Ints, left: float) -> None:
    """Change single tiles while a change fits in what is left and saves, the best saving per cost first."""
    tiles = np.arange(len(choice))
    more = costs - costs[tiles, choice][:, None]
    less = errors[tiles, choice][:, None] - errors
    for _ in range(ROUNDS):
        fits = (more <= left) & (less > 0)
        if not fits.any():
            break
        value = np.where(fits, less / np.maximum(more, 1e-30), 0.0)
        tile, to = np.unravel_index(value.argmax(), value.shape)
        left -= more[tile, to]
        choice[tile] = to
        more[tile] = costs[tile] - costs[tile, to]
        less[tile] = errors[tile, to] - errors[tile]


def _refined(errors: Floats, costs: Floats, choice: Ints, budget: float, multiplier: float) -> Ints:
    """The best choice among the formats that may be in any better one, of the tiles that are least settled.

    With r = error + multiplier * cost over its least in a tile, a choice's error is a bound that nothing beats, plus
    its r in sum, plus multiplier * what it leaves of the budget. So formats with r above the gap between `choice` and
    the bound are out, and what is left of most tiles is one format. The others are combined one by one, and
    combinations that a cheaper one matches are dropped.
    """
    tiles = np.arange(len(choice))
    weighed = np.where(np.isfinite(costs), errors + multiplier * costs, np.inf)
    regret = weighed - weighed.min(1, keepdims=True)
    own = regret[tiles, choice]
    gap = float(own.sum()) + multiplier * max(budget - float(costs[tiles, choice].sum()), 0.0)
    others = np.where(regret <= gap, regret, np.inf)
    others[tiles, choice] = np.inf
    nearest = others.min(1) + np.where(own > 0, -own, 0.0)  # tiles that left their own best come first
    open_ = np.argsort(nearest, kind="stable")[:OPEN]
    open_ = open_[np.isfinite(others[open_].min(1))]
    fixed = np.setdiff1d(tiles, open_)
    room = budget - float(costs[fixed, choice[fixed]].sum())
    least = np.append(np.cumsum(costs[open_].min(1)[::-1])[::-1], 0.0)
    cost, sums, trail = np.zeros(1), np.zeros(1), []
    for place, tile in enumerate(open_):
        options = (regret[tile] <= gap).nonzero()[0]
        total = (cost[:, None] + costs[tile, options]).ravel()
        more = (sums[:, None] + regret[tile, options]).ravel()
        states = np.flatnonzero((total + least[place + 1] <= room) & (more <= gap * (1 + 1e-9)))
        states = _undominated(states, total, more - multiplier * total)
        trail.append((states // len(options), options[states % len(options)]))
        cost, sums = total[states], more[states]
    if not len(cost):
        return choice
    found, state = choice.copy(), int((sums + multiplier * (room - cost)).argmin())
    for tile, (parents, option) in zip(open_[::-1], reversed(trail), strict=True):
        found[tile] = option[state]
        state = int(parents[state])
    better = float(errors[tiles, found].sum()) < float(errors[tiles, choice].sum())
    return found if better else choice


def _undominated(states: Ints, cost: Floats, error: Floats) -> Ints:
    """The states that no cheaper one matches in error, at most `STATES`, spread over the range of costs."""
    states = states[np.lexsort((error[states], cost[states]))]
    best = np.minimum.accumulate(error[states])
    states = states[np.append(True, best[1:] < best[:-1])[: len(states)]]
    if len(states) <= STATES:
        return states
    low, high = cost[states[0]], cost[states[-1]]
    bucket = np.minimum((cost[states] - low) / (high - low) * STATES, STATES - 1).astype(np.int64)
    last = np.append(bucket[1:] != bucket[:-1], True)  # of a bucket the dearest: it has the least error
    return states[last]
