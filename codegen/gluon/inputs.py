"""What stands on x's side of the tiles, S_i and P_c: tables for a kernel, or x prepared by launches before it.

A kernel whose copies to shared memory take whole runs of 16 bytes cannot scale or gather x on its way; one that takes x
through registers can (`prologue.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.codegen.triton.launch import ALIGNMENT


@dataclass(frozen=True, eq=False)
class Inputs:
    """Attributes:
    order: column of x that stands at each column of the tiles, or None.
    scale: fp32, of the columns in that order, or None.
    """

    order: Tensor | None
    scale: Tensor | None

    @staticmethod
    def of(beside: Mapping[str, Tensor]) -> "Inputs":
        """From what stands beside the tiles, by the names of `beside_tensors`."""
        order, scale = beside.get("column_permutation"), beside.get("input_scale")
        if scale is not None:
            scale = scale.float() if order is None else scale.float()[order.long()]
        return Inputs(order, scale)

    def __bool__(self) -> bool:
        return self.order is not None or self.scale is not None

    def tables(self) -> dict[str, Tensor]:
        """By the names of arguments of a kernel that applies them."""
        named = {"column_permutation": self.order, "input_scale": self.scale}
        return {name: table for name, table in named.items() if table is not None}

    def bytes(self, batch: int, columns: int) -> int:
        """Of x as the tiles meet it, in 16 bits, rounded up so that what follows is aligned."""
        return -(-batch * columns * 2 // ALIGNMENT) * ALIGNMENT if self else 0

    def prepare(self, x: Tensor, out: Tensor) -> Tensor:
        """P_c S_i x for rows of x `[N, K]` into `out`, rounded once to x's dtype."""
        if self.order is not None:
            x = torch.index_select(x, 1, self.order, out=out)
        return x if self.scale is None else torch.mul(x, self.scale, out=out)
