"""The `dense-once` executor: decode a panel of tile rows to scratch, multiply it with the GEMM.

For large batches, where the product is bound by arithmetic. The scratch is bounded: tile rows are
decoded panel by panel, on every call, and no dense copy is kept.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stoicc.codegen.executor import Executor, Pools
from stoicc.codegen.triton import build
from stoicc.codegen.triton.emit import emit_decode
from stoicc.codegen.triton.launch import ALIGNMENT, beside_tensors, low_rank_bytes, low_rank_product
from stoicc.codegen.triton.loops import loop_tensors, scheduled, tile_rows
from stoicc.ir.schedule import TileCsr
from stoicc.ir.types import Module

PANEL_BYTES = 64 << 20
"""Most scratch that a panel takes, unless one tile row needs more."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


class DenseOnce(Executor):
    """Panels of decoded tile rows and `torch.mm`; the epilogue is torch, in y's dtype."""

    def __init__(self, module: Module, pools: Pools, on_missing: str) -> None:
        self._module, csrs = module, scheduled(module).csrs
        emitted = emit_decode(module, on_missing)
        self.source = emitted.source
        kernels = build.load(emitted.name, self.source)
        device = next((pool.device for pool in pools.values()), torch.device("cpu"))
        self._decoders: list[tuple[Any, TileCsr, dict[str, Tensor]]] = [
            (
                getattr(kernels, f"decode_{loop.prefix}_kernel"),
                csrs[loop.index],
                {"rows": tile_rows(module, loop, device), **loop_tensors(module, loop, pools, device)},
            )
            for loop in emitted.loops
        ]
        self._beside = beside_tensors(module, pools)
        self._owned = {t.data_ptr() for t in pools.values()}

    @property
    def resident_bytes(self) -> int:
        return sum(t.nbytes for _, _, ts in self._decoders for t in ts.values() if t.data_ptr() not in self._owned)

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        (rows, columns), beside = self._module.tiles.shape, self._beside
        panel = min(self._panel_rows(x_dtype) * self._module.tiles.tile[0], rows)
        inputs = batch * columns if {"input_scale", "column_permutation"} & beside.keys() else 0
        return sum(_aligned(n * x_dtype.itemsize) for n in (panel * columns, inputs, batch * panel)) + low_rank_bytes(
            batch, self._rank(), x_dtype
        )

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        (rows, columns), height = self._module.tiles.shape, self._module.tiles.tile[0]
        step, batch = self._panel_rows(x.dtype), x.shape[0]
        take = _Taker(workspace, x.dtype)
        product = take(batch, self._rank()) if self._rank() else None
        tall = min(step * height, rows)
        panel, results = take(tall, columns), take(batch * tall)
        inputs = self._inputs(x, take)
        order = self._beside.get("row_permutation")
        for top in range(0, self._module.tiles.grid[0], step):
            begin, end = top * height, min((top + step) * height, rows)
            self._decode(panel, top, min(top + step, self._module.tiles.grid[0]))
            result = results[: batch * (end - begin)].view(batch, end - begin)
            torch.mm(inputs, panel[: end - begin].t(), out=result)
            if order is None:
                out[:, begin:end] = result
            else:
                out.index_copy_(1, order[begin:end].long(), result)
        self._finish(x, out, product)

    def _panel_rows(self, x_dtype: torch.dtype) -> int:
        """Tile rows of a panel."""
        row_bytes = self._module.tiles.tile[0] * self._module.tiles.shape[1] * x_dtype.itemsize
        return min(max(1, PANEL_BYTES // row_bytes), self._module.tiles.grid[0])

    def _rank(self) -> int:
        return self._beside["low_rank_left"].shape[1] if "low_rank_left" in self._beside else 0

    def _inputs(self, x: Tensor, take: "_Taker") -> Tensor:
        """x as the tiles meet it: scaled, then in the order of tile columns."""
        scale, order = self._beside.get("input_scale"), self._beside.get("column_permutation")
        if scale is None and order is None:
            return x
        inputs = take(*x.shape)
        scaled = x if scale is None else x * scale.to(x.dtype)
        return inputs.copy_(scaled if order is None else scaled[:, order.long()])

    def _decode(self, panel: Tensor, top: int, bottom: int) -> None:
        """Tile rows [top, bottom) into the panel; where no tile is stored, zeros."""
        (rows, columns), height = self._module.tiles.shape, self._module.tiles.tile[0]
        panel.zero_()
        for kernel, csr, tensors in self._decoders:
            first, last = csr.row_ptr[top], csr.row_ptr[bottom]
            if last > first:
                kernel[(last - first,)](
                    panel=panel,
                    **tensors,
                    first=first,
                    top=top,
                    M=min(bottom * height, rows) - top * height,
                    K=columns,
                    enable_fp_fusion=True,
                )

    def _finish(self, x: Tensor, out: Tensor, product: Tensor | None) -> None:
        beside = self._beside
        if "output_scale" in beside:
            out.mul_(beside["output_scale"].to(out.dtype))
        if product is not None:
            low_rank_product(x, beside["low_rank_right"], product)
            out.addmm_(product, beside["low_rank_left"].to(out.dtype).t())
        if "bias" in beside:
            out.add_(beside["bias"].to(out.dtype))
        activation = self._module.tiles.beside.activation
        if activation is not None:
            out.copy_(_ACTIVATIONS[activation](out))


class _Taker:
    """Cuts aligned tensors of one dtype off a workspace, first come first served."""

    def __init__(self, workspace: Tensor, dtype: torch.dtype) -> None:
        self._left, self._dtype = workspace, dtype

    def __call__(self, *shape: int) -> Tensor:
        count = 1
        for extent in shape:
            count *= extent
        size = count * self._dtype.itemsize
        taken, self._left = self._left[:size], self._left[_aligned(size) :]
        return taken.view(self._dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
