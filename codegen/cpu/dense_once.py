"""Decode-once: panels of tile rows are decoded to a bounded scratch buffer and given to the BLAS.

For a large batch, where a product is bound by arithmetic and the vendor's GEMM is the best
there is. Each call decodes every tile once; nothing dense is kept.
"""

import torch
from torch import Tensor

from stoicc.codegen.cpu.decode import CompiledDecoder, can_decode
from stoicc.codegen.executor import Executor, Pools
from stoicc.codegen.reference import ACTIVATION_FUNCTIONS, PanelDecoder, scaled_input
from stoicc.ir.dtypes import TORCH_DTYPES, itemsize, output_dtype
from stoicc.ir.errors import CodegenError
from stoicc.ir.factors import factor_values
from stoicc.ir.planes import PlaneSource
from stoicc.ir.types import Beside, Module

PANEL_ROWS = 1024
"""Rows of a panel: a BLAS brings all of x to an order of its own for each product, so few and tall ones pay."""

PANEL_BYTES = 32 << 20
"""Scratch for one panel; a tile row that is larger makes a panel by itself."""

LINE = 64
"""Bytes of a cache line."""

UNPACK_COPIES = 5
"""Copies of a panel's planes that unpacking takes at most, itself included."""


class DenseOnceExecutor(Executor):
    """Panels through torch's product; scales, factors and activation in fp32 after it.

    Of a `PlaneSource` it reads the planes of one panel at a time.
    """

    def __init__(self, module: Module, pools: Pools) -> None:
        self._module, self._program, self._pools = module, module.tiles, pools
        self._compiled = CompiledDecoder(module, pools) if can_decode(module) else None
        self._decoder = PanelDecoder(module.tiles, pools)
        self.source = "" if self._compiled is None else self._compiled.source

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        if x.dtype == torch.float64:
            raise CodegenError(
                f"cpu kernel of {self._program.name}: expected x of 16 or 32 bits, found f64; use the reference"
            )
        output_dtype(self._program.dtype, x.dtype)
        inner, left = self._low_rank(x)
        wide = self._product_dtype(x.dtype)
        inputs = scaled_input(self._program, self._pools, x.float()).to(wide) if self._scales_x else x.to(wide)
        (rows, columns), height = self._program.shape, self._program.tile[0]
        if self._compiled is not None and not self._compiled.fits():
            self._compiled = CompiledDecoder(self._module, self._pools)
        for begin in range(0, self._program.grid[0], self._panel_rows):
            end = min(begin + self._panel_rows, self._program.grid[0])
            first, last = begin * height, min(end * height, rows)
            panel = self._panel(begin, end, workspace).to(wide)
            weight = panel[: last - first, :columns].T
            if self._in_place(out.dtype, wide):
                self._finished(inputs, weight, out[:, first:last], first, last)
            else:
                self._epilogue(inputs @ weight, inner, left, first, last, out)

    def _in_place(self, out_dtype: torch.dtype, wide: torch.dtype) -> bool:
        """Whether the BLAS can write y itself: a bias of y's dtype is all that stands beside the tiles."""
        beside = self._program.beside
        if beside != Beside(bias=beside.bias) or out_dtype != wide:
            return False
        return beside.bias is None or TORCH_DTYPES[beside.bias.dtype] == wide

    def _finished(self, inputs: Tensor, weight: Tensor, out: Tensor, first: int, last: int) -> None:
        if self._program.beside.bias is None:
            torch.mm(inputs, weight, out=out)
        else:
            torch.addmm(self._pools["bias"][first:last], inputs, weight, out=out)

    def _product_dtype(self, x_dtype: torch.dtype) -> torch.dtype:
        """What the BLAS multiplies in: fp32 for f16 with anything beside it.

        A product or a scaled x past 65504 would be infinity before a small scale brings it back.
        """
        return torch.float32 if x_dtype == torch.float16 and self._program.beside != Beside() else x_dtype

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        return self._panel_rows * self._tile_row_bytes

    @property
    def transient_bytes(self) -> int:
        if not isinstance(self._pools, PlaneSource) or self._compiled is None:
            return 0
        rows, height = self._program.grid[0], self._panel_rows
        panels = ((begin, min(begin + height, rows)) for begin in range(0, rows, height))
        return UNPACK_COPIES * max(self._compiled.unpacked_bytes(*panel) for panel in panels)

    @property
    def _scales_x(self) -> bool:
        beside = self._program.beside
        return beside.input_scale is not None or beside.column_permutation is not None

    @property
    def _stride(self) -> int:
        """Weights from a row of a panel to the next: an odd number of cache lines.

        Rows that are a power of two apart meet in the same few sets of a cache, where they push each other out.
        """
        size = itemsize(self._program.dtype)
        lines = -(-self._program.grid[1] * self._program.tile[1] * size // LINE)
        return (lines | 1) * LINE // size

    @property
    def _tile_row_bytes(self) -> int:
        return self._program.tile[0] * self._stride * itemsize(self._program.dtype)

    @property
    def _panel_rows(self) -> int:
        tall = min(PANEL_ROWS // self._program.tile[0], PANEL_BYTES // self._tile_row_bytes)
        return min(self._program.grid[0], max(1, tall))

    def _panel(self, begin: int, end: int, workspace: Tensor) -> Tensor:
        """Tile rows begin .. end as `[rows, K and more]` in the weight's dtype."""
        if self._compiled is None:
            return self._decoder.panel(begin, end)
        flat = workspace[: (end - begin) * self._tile_row_bytes].view(TORCH_DTYPES[self._program.dtype])
        panel = flat.view(-1, self._stride)
        self._compiled(begin, end, panel)
        return panel

    def _low_rank(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """R x `[N, r]` in fp32 and L `[M, r]`, or None twice."""
        if self._program.beside.low_rank is None:
            return None, None
        left, right = (factor_values(factor, self._pools) for factor in self._program.beside.low_rank)
        return x.float() @ right.float().T, left

    def _epilogue(
        self, product: Tensor, inner: Tensor | None, left: Tensor | None, first: int, last: int, out: Tensor
    ) -> None:
        """Rows first .. last of W's product, finished in fp32 and written to their place in y."""
        beside = self._program.beside
        target: slice | Tensor = slice(first, last)
        if beside.row_permutation is not None:
            target = self._pools["row_permutation"][first:last].long()
        y = product.float()
        if beside.output_scale is not None:
            y = y * self._pools["output_scale"][target].float()
        if inner is not None and left is not None:
            y = y + inner @ left[target].float().T
        if beside.bias is not None:
            y = y + self._pools["bias"][target].float()
        if beside.activation is not None:
            y = ACTIVATION_FUNCTIONS[beside.activation](y)
        out[:, target] = y.to(out.dtype)
