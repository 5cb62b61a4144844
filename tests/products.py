"""How close a product has to be, for tests that are about something else."""

from torch import Tensor


def assert_product(found: Tensor, x: Tensor, weight: Tensor, tolerance: float = 1e-5) -> None:
    """`found [N, M]` against x W^T in float64, by relative Frobenius error; NaN never passes."""
    expected = x.double() @ weight.double().T
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"
