"""The `dense-once` executor: decode a panel of tile rows to scratch, multiply it with the GEMM.

For large batches, where the product is bound by arithmetic. The scratch is bounded: tile rows are
decoded panel by panel, on every call, and no dense copy is kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stoicc.codegen.executor import Executor, Pools
from stoicc.codegen.reference import ACTIVATION_FUNCTIONS
from stoicc.codegen.triton import build
from stoicc.codegen.triton.emit import emit_decode
from stoicc.codegen.triton.launch import (
    ALIGNMENT,
    beside_tensors,
    device_of,
    kept_bytes,
    low_rank_bytes,
    low_rank_product,
    product_fp32,
    right_factors,
)
from stoicc.codegen.triton.loops import loop_tensors, scheduled, tile_rows
from stoicc.ir.schedule import TileCsr
from stoicc.ir.types import Module

PANEL_BYTES = 256 << 20
"""Most scratch that a panel takes, unless one tile row needs more. Each panel is a GEMM of its own, which has to have
work for every SM: of 2048 rows of x and 28672 columns, 256 blocks of 128 x 256 in 256 MB, 80 in 64 MB, for 132 SMs."""


class DenseOnce(Executor):
    """Panels of decoded tile rows and the vendor's GEMM; the epilogue is torch, in fp32.

    Operands of the GEMM have x's dtype, and y is rounded once, from fp32. fp16 inputs that meet an
    input scale may leave fp16's range: both operands are fp32 then, which is slower.
    """

    def __init__(self, module: Module, pools: Pools, on_missing: str) -> None:
        self._module, csrs = module, scheduled(module).csrs
        emitted = emit_decode(module, on_missing)
        self.source = emitted.source
        kernels = build.load(emitted.name, self.source)
        device = device_of(pools)
        self._decoders: list[tuple[Any, TileCsr, dict[str, Tensor]]] = [
            (
                getattr(kernels, f"decode_{loop.prefix}_kernel"),
                csrs[loop.index],
                {"rows": tile_rows(module, loop, device), **loop_tensors(module, loop, pools, device)},
            )
            for loop in emitted.loops
        ]
        beside = beside_tensors(module, pools)
        self._rights = right_factors(beside, module.tiles.dtype)
        self._rank = beside["low_rank_right"].shape[0] if self._rights else 0
        columns, rows = beside.get("column_permutation"), beside.get("row_permutation")
        self._columns = None if columns is None else columns.long()
        self._rows = None if rows is None else rows.long()
        scale = beside.get("input_scale")
        self._input_scale = None if scale is None else _in_order(scale.float(), self._columns)
        named = ("output_scale", "low_rank_left", "bias")
        self._after = {n: _in_order(beside[n].float(), self._rows) for n in named if n in beside}
        self._owned = {t.data_ptr() for t in pools.values()}
        self._holes = any(segment.count and not segment.pools for segment in module.tiles.segments)

    @property
    def resident_bytes(self) -> int:
        kept = [self._columns, self._rows, self._input_scale, *self._rights.values(), *self._after.values()]
        kept += [t for _, _, tensors in self._decoders for t in tensors.values()]
        return kept_bytes(kept, self._owned)

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        (rows, columns), operand = self._module.tiles.shape, self._operand(x_dtype)
        tall = min(self._panel_rows(x_dtype) * self._module.tiles.tile[0], rows)
        wide = torch.float32 if self._finishes else operand
        taken = [(tall * columns, operand), (batch * tall, wide), *self._input_buffers(batch, x_dtype)]
        return taken_bytes(taken) + low_rank_bytes(batch, self._rank)

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        (rows, columns), height = self._module.tiles.shape, self._module.tiles.tile[0]
        step, batch, take = self._panel_rows(x.dtype), x.shape[0], Taker(workspace)
        product = None
        if self._rights:
            product = low_rank_product(x, self._rights, take(torch.float32, batch, self._rank))
        tall = min(step * height, rows)
        panel = take(self._operand(x.dtype), tall, columns)
        results = take(torch.float32 if self._finishes else panel.dtype, batch * tall)
        inputs = self._inputs(x, take)
        for top in range(0, self._module.tiles.grid[0], step):
            begin, end = top * height, min((top + step) * height, rows)
            self._decode(panel, top, min(top + step, self._module.tiles.grid[0]))
            result = results[: batch * (end - begin)].view(batch, end - begin)
            if self._finishes:
                product_fp32(inputs, panel[: end - begin].t(), result)
                self._finish(result, slice(begin, end), product)
            else:
                torch.mm(inputs, panel[: end - begin].t(), out=result)
            if self._rows is None:
                out[:, begin:end] = result
            else:
                out.index_copy_(1, self._rows[begin:end], result.to(out.dtype))

    @property
    def _finishes(self) -> bool:
        """Whether the product stays in fp32: something but a permutation follows it."""
        return bool(self._after) or self._module.tiles.beside.activation is not None

    def _operand(self, x_dtype: torch.dtype) -> torch.dtype:
        """What the GEMM multiplies (see the class)."""
        return torch.float32 if x_dtype == torch.float16 and self._input_scale is not None else x_dtype

    def _panel_rows(self, x_dtype: torch.dtype) -> int:
        """Tile rows of a panel: as few panels as fit, about equally high."""
        tile_rows = self._module.tiles.grid[0]
        row_bytes = self._module.tiles.tile[0] * self._module.tiles.shape[1] * self._operand(x_dtype).itemsize
        panels = -(-tile_rows // max(1, PANEL_BYTES // row_bytes))
        return -(-tile_rows // max(1, panels))

    def _input_buffers(self, batch: int, x_dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
        """What `_inputs` takes: numbers and their dtype."""
        numbers, operand = batch * self._module.tiles.shape[1], self._operand(x_dtype)
        taken = [(numbers, x_dtype)] if self._columns is not None else []
        if self._input_scale is not None and (self._columns is None or operand != x_dtype):
            taken.append((numbers, operand))
        return taken

    def _inputs(self, x: Tensor, take: "Taker") -> Tensor:
        """x as the tiles meet it: in the order of tile columns, scaled in fp32 and rounded once."""
        if self._columns is not None:
            x = torch.index_select(x, 1, self._columns, out=take(x.dtype, *x.shape))
        if self._input_scale is None:
            return x
        operand = self._operand(x.dtype)
        scaled = x if self._columns is not None and operand == x.dtype else take(operand, *x.shape)
        return torch.mul(x, self._input_scale, out=scaled)

    def _decode(self, panel: Tensor, top: int, bottom: int) -> None:
        """Tile rows [top, bottom) into the panel; where no tile is stored, zeros."""
        (rows, columns), height = self._module.tiles.shape, self._module.tiles.tile[0]
        if self._holes:
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

    def _finish(self, result: Tensor, rows: slice, product: Tensor | None) -> None:
        """The epilogue of a panel `[N, rows]` in fp32, in place and in the order of tile rows."""
        after = self._after
        if "output_scale" in after:
            result.mul_(after["output_scale"][rows])
        if product is not None:
            result.addmm_(product, after["low_rank_left"][rows].t())
        if "bias" in after:
            result.add_(after["bias"][rows])
        activation = self._module.tiles.beside.activation
        if activation is not None:
            result.copy_(ACTIVATION_FUNCTIONS[activation](result))


def _in_order(values: Tensor, order: Tensor | None) -> Tensor:
    """What belongs to rows or columns of the weight, in the order of the tiles."""
    return values if order is None else values[order]


class Taker:
    """Cuts aligned tensors off a workspace, first come first served."""

    def __init__(self, workspace: Tensor) -> None:
        self._left = workspace

    def __call__(self, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        taken, self._left = self._left[:size], self._left[aligned_bytes(size) :]
        return taken.view(dtype).view(shape)


def taken_bytes(taken: Sequence[tuple[int, torch.dtype]]) -> int:
    """Bytes of a workspace that these many numbers of these dtypes are cut off."""
    return sum(aligned_bytes(numbers * dtype.itemsize) for numbers, dtype in taken)


def aligned_bytes(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
