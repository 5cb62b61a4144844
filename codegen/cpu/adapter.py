"""The low-rank term L (R x): its factors are tile programs too, and run on the kernels of their tiles.

Two launches before that of the weight, R x and then L (R x), leave the term in fp32, [entry][row], which
the weight's epilogue adds. So factors are read once for all batch entries, in blocks that fit registers or on
matrix units, as the weight's own tiles are.
"""

import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from stoicc.codegen.cpu.factors import HeldFactor, tile_of
from stoicc.codegen.executor import PackedPlanes
from stoicc.ir.schedule import Schedule, TileCsr, WorkItem
from stoicc.ir.types import Module


class Product(Protocol):
    """The kernel of a factor, whose y is fp32 whatever x is."""

    @property
    def packed(self) -> PackedPlanes: ...

    @property
    def resident_bytes(self) -> int: ...

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int: ...

    def launch(self, x_dtype: torch.dtype, x: int, out: int, scratch: int, batch: int) -> None: ...


Terms = Callable[[torch.dtype, int], int]
Build = Callable[[Module, Mapping[str, Tensor]], Product]

_ALIGNMENT = 64
_ITEMS = 32
"""Work items that a factor of few tile rows is cut in, along K, so that threads share it."""


class Adapter:
    """Both factors of a weight, bound to their kernels.

    Attributes:
        programs, packed: of left and right, the tiles that their kernels hold.

    Args:
        left: `[M, r]` in the order of W's rows, not y's.
        right: `[r, K]`. Both as their values, or as codes.
        rows: M rounded up to whole tile rows of the weight.
        terms: sums of an entry's term, by dtype of x and batch. Matrix units take bf16, so there R x is three bf16
            numbers, as exact as fp32 together, and each has a sum of its own; elsewhere R x stays in fp32, and so it
            does for codes, whose kernels take fp32 on every unit.
    """

    def __init__(self, left: HeldFactor, right: HeldFactor, rows: int, terms: Terms, build: Build) -> None:
        self.rank, self._rows, self._terms = right.shape[0], rows, terms
        self._dtype = left.dtype
        modules = factor_module("left", left.padded(rows)), factor_module("right", right)
        self._left, self._right = (build(*each) for each in modules)
        self.programs = modules[0][0].tiles, modules[1][0].tiles
        self.packed = self._left.packed, self._right.packed

    def launch(self, x_dtype: torch.dtype, x: int, scratch: int, batch: int) -> None:
        """The term of x `[N, K]`, fp32 `[terms, N, rows]`, at the beginning of the workspace; all are addresses."""
        inner = scratch + self.term_bytes(batch, x_dtype)
        rest = inner + _rounded(batch * self.rank * 4)
        self._right.launch(x_dtype, x, inner, rest, batch)
        if self._terms(x_dtype, batch) == 1:
            self._left.launch(torch.float32, inner, scratch, rest, batch)
            return
        parts = rest
        rest += _rounded(3 * batch * self.rank * 2)
        left_over = _at(inner, (batch, self.rank), torch.float32)
        for part in _at(parts, (3, batch, self.rank), self._dtype):
            part.copy_(left_over)
            left_over.sub_(part).nan_to_num_(0.0, 0.0, 0.0)  # what is not finite is in the first part alone
        self._left.launch(self._dtype, parts, scratch, rest, 3 * batch)

    def term_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        """Bytes of the term, rounded up to where the next area begins."""
        return _rounded(batch * self._terms(x_dtype, batch) * self._rows * 4)

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        """Scratch of one call, the term included."""
        terms = self._terms(x_dtype, batch)
        inner = _rounded(batch * self.rank * 4) + _rounded(3 * batch * self.rank * 2) * (terms == 3)
        right = self._right.workspace_bytes(batch, x_dtype)
        left = self._left.workspace_bytes(terms * batch, torch.float32 if terms == 1 else self._dtype)
        return self.term_bytes(batch, x_dtype) + inner + max(right, left)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the packed factors."""
        return self._right.resident_bytes + self._left.resident_bytes


def factor_module(name: str, factor: HeldFactor) -> tuple[Module, dict[str, Tensor]]:
    """A factor `[rows, columns]` as a scheduled program of tiles of one format, and its pools."""
    program, pools = factor.tiled(name, tile_of(factor.shape))
    count, width = program.grid
    csr = TileCsr(0, tuple(range(0, count * width + 1, width)), tuple(range(width)) * count)
    items = tuple(WorkItem(row, 0, 1, ((row * width, (row + 1) * width),)) for row in range(count))
    schedule = Schedule((0,), tuple(range(count)), (csr,), items, tuple(range(count + 1)))
    return Module(program, schedule.split_k(-(-_ITEMS // count)) if count < _ITEMS else schedule), pools


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The memory at an address as a tensor."""
    memory = (ctypes.c_uint8 * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
