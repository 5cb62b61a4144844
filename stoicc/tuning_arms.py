"""Arms of a tuning race: how one is run, when its output is right, and which of several is the fastest."""

import copy
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.kernel import Kernel
from stoicc.tuning_space import Structure

TIE, MOST_TIE = 0.01, 0.02
"""Arms this close (relative) are equal; so are those within the noise of their medians, up to the second."""


class Arm(NamedTuple):
    """A schedule with the one executor that it runs."""

    structure: Structure
    executor: str


def fastest(ratios: dict[Arm, list[float]]) -> Arm:
    """The arm of the least median; of those that tie with it, the one that changes least (the first arm least)."""
    medians = {arm: statistics.median(values) for arm, values in ratios.items()}
    best = min(medians, key=lambda arm: medians[arm])
    limit = {arm: _tie(values, ratios[best]) for arm, values in ratios.items()}
    tied = [arm for arm in ratios if medians[arm] <= medians[best] * (1 + limit[arm])]
    first = next(iter(ratios))
    return min(tied, key=lambda arm: (arm != first, arm.structure.changes, medians[arm]))


def _tie(one: Sequence[float], other: Sequence[float]) -> float:
    """How far apart two medians may be and still be equal, relative: their noise, within bounds."""
    return min(max(math.hypot(_noise(one), _noise(other)), TIE), MOST_TIE)


def _noise(values: Sequence[float]) -> float:
    """Relative standard error of the median, from the median absolute deviation (normal consistent)."""
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    return 1.2533 * 1.4826 * deviation / middle / math.sqrt(len(values))


def disagreement(y: Tensor, expected: Tensor, dtype: str) -> str:
    """What is wrong with an output, or "": norm of the difference over norm, against the coarser dtype's step.

    Executors may round codes to the weight's dtype before the product, or add in another order.
    """
    step = max(torch.finfo(TORCH_DTYPES[dtype]).eps, torch.finfo(expected.dtype).eps)
    allowed = max(4 * step, 1e-4)
    error = float((y.double() - expected.double()).norm())
    if error <= allowed * float(expected.double().norm()):
        return ""
    return f"wrong output: expected that of the default within {allowed:.1g}, found a difference of norm {error:.3g}"


class Rotation:
    """Copies of a kernel that are called in turn, so that each finds its weight out of the cache.

    Args:
        copies: 1 calls the kernel itself.
    """

    def __init__(self, kernel: Kernel, copies: int = 1) -> None:
        self.kernels = [kernel, *(copy.deepcopy(kernel) for _ in range(copies - 1))] if copies > 1 else [kernel]
        self._turn = itertools.cycle(self.kernels)

    def run(self, x: Tensor) -> Tensor:
        """y of the next copy."""
        with torch.no_grad():
            y: Tensor = next(self._turn)(x)
        return y
