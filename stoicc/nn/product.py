"""SLoPe's product and its backward products, the adapter within them, through a scratch that lives for one call.

On the CPUs tried, a product of 2:4 tiles at training batches costs more than writing the kept weights to a scratch and
giving it to the BLAS (`docs/training.md` has times), and values change with every step, so nothing packed could be
kept. The scratch holds a panel of rows, never a large weight; the adapter's R are more rows of the first one, so that x
is read once for both (SLoPe, arXiv 2405.16325, equation 11), and L is added where the products stand.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from stoicc.nn.kept import collect, spread

PANEL_BYTES = 8 << 20
"""Scratch of one panel, without the adapter's rows."""
Adapter = tuple[Tensor, Tensor]
"""L `[M, r]` and R `[r, K]`."""


def slope_linear(x: Tensor, kept: Tensor, places: Tensor, n: int, m: int, adapter: Adapter | None = None) -> Tensor:
    """x (W + L R)^T for x `[..., K]` and the n:m weight W `[M, K]` of `kept` at `places`; gradients as SLoPe has them.

    The gradient of x is that of W pruned again along its columns, and of the adapter as it is; the others are exact
    (Mozaffari et al. 2025, arXiv 2405.16325, equations 4 to 6 and 11). Under autocast all are brought to its dtype, as
    F.linear's arguments are.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else kept.dtype
    left, right = adapter or (None, None)
    with torch.autocast(kind, enabled=False):
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        y = cast(Tensor, _SlopeProduct.apply(flat, kept, places, n, m, left, right))
    return y.view(*x.shape[:-1], kept.shape[0])


class _SlopeProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor, places: Tensor, n: int, m: int, left: Tensor | None, right: Tensor | None
    ) -> Tensor:
        ctx.structure = n, m
        more, inner, parts = right, None, []
        for rows in _panels(x, kept):
            panel = spread(kept[rows].to(x.dtype), places[rows], n, m, below=more)
            product = functional.linear(x, panel)
            if more is not None:  # x R^T beside x W^T
                product, inner = product[:, : -more.shape[0]], product[:, -more.shape[0] :].contiguous()
                more = None
            parts.append(product if inner is None else torch.addmm(product, inner, _like(x, left)[rows].T))
        ctx.save_for_backward(x, kept, places, left, right, inner)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, places, left, right, inner = ctx.saved_tensors
        of_x = of_kept = of_left = of_right = None
        with torch.autocast(x.device.type, enabled=False):
            of_inner = None if left is None else grad @ _like(x, left)
            if ctx.needs_input_grad[0]:
                of_x = _input_gradient(grad, x, kept, places, *ctx.structure)
                if of_inner is not None:
                    of_x = of_x.addmm_(of_inner, _like(x, right))
            if ctx.needs_input_grad[1]:
                of_kept = _kept_gradient(grad, x, kept, places, *ctx.structure)
            if of_inner is not None and ctx.needs_input_grad[5]:
                of_left = (grad.T @ inner).to(left.dtype)
            if of_inner is not None and ctx.needs_input_grad[6]:
                of_right = (of_inner.T @ x).to(right.dtype)
        return of_x, of_kept, None, None, None, of_left, of_right


def _like(x: Tensor, factor: Tensor | None) -> Tensor:
    assert factor is not None
    return factor.to(x.dtype)


def _input_gradient(grad: Tensor, x: Tensor, kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """dY W^{R,C}, summed over panels in fp32 where there are several."""
    total: Tensor | None = None
    panels = list(_panels(x, kept))
    for rows in panels:
        part = grad[:, rows] @ spread(kept[rows].to(x.dtype), places[rows], n, m, twice=True)
        part = part if len(panels) == 1 else part.to(torch.promote_types(part.dtype, torch.float32))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(x.dtype)


def _kept_gradient(grad: Tensor, x: Tensor, kept: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """dY^T X at the places of the kept weights."""
    out = torch.empty_like(kept)
    for rows in _panels(x, kept):
        out[rows] = collect(grad[:, rows].T @ x, places[rows], n, m)
    return out


def _panels(x: Tensor, kept: Tensor) -> list[slice]:
    """Runs of rows whose dense form takes at most PANEL_BYTES in the dtype of x, and at least one row."""
    height = max(1, PANEL_BYTES // (x.shape[-1] * x.itemsize))
    return [slice(first, first + height) for first in range(0, kept.shape[0], height)]
