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


def invert(who: str, statistics: Statistics, damping: float) -> InverseHessian:
    """Factorise in float64; where that fails, damping is raised tenfold until it does not, with a warning.

    Raises:
        InputError: a damping that is negative or not finite, or a matrix that no damping mends.
    """
    if not isinstance(damping, (int, float)) or not 0 <= damping < float("inf"):
        raise InputError(f"{who}: expected a finite damping >= 0, a share of H's mean diagonal, found {damping!r}")
    tried = float(damping)
    while tried <= max(MOST_DAMPING, damping):
        reversed_ = _cholesky(statistics, tried)
        if reversed_ is not None:
            said = f"damping {damping:g}"
            if tried != damping:
                said = f"damping raised from {damping:g} to {tried:g} (the Hessian was not positive definite)"
                warnings.warn(f"{who}: {said}", stacklevel=4)  # the operator's caller
            upper = _inverse(reversed_).to(statistics.dtype)
            return InverseHessian(upper, statistics.dead, said + dead_channels(statistics))
        tried = max(10 * tried, 1e-4)
    raise InputError(
        f"{who}: expected statistics whose gram matrix is positive semidefinite, found one that damping of "
        f"{MOST_DAMPING:g} does not mend; collect it again, with dtype=torch.float64"
    )


def positive_inverse(who: str, hessian: Tensor) -> Tensor:
    """The inverse of a float64 matrix; InputError where it is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info) != 0 or not bool(factor.isfinite().all()):
        raise InputError(f"{who}: expected a positive definite Hessian, found one that is not; add to its diagonal")
    return torch.cholesky_inverse(factor)


def _cholesky(statistics: Statistics, damping: float) -> Tensor | None:
    """Lower factor of H with rows and columns reversed, or None where H is not positive definite.

    A pivot below the rounding of the sums themselves is noise, and counts as none.
    """
    hessian = statistics.hessian(damping).double()
    diagonal = hessian.diagonal()
    mean = diagonal.mean().item()
    diagonal[statistics.dead] = mean
    factor, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    pivots = factor.diagonal().square()
    noise = torch.finfo(statistics.dtype).eps * mean
    if int(info) != 0 or not bool(pivots.isfinite().all()) or pivots.min().item() <= noise:
        return None
    return factor


def _inverse(reversed_: Tensor) -> Tensor:
    """U with H^-1 = U^T U. H = R R^T with R upper (the reversed factor, reversed back), so U = R^-1.

    One Cholesky and one triangular inverse, and H^-1 is never formed: more exact than factorising it.
    """
    identity = torch.eye(reversed_.shape[0], dtype=reversed_.dtype)
    return torch.linalg.solve_triangular(reversed_.flip(0, 1), identity, upper=True)
