"""The `vendor` executor: cuSPARSELt for a matrix of 2:4 tiles, cuBLAS for any other.

For large batches, where the product is bound by arithmetic and a vendor's library has nothing to decode. It
keeps the matrix in the library's own form beside what other executors keep, which is why it runs only where a schedule
says so; `stats()` counts that copy.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stoicc.codegen.executor import Pools
from stoicc.codegen.triton.dense_once import DenseOnce, Taker, taken_bytes
from stoicc.codegen.triton.launch import low_rank_bytes, low_rank_product, product_fp32
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import CodegenError
from stoicc.ir.library import library_copy
from stoicc.ir.types import Module


class Vendor(DenseOnce):
    """The whole matrix, decoded once to what the library takes.

    The epilogue is that of `DenseOnce`; where there is one, a 2:4 product is rounded to x's dtype before it. For x of
    another dtype than the weight's, each call makes a dense copy of that dtype.

    Raises:
        CodegenError: weights of 32 bits, or none that are stored.
    """

    def __init__(self, module: Module, pools: Pools, on_missing: str) -> None:
        program = module.tiles
        if library_copy(program) is None:
            found = f"{program.dtype} weights" if program.dtype == "f32" else "that every tile is empty"
            raise CodegenError(
                f"backend triton, executor vendor: expected f16 or bf16 weights to keep, found {found}; use dense-once"
            )
        super().__init__(module, pools, on_missing)
        self._dtype, self._sparse = TORCH_DTYPES[program.dtype], library_copy(program) == "2:4"
        weight = torch.empty(program.shape, dtype=self._dtype, device=next(iter(pools.values())).device)
        self._decode(weight, 0, program.grid[0])
        self._bytes = weight.nbytes * 9 // 16 if self._sparse else weight.nbytes
        self._weight: Tensor = torch.sparse.to_sparse_semi_structured(weight) if self._sparse else weight
        self._decoders = []  # tables of tiles are of no use any more
        self.source = f"{'cuSPARSELt' if self._sparse else 'cuBLAS'} multiplies; the matrix was decoded once\n"

    @property
    def resident_bytes(self) -> int:
        return super().resident_bytes + self._bytes

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        wide = torch.float32 if self._finishes else x_dtype
        rows = self._module.tiles.shape[0]
        taken = [(batch * rows, wide), *self._input_buffers(batch, x_dtype)]
        return taken_bytes(taken) + low_rank_bytes(batch, self._rank)

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        batch, rows, take = x.shape[0], self._module.tiles.shape[0], Taker(workspace)
        product = None
        if self._rights:
            product = low_rank_product(x, self._rights, take(torch.float32, batch, self._rank))
        result = take(torch.float32 if self._finishes else x.dtype, batch, rows)
        self._multiply(self._inputs(x, take), result)
        if self._finishes:
            self._finish(result, slice(0, rows), product)
        if self._rows is None:
            out.copy_(result)
        else:
            out.index_copy_(1, self._rows, result.to(out.dtype))

    def _multiply(self, inputs: Tensor, result: Tensor) -> None:
        if self._sparse and inputs.dtype == self._dtype:
            result.copy_(F.linear(inputs, self._weight))
            return
        dense = self._weight.to_dense() if self._sparse else self._weight
        if result.dtype == torch.float32:
            product_fp32(inputs, dense.to(inputs.dtype).t(), result)
        else:
            torch.mm(inputs, dense.to(inputs.dtype).t(), out=result)
