"""The best rank-r approximation of a matrix, exact or by randomized subspace iteration with its error checked."""

from dataclasses import dataclass

import torch
from torch import Tensor

WIDE = 2048
"""Gram matrices up to this size are taken in float64."""
LARGE, FEW = 1024, 24
"""Where the smaller extent is beyond 1024, random subspaces find 1/24 of it sooner than all eigenvectors do."""
TOLERANCE = 0.01
"""A random subspace may leave this much more squared error than the best one, by its own estimate."""
MOST_ITERATIONS = 12


@dataclass(frozen=True, eq=False)
class Truncated:
    """left `[m, r]` @ right `[r, n]` in float32, the singular values shared evenly between them.

    Attributes:
        error: share of the matrix's squared norm that the product leaves, 0 to 1.
        exact: False where a random subspace was used.
    """

    left: Tensor
    right: Tensor
    error: float
    exact: bool


def truncated_svd(matrix: Tensor, rank: int, tolerance: float = TOLERANCE, seed: int = 0) -> Truncated:
    """The rank-r matrix nearest to a float `matrix [m, n]` in the Frobenius norm; 0 < rank <= min(m, n).

    Exact: eigenvectors of the Gram matrix of the smaller side (Eckart and Young 1936), in float64 up to
    2048, in float32 beyond; in float64 again where little is left, because squares then drown in rounding.
    Where the rank is small and the matrix is not: subspace iteration from a random start (Halko et al. 2011,
    SIAM Review 53(2), Algorithm 4.4). An iteration q that still gained g of the squared norm leaves about q * g
    to be gained; it ends when that is below `tolerance` of what is left, and what does not end is done exactly.
    """
    scale = matrix.abs().max().item() or 1.0
    unit = matrix.float() / scale  # squares stay in range
    wide = unit if unit.shape[0] <= unit.shape[1] else unit.T
    total = _energy(wide)
    basis, exact = None, False
    if wide.shape[0] > LARGE and rank * FEW <= wide.shape[0]:
        basis = _subspace(wide, rank, total, tolerance, seed)
    if basis is None:
        basis, exact = _eigenvectors(wide, rank, total), True
    inner = basis.T @ wide
    lengths = inner.double().norm(dim=1)
    root = torch.where(lengths > 0, (lengths * scale).sqrt(), 1.0).float()[:, None]
    left, right = basis * root.T, inner * scale / root
    if wide is not unit:
        left, right = right.T, left.T
    error = max(0.0, 1 - _energy(inner) / total) if total else 0.0
    return Truncated(left.contiguous(), right.contiguous(), error, exact)


def _energy(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())


def _eigenvectors(wide: Tensor, rank: int, total: float) -> Tensor:
    """Orthonormal `[m, r]` that span the leading left singular vectors, the largest first."""
    double = wide.shape[0] <= WIDE
    gram = wide.double() @ wide.double().T if double else wide @ wide.T
    basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float()
    if not double and total - _energy(basis.T @ wide) < 1e-3 * total:
        gram = wide.double() @ wide.double().T
        basis = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).float()
    return basis


def _subspace(wide: Tensor, rank: int, total: float, tolerance: float, seed: int) -> Tensor | None:
    """The same by subspace iteration, or None where it gains too slowly."""
    generator = torch.Generator().manual_seed(seed)
    columns = min(wide.shape[0], rank + max(10, rank // 5))
    basis = torch.linalg.qr(wide @ torch.randn(wide.shape[1], columns, generator=generator))[0]
    before = 0.0
    for iteration in range(1, MOST_ITERATIONS + 1):
        rows = torch.linalg.qr(wide.T @ basis)[0]
        basis, inner = torch.linalg.qr(wide @ rows)
        values, vectors = torch.linalg.eigh(inner.double() @ inner.double().T)
        captured = float(values[-rank:].sum())
        left = total - captured
        if (iteration > 1 and iteration * (captured - before) <= tolerance * left) or left <= 1e-6 * total:
            return basis @ vectors[:, -rank:].flip(1).float()
        before = captured
    return None
