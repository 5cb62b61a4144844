"""What stands on x's side of the tiles, S_i and P_c: tables for a kernel, or x prepared by launches before it.

A kernel whose copies to shared memory take whole runs of 16 bytes cannot scale or gather x on its way; one that takes x
through registers can (`prologue.py`). Rows of x that are not whole runs are padded to such, whatever the kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.codegen.triton.launch import ALIGNMENT

RUN = 8
"""Columns of x that a copy of 16 bytes takes."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Attributes:
    order: column of x that stands at each column of the tiles, or None.
    scale: fp32, of the columns in that order, or None.
    columns: of x.
    """

    order: Tensor | None
    scale: Tensor | None
    columns: int

    @staticmethod
    def of(beside: Mapping[str, Tensor], columns: int) -> "Inputs":
        """From what stands beside the tiles, by the names of `beside_tensors`."""
        order, scale = beside.get("column_permutation"), beside.get("input_scale")
        if scale is not None:
            scale = scale.float() if order is None else scale.float()[order.long()]
        return Inputs(order, scale, columns)

    def __bool__(self) -> bool:
        return self.order is not None or self.scale is not None or self.width != self.columns

    @property
    def width(self) -> int:
        """Columns of x as a kernel reads it."""
        return padded(self.columns)

    def tables(self) -> dict[str, Tensor]:
        """By the names of arguments of a kernel that applies them."""
        named = {"column_permutation": self.order, "input_scale": self.scale}
        return {name: table for name, table in named.items() if table is not None}

    def bytes(self, batch: int) -> int:
        """Of x as the tiles meet it, in 16 bits, rounded up so that what follows is aligned."""
        return -(-batch * self.width * 2 // ALIGNMENT) * ALIGNMENT if self else 0

    def prepare(self, x: Tensor, out: Tensor) -> Tensor:
        """P_c S_i x for rows of x `[N, K]` into `out` `[N, width]`, rounded once to x's dtype; zeros past K."""
        into = out[:, : self.columns]
        if self.width != self.columns:
            out[:, self.columns :].zero_()  # weights past K are zeros, but NaN times zero is NaN
        if self.order is not None:
            x = torch.index_select(x, 1, self.order, out=into)
        if self.scale is not None:
            torch.mul(x, self.scale, out=into)
        elif x is not into:
            into.copy_(x)
        return out


def padded(columns: int) -> int:
    """Whole runs of x's columns."""
    return -(-columns // RUN) * RUN
