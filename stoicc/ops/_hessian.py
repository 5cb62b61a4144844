"""The inverse of a layer's damped Hessian, and its Cholesky factor, which the sweeps walk along."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._choosing import dead_channels
from stoicc.ops.statistics import Statistics

MOST_DAMPING = 100.0
"""Where a Hessian is not positive definite with this much, it is no Hessian of any inputs."""
SETTLED = 16
"""Leading bits of a float64 sum that are the same whatever the order of its terms, as far as one can tell."""
LEAF = 256
"""Rows and columns at which a triangular inverse is solved for rather than halved."""


@dataclass(frozen=True, eq=False)
class InverseHessian:
    """H^-1 = upper^T upper, of H = X^T X + damping * mean(diagonal) * I.

    Attributes:
        upper: `[K, K]` upper triangular, in the dtype of the statistics.
        dead: bool `[K]`: channels without any input; they stand apart, with a diagonal of their own.
        said: the damping in words, whether it had to be raised, and how many channels are dead.
    """

    upper: Tensor
    dead: Tensor
    said: str

    def full(self) -> Tensor:
        """H^-1 itself, `[K, K]` float64."""
        upper = self.upper.double()
        return upper.T @ upper


@dataclass(frozen=True, eq=False)
class Factor:
    """H = R R^T with R upper triangular, of the Hessian of `InverseHessian`: U = R^-1.

    Attributes:
        reversed: `[K, K]` lower factor of H with rows and columns reversed: R with both reversed.
        statistics: that H is of.
        said: as in `InverseHessian`.
    """

    reversed: Tensor
    statistics: Statistics
    said: str

    @property
    def left(self) -> Tensor:
        """`[K]` float64: 1 / U_jj**2, what is left of a channel's square once those after it have answered; dead: 0.

        In float64 `SETTLED` bits: what depends on it does not see in which order the factorisation summed.
        """
        pivots = self.reversed.diagonal().flip(0).double().square()
        if self.reversed.dtype == torch.float64:
            pivots = settled(pivots)
        return pivots.masked_fill(self.statistics.dead, 0)

    def inverse(self) -> InverseHessian:
        """U from R. H^-1 is never formed: that is more exact than factorising it."""
        upper = inverse_of_upper(self.reversed.flip(0, 1)).to(self.statistics.dtype)
        return InverseHessian(upper, self.statistics.dead, self.said)


def invert(who: str, statistics: Statistics, damping: float) -> InverseHessian:
    """`factorise` in float64, and the inverse of what it gives."""
    return factorise(who, statistics, damping).inverse()


def factorise(who: str, statistics: Statistics, damping: float, dtype: torch.dtype = torch.float64) -> Factor:
    """Factorise H; where that fails, damping is raised tenfold until it does not, with a warning.

    Args:
        dtype: float32 takes half the time; where it does not do, float64 is next.

    Raises:
        InputError: a damping that is negative or not finite, or a matrix that no damping mends.
    """
    if not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise InputError(f"{who}: expected a finite damping >= 0, a share of H's mean diagonal, found {damping!r}")
    tried = float(damping)
    while tried <= max(MOST_DAMPING, damping):
        factor = _cholesky(statistics, tried, dtype)
        if factor is None and dtype != torch.float64:
            factor = _cholesky(statistics, tried, torch.float64)
        if factor is not None:
            said = f"damping {damping:g}"
            if tried != damping:
                said = f"damping raised from {damping:g} to {tried:g} (the Hessian was not positive definite)"
                warnings.warn(f"{who}: {said}", stacklevel=5)  # the operator's caller
            return Factor(factor, statistics, said + dead_channels(statistics))
        tried = max(10 * tried, 1e-4)
    raise InputError(
        f"{who}: expected statistics whose gram matrix is positive semidefinite, found one that damping of "
        f"{MOST_DAMPING:g} does not mend; collect it again, with dtype=torch.float64"
    )


def settled(sums: Tensor, bits: int = SETTLED) -> Tensor:
    """Float64 sums rounded to so many bits; the last ones differ with the number of threads."""
    mantissa, exponent = torch.frexp(sums)
    return torch.ldexp(torch.ldexp(mantissa, torch.tensor(bits)).round_(), exponent - bits)


def positive_inverse(who: str, hessian: Tensor) -> Tensor:
    """The inverse of a float64 matrix; InputError where it is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info) != 0 or not bool(factor.isfinite().all()):
        raise InputError(f"{who}: expected a positive definite Hessian, found one that is not; add to its diagonal")
    return torch.cholesky_inverse(factor)


def _cholesky(statistics: Statistics, damping: float, dtype: torch.dtype) -> Tensor | None:
    """Lower factor of H with rows and columns reversed, or None where H is not positive definite.

    A pivot below the rounding of the sums themselves is noise, and counts as none.
    """
    hessian = statistics.hessian(damping).to(dtype)
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    diagonal[statistics.dead] = mean
    factor, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    pivots = factor.diagonal().square()
    noise = torch.finfo(statistics.dtype).eps * mean
    if int(info) != 0 or not bool(pivots.isfinite().all()) or pivots.min().item() <= noise:
        return None
    return factor


def inverse_of_upper(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, halves first: K**3 / 3 multiply-adds, nearly all of them in products.

    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    """
    size = len(upper)
    if size <= LEAF:
        return torch.linalg.solve_triangular(upper, torch.eye(size, dtype=upper.dtype), upper=True)
    half = size // 2
    found = torch.zeros_like(upper)
    first, last = slice(0, half), slice(half, size)
    found[first, first] = inverse_of_upper(upper[first, first])
    found[last, last] = inverse_of_upper(upper[last, last])
    found[first, last] = (found[first, first] @ upper[first, last] @ found[last, last]).neg_()
    return found
