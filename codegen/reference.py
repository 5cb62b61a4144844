"""The reference backend: decode panels of tiles with torch, multiply with torch.

It is the meaning of every other backend: any registered format, any device, float64 input too.
"""

import itertools
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import pad

from stoicc.codegen.executor import Backend, Executor, Pools
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.factors import factor_values
from stoicc.ir.planes import PlaneSource, chosen_planes, tile_coordinates, tile_planes
from stoicc.ir.schedule import TileCsc
from stoicc.ir.types import Module, TileProgram

PANEL_WEIGHTS = 1 << 22
"""Weights decoded at a time: bounds the scratch of the reference and dense-once executors."""

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}


class PanelDecoder:
    """Decodes runs of whole tile rows of a program to a dense panel, with the formats' own decode."""

    def __init__(self, program: TileProgram, pools: Pools) -> None:
        self.program, self.pools = program, pools
        if isinstance(pools, PlaneSource):
            self.device = pools.device
        else:
            self.device = next(iter(pools.values())).device if pools else torch.device("cpu")
        self.coordinates = [tile_coordinates(program, index) for index in range(len(program.segments))]

    @property
    def height(self) -> int:
        """Tile rows per panel that keep it within PANEL_WEIGHTS (at least one)."""
        return max(1, PANEL_WEIGHTS // (self.program.tile[0] * self.program.tile[1] * self.program.grid[1]))

    def panel(self, first: int, last: int) -> Tensor:
        """Tile rows [first, last) as `[(last - first) * BM, tile columns * BK]`, tails included."""
        program, (height, width) = self.program, self.program.tile
        columns = program.grid[1]
        panel = torch.zeros(
            (last - first) * height, columns * width, dtype=TORCH_DTYPES[program.dtype], device=self.device
        )
        by_tile = panel.view(last - first, height, columns, width)
        for index, segment in enumerate(program.segments):
            rows, at = self.coordinates[index]
            begin, end = np.searchsorted(rows, (first, last)).tolist()
            if not segment.pools or begin == end:
                continue
            planes = tile_planes(program, index, self.pools, begin, end)
            tiles = segment.resolve().decode(planes, program.tile, program.dtype)
            row_index = torch.from_numpy(rows[begin:end] - first).to(self.device)
            by_tile[row_index, :, torch.from_numpy(at[begin:end]).to(self.device)] = tiles
        return panel


def decode_tiles(program: TileProgram, pools: Pools) -> Tensor:
    """The tile matrix `[M, K]` in tile order (permutations not undone), in the weight's dtype."""
    decoder = PanelDecoder(program, pools)
    rows, columns = program.shape
    matrix = torch.empty(rows, columns, dtype=TORCH_DTYPES[program.dtype], device=decoder.device)
    for first in range(0, program.grid[0], decoder.height):
        last = min(first + decoder.height, program.grid[0])
        top, bottom = first * program.tile[0], min(last * program.tile[0], rows)
        matrix[top:bottom] = decoder.panel(first, last)[: bottom - top, :columns]
    return matrix


def scaled_input(program: TileProgram, pools: Pools, x: Tensor) -> Tensor:
    """x `[N, K]` as the tiles meet it: input scale, then column permutation."""
    if program.beside.input_scale is not None:
        x = x * pools["input_scale"].to(x.dtype)
    if program.beside.column_permutation is not None:
        x = x[:, pools["column_permutation"].long()]
    return x


def finish_output(program: TileProgram, pools: Pools, y: Tensor, x: Tensor) -> Tensor:
    """The epilogue on `y [N, M]` in tile row order: permutation, scale, low rank, bias, activation."""
    beside = program.beside
    if beside.row_permutation is not None:
        y = torch.empty_like(y).index_copy_(1, pools["row_permutation"].long(), y)
    if beside.output_scale is not None:
        y = y * pools["output_scale"].to(y.dtype)
    if beside.low_rank is not None:
        left, right = (factor_values(factor, pools).to(x.dtype) for factor in beside.low_rank)
        y = y + (x @ right.T) @ left.T
    if beside.bias is not None:
        y = y + pools["bias"].to(y.dtype)
    return y if beside.activation is None else ACTIVATION_FUNCTIONS[beside.activation](y)


class ReferenceExecutor(Executor):
    """Panels of tiles times x, in fp32 (float64 for float64 input), on any device."""

    source = "# reference executor: decodes panels of tiles with torch, nothing is emitted\n"

    def __init__(self, module: Module, pools: Pools) -> None:
        self.program, self.pools = module.tiles, pools
        self.decoder = PanelDecoder(module.tiles, pools)

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = x.to(compute)
        inner = scaled_input(self.program, self.pools, wide)
        rows, columns = self.program.shape
        y = wide.new_empty(x.shape[0], rows)
        for first in range(0, self.program.grid[0], self.decoder.height):
            last = min(first + self.decoder.height, self.program.grid[0])
            top, bottom = first * self.program.tile[0], min(last * self.program.tile[0], rows)
            panel = self.decoder.panel(first, last)[: bottom - top, :columns]
            y[:, top:bottom] = inner @ panel.to(compute).T
        out.copy_(finish_output(self.program, self.pools, y, wide))


class TransposedReference(Executor):
    """h W for h `[N, M]` in the order of tile rows, in fp32 or float64, by the columns of the transposed schedule."""

    source = ReferenceExecutor.source

    def __init__(self, module: Module, pools: Pools) -> None:
        schedule = module.schedule
        assert schedule is not None
        assert schedule.transposed is not None
        self.program, self.pools, self.transposed = module.tiles, pools, schedule.transposed

    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        (rows, columns), (height, width) = self.program.shape, self.program.tile
        wide = pad(x.to(compute), (0, -rows % height)).unflatten(1, (-1, height))
        pools = self.pools.whole() if isinstance(self.pools, PlaneSource) else self.pools
        bounds = itertools.pairwise(self.transposed.bin_ptr)
        for column in itertools.chain.from_iterable(self.transposed.column_order[b:e] for b, e in bounds):
            sums = wide.new_zeros(x.shape[0], width)
            for csc in self.transposed.cscs:
                begin, end = csc.col_ptr[column : column + 2]
                if begin < end:
                    under = wide[:, torch.tensor(csc.row_idx[begin:end], device=x.device)].flatten(1)
                    sums.addmm_(under, self._tiles(csc, begin, end, pools).flatten(0, 1).to(compute))
            out[:, column * width : (column + 1) * width] = sums[:, : columns - column * width]

    @property
    def transient_bytes(self) -> int:
        """Planes that are unpacked for a call, where they were let go."""
        return self.pools.unpacked_bytes if isinstance(self.pools, PlaneSource) else 0

    def _tiles(self, csc: TileCsc, begin: int, end: int, pools: Pools) -> Tensor:
        """Entries begin .. end of a csc, decoded `[end - begin, BM, BK]`."""
        planes = chosen_planes(self.program, csc.segment, pools, np.asarray(csc.tiles[begin:end]))
        return self.program.segments[csc.segment].resolve().decode(planes, self.program.tile, self.program.dtype)


class ReferenceBackend(Backend):
    """Runs everywhere, on every format."""

    name: ClassVar[str] = "reference"
    device_type: ClassVar[str] = "any"

    def available(self) -> str | None:
        return None

    def reads_sources(self, kind: str) -> bool:
        return True

    def build(self, module: Module, pools: Pools, kind: str, on_missing: str) -> Executor:
        return TransposedReference(module, pools) if kind == "transposed" else ReferenceExecutor(module, pools)

    def emit(self, module: Module, x_dtype: torch.dtype) -> str:
        return ReferenceExecutor.source
