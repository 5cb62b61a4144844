"""Which weights are kept for the whole of a training run, and which of them the backward product keeps too.

Source: SLoPe (Mozaffari et al. 2025, arXiv 2405.16325), the double-pruned backward pass.
"""

from math import comb
from typing import Literal

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.nn.kept import COLUMN, TWICE, collect, spread

MaskRule = Literal["magnitude", "random"]
MAX_GROUP = 128
"""Columns that a place can tell apart."""


def check_structure(n: int, m: int) -> None:
    """InputError unless n of every m can be kept."""
    if not (isinstance(n, int) and isinstance(m, int)) or not 0 < n < m <= MAX_GROUP:
        raise InputError(f"slope: expected 0 < n < m <= {MAX_GROUP}, found n={n}, m={m}; correct them")


def first_places(weight: Tensor, n: int, m: int, rule: MaskRule, generator: torch.Generator | None = None) -> Tensor:
    """Places u8 `[M, K n / m]` of n of every m weights along a row of `[M, K]`, not pruned a second time yet.

    Args:
        rule: the largest magnitudes of each group (ties: the lower column), or any, drawn with `generator`.
    """
    if rule == "random":
        scores = torch.rand(weight.shape, generator=generator).to(weight.device)
    else:
        scores = weight.detach().float().abs()
    order = scores.unflatten(1, (-1, m)).argsort(dim=-1, descending=True, stable=True)
    return order[..., :n].sort(-1).values.flatten(1).to(torch.uint8)


def prune_again(kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """Places with their high bit anew: n of every m of a column, the largest magnitudes of what the first prune kept.

    A last group of fewer rows keeps n, too. Groups of rows do not depend on each other, so whole ones
    may be pruned by themselves.

    Args:
        kept: `[M, K n / m]`.
    """
    least = torch.finfo(torch.float32).tiny  # a kept zero comes before what the first prune dropped
    magnitude = spread(kept.detach().float().abs().clamp_min(least), places, n, m)
    short = -magnitude.shape[0] % m
    groups = torch.nn.functional.pad(magnitude, (0, 0, 0, short), value=-1.0).unflatten(0, (-1, m))
    chosen = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    twice = torch.zeros(groups.shape, dtype=torch.uint8, device=kept.device).scatter_(1, chosen, TWICE)
    bits = collect(twice.flatten(0, 1)[: kept.shape[0]].short(), places, n, m).to(torch.uint8)
    return places & COLUMN | bits


def expected_drop(n: int, m: int) -> float:
    """The share of all entries that the second prune drops of a random n:m mask (SLoPe, the lemma on double pruning).

    A column of m entries has j kept ones with binomial odds; all beyond n go.
    """
    share = n / m
    return sum(comb(m, j) * share**j * (1 - share) ** (m - j) * (j - n) for j in range(n + 1, m + 1)) / m
