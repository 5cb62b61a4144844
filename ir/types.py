"""The tile-level IR: frozen, tensor-free, one page.

    module   = Module(tiles: program, schedule: schedule?)
    program  = TileProgram(name, shape: (M, K), tile: (BM, BK), dtype,
                           segments: segment*, tile_map: int*, beside: beside)
    segment  = Segment(format: text, count: int, pools: pool*, tile_bytes: int*)
    beside   = Beside(bias?, low_rank: (left: factor, right: factor)?, row_permutation?, column_permutation?,
                      input_scale?, output_scale?: pool, activation: text?)
    factor   = pool | CodedFactor(codes: pool, scales: pool, bits, group_size, columns)
    pool     = Pool(name, dtype, shape, digest)

M = out_features, K = in_features. `tile_map` is row-major over the tile grid and names a segment
per tile. A segment's payload is in named pools of torch tensors that stand outside the IR, tile
by tile in row-major order of the tiles that use the segment. The matrix of a module is

    y = (P_r S_o W_tiles S_i P_c) x + L (R x) + b,      then the activation

where row i of W_tiles is row `row_permutation[i]` of y, column j of W_tiles meets
`x[column_permutation[j]]`, S_i = diag(input_scale) in the order of x, S_o = diag(output_scale)
in the order of y, and L and R are in the order of y and x.

The schedule's types are in `stoicc.ir.schedule`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format
from stoicc.ir.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Pool:
    """A named tensor of a module, by dtype, shape and content hash."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Segment:
    """All tiles of one format: how many, in which pools, and bytes per tile where they differ."""

    format: str
    count: int
    pools: tuple[Pool, ...] = ()
    tile_bytes: tuple[int, ...] = ()

    def resolve(self) -> TileFormat:
        """The registered format that this segment's text names."""
        return find_format(self.format)


@dataclass(frozen=True, slots=True)
class CodedFactor:
    """A low-rank factor `[rows, columns]` as symmetric codes, with a scale for each group of a row.

    Attributes:
        codes: u8 `[rows, bytes]`, as `stoicc.ir.factors.pack_codes` makes it.
        scales: `[rows, groups]`, in the dtype that values have.
        bits: 2 to 8; a value is (code - 2**(bits - 1)) * scale.
        group_size: columns that share a scale; 0 for the whole row.
        columns: of the factor; the last byte and the last group may reach past them.
    """

    codes: Pool
    scales: Pool
    bits: int
    group_size: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As that of a pool of floats."""
        return (*self.codes.shape[:1], self.columns)

    @property
    def dtype(self) -> str:
        """Of the values."""
        return self.scales.dtype


@dataclass(frozen=True, slots=True)
class Beside:
    """What stands beside the tiles; see the module docstring for what each one means."""

    bias: Pool | None = None
    low_rank: tuple[Pool, Pool] | tuple[CodedFactor, CodedFactor] | None = None
    row_permutation: Pool | None = None
    column_permutation: Pool | None = None
    input_scale: Pool | None = None
    output_scale: Pool | None = None
    activation: str | None = None

    def pools(self) -> Iterator[Pool]:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Pool):
                yield value
            elif isinstance(value, tuple):
                for factor in value:
                    yield from (factor,) if isinstance(factor, Pool) else (factor.codes, factor.scales)


ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
"""Activations that an epilogue can fuse; gelu is the erf form, as in torch."""


TILE_SIZES = (16, 32, 64, 128, 256)
"""What BM and BK may be: powers of two that every backend has code for."""


@dataclass(frozen=True, slots=True)
class TileProgram:
    """A weight matrix as tiles, each with a format; the result of the inspector."""

    name: str
    shape: tuple[int, int]
    tile: tuple[int, int]
    dtype: str
    segments: tuple[Segment, ...]
    tile_map: tuple[int, ...]
    beside: Beside = field(default_factory=Beside)

    @property
    def grid(self) -> tuple[int, int]:
        """Tile rows and tile columns; the last of each may reach past the matrix."""
        return -(-self.shape[0] // self.tile[0]), -(-self.shape[1] // self.tile[1])

    def map_array(self) -> NDArray[np.int32]:
        """The tile map as an int32 array `[tile rows, tile columns]`."""
        return np.asarray(self.tile_map, dtype=np.int32).reshape(self.grid)

    def pools(self) -> Iterator[Pool]:
        for segment in self.segments:
            yield from segment.pools
        yield from self.beside.pools()

    def __str__(self) -> str:
        from stoicc.ir.printer import print_program

        return print_program(self)


@dataclass(frozen=True, slots=True)
class Module:
    """A tile program and, once passes have run, its schedule: what flows through a pipeline."""

    tiles: TileProgram
    schedule: Schedule | None = None

    def __str__(self) -> str:
        from stoicc.ir.printer import print_module

        return print_module(self)
