"""Decode-once: panels of tile rows are decoded to a bounded scratch buffer and given to the BLAS.

For a large batch, where a product is bound by arithmetic and the vendor's GEMM is the best
there is. Each call decodes every tile once; nothing dense is kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stoicc.codegen.cpu.decode import PanelDecoder, can_decode
from stoicc.codegen.executor import Executor, Pools
from stoicc.ir.dtypes import TORCH_DTYPES, output_dtype
from stoicc.ir.errors import CodegenError
from stoicc.ir.planes import tile_planes
from stoicc.ir.types import Module

PANEL_BYTES = 4 << 20
"""Scratch for one panel; a tile row that is larger makes a panel by itself."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda v: functional.gelu(v, approximate="tanh"),
    "silu": functional.silu,
}


class DenseOnceExecutor(Executor):
    """Panels through torch's linear; scales, factors, bias and activation in fp32 after it."""

    def __init__(self, module: Module, pools: Pools) -> None:
        assert module.schedule is not None
        self._program, self._schedule, self._pools = module.tiles, module.schedule, pools
        self._formats = [module.tiles.segments[csr.segment].resolve() for csr in module.schedule.csrs]
        self._decoder = PanelDecoder(module, pools) if can_decode(module) else None
        self.source = "" if self._decoder is None else self._decoder.source

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        if x.dtype == torch.float64:
            raise CodegenError(
                f"cpu kernel of {self._program.name}: expected x of 16 or 32 bits, found f64; use the reference"
            )
        output_dtype(self._program.dtype, x.dtype)
        inputs, inner = self._prologue(x), self._inner(x)
        rows, height = self._program.grid[0], self._program.tile[0]
        step = self._panel_rows(x.dtype)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            panel = self._panel(begin, end, x.dtype, workspace)
            first, last = begin * height, min(end * height, self._program.shape[0])
            product = functional.linear(inputs, panel[: last - first, : self._program.shape[1]])
            self._epilogue(product, inner, first, last, out)

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        return self._panel_rows(x_dtype) * self._tile_row_bytes(x_dtype)

    def _tile_row_bytes(self, dtype: torch.dtype) -> int:
        return self._program.tile[0] * self._program.grid[1] * self._program.tile[1] * dtype.itemsize

    def _panel_rows(self, dtype: torch.dtype) -> int:
        return min(self._program.grid[0], max(1, PANEL_BYTES // self._tile_row_bytes(dtype)))

    def _panel(self, begin: int, end: int, dtype: torch.dtype, workspace: Tensor) -> Tensor:
        """Tile rows begin .. end as `[rows, padded K]` in x's dtype, at the start of the workspace."""
        (_, columns), (height, width) = self._program.grid, self._program.tile
        used = (end - begin) * self._tile_row_bytes(dtype)
        flat = workspace[:used].view(dtype)
        if self._decoder is not None and dtype == TORCH_DTYPES[self._program.dtype]:
            self._decoder(begin, end, flat)
            return flat.view((end - begin) * height, columns * width)
        panel = flat.view(end - begin, height, columns, width).zero_()
        tiles = panel.permute(0, 2, 1, 3)
        for csr, fmt in zip(self._schedule.csrs, self._formats, strict=True):
            first, last = csr.row_ptr[begin], csr.row_ptr[end]
            if first == last or not fmt.planes(self._program.tile, self._program.dtype):
                continue
            planes = tile_planes(self._program, csr.segment, self._pools, first, last)
            counts = torch.tensor(csr.row_ptr[begin : end + 1]).diff()
            row = torch.repeat_interleave(torch.arange(end - begin), counts)
            column = torch.tensor(csr.col_idx[first:last])
            tiles[row, column] = fmt.decode(planes, self._program.tile, self._program.dtype).to(dtype)
        return panel.view((end - begin) * height, columns * width)

    def _prologue(self, x: Tensor) -> Tensor:
        """x scaled and in the order of W's columns."""
        beside = self._program.beside
        if beside.input_scale is not None:
            x = (x.float() * self._pools[beside.input_scale.name].float()).to(x.dtype)
        if beside.column_permutation is not None:
            x = x[:, self._pools[beside.column_permutation.name].long()]
        return x

    def _inner(self, x: Tensor) -> Tensor | None:
        """R x `[N, r]` in fp32, or None."""
        if self._program.beside.low_rank is None:
            return None
        return x.float() @ self._pools[self._program.beside.low_rank[1].name].float().T

    def _epilogue(self, product: Tensor, inner: Tensor | None, first: int, last: int, out: Tensor) -> None:
        """Rows first .. last of W's product, finished in fp32 and written to their place in y."""
        beside = self._program.beside
        target: slice | Tensor = slice(first, last)
        if beside.row_permutation is not None:
            target = self._pools[beside.row_permutation.name][first:last].long()
        y = product.float()
        if beside.output_scale is not None:
            y = y * self._pools[beside.output_scale.name][target].float()
        if inner is not None and beside.low_rank is not None:
            y = y + inner @ self._pools[beside.low_rank[0].name][target].float().T
        if beside.bias is not None:
            y = y + self._pools[beside.bias.name][target].float()
        if beside.activation is not None:
            y = _ACTIVATIONS[beside.activation](y)
        out[:, target] = y.to(out.dtype)
