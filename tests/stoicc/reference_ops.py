"""What tests of operators compare with: a layer with correlated inputs, and exact answers by least squares."""

import torch

from stoicc.ops import Statistics


def problem(rows, columns, samples=None, dtype=torch.float64):
    """A weight `[rows, columns]` and statistics of inputs that are correlated, some channels larger than others."""
    mix = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5
    x = torch.randn(samples or 2 * columns, columns, dtype=torch.float64) @ mix * torch.randn(columns).exp()
    return torch.randn(rows, columns), Statistics.of(x, dtype=dtype)


def refit(row, hessian, kept):
    """The best weights on `kept` alone, by their normal equations, and the rise of the squared error."""
    free = kept.nonzero().flatten()
    best = torch.zeros_like(row)
    best[free] = torch.linalg.solve(hessian[free][:, free], (hessian @ row)[free])
    change = best - row
    return best, (change @ hessian @ change).item()


def output_error(weight, compressed, statistics):
    """||X (W' - W)^T||^2."""
    change = (compressed.double() - weight.double()) @ statistics.gram.double()
    return (change * (compressed.double() - weight.double())).sum().item()
