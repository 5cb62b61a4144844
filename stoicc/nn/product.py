"""The sparse product of SLoPe with its two backward products, through a scratch that lives for one call.

On the CPUs tried, a product of 2:4 tiles at training batches costs more than writing the kept weights to a scratch and
giving it to the BLAS (`docs/training.md` has times), and values change with every step, so nothing packed could be
kept. The scratch holds a panel of rows, never a large weight.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from stoicc.nn.kept import collect, spread

PANEL_BYTES = 8 << 20
"""Scratch of one panel."""


def slope_linear(x: Tensor, kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """x W^T for x `[..., K]` and the n:m weight W `[M, K]` of `kept` at `places`; gradients as SLoPe has them.

    The gradient of x is that of W pruned again along its columns; that of `kept` is exact (Mozaffari et al. 2025,
    arXiv 2405.16325, equations 4 to 6). Under autocast both are brought to its dtype, as F.linear's arguments are.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else kept.dtype
    with torch.autocast(kind, enabled=False):
        return cast(Tensor, _SlopeProduct.apply(x.to(dtype), kept, places, n, m))


class _SlopeProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
        ctx.save_for_backward(x, kept, places)
        ctx.structure = n, m
        parts = [functional.linear(x, spread(kept[rows].to(x.dtype), places[rows], n, m)) for rows in _panels(x, kept)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, kept, places = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1])
            of_x = _input_gradient(flat, x, kept, places, *ctx.structure) if ctx.needs_input_grad[0] else None
            of_kept = _kept_gradient(flat, x, kept, places, *ctx.structure) if ctx.needs_input_grad[1] else None
        return of_x, of_kept, None, None, None


def _input_gradient(grad: Tensor, x: Tensor, kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """dY W^{R,C}, summed over panels in fp32 where there are several."""
    total: Tensor | None = None
    panels = list(_panels(x, kept))
    for rows in panels:
        part = grad[:, rows] @ spread(kept[rows].to(x.dtype), places[rows], n, m, twice=True)
        part = part if len(panels) == 1 else part.to(torch.promote_types(part.dtype, torch.float32))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(x.dtype).view(x.shape)


def _kept_gradient(grad: Tensor, x: Tensor, kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """dY^T X at the places of the kept weights."""
    inputs, out = x.reshape(-1, x.shape[-1]), torch.empty_like(kept)
    for rows in _panels(x, kept):
        out[rows] = collect(grad[:, rows].T @ inputs, places[rows], n, m)
    return out


def _panels(x: Tensor, kept: Tensor) -> list[slice]:
    """Runs of rows whose dense form takes at most PANEL_BYTES in the dtype of x, and at least one row."""
    height = max(1, PANEL_BYTES // (x.shape[-1] * x.itemsize))
    return [slice(first, first + height) for first in range(0, kept.shape[0], height)]
