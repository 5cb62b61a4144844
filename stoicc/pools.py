"""Tile programs with their pools: how planes are gathered, folded and decoded again."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stoicc.codegen.reference import decode_tiles
from stoicc.ir.digest import digest
from stoicc.ir.dtypes import DTYPE_NAMES
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.factors import factor_values, pack_codes
from stoicc.ir.format import Plane, PlaneKind, Planes, TileFormat
from stoicc.ir.planes import plane_slots, pool_name
from stoicc.ir.revisions import revisions
from stoicc.ir.types import ACTIVATIONS, Beside, CodedFactor, Pool, Segment, TileProgram
from stoicc.ops.lowering import CodeSheet, Lowered

Pools = Mapping[str, Tensor]
LowRank = tuple[Pool, Pool] | tuple[CodedFactor, CodedFactor]
_SIDES = ("left", "right")


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """What the inspector gives: a tile program and the tensors that its pools name.

    Attributes:
        lowering: what each operator of the weight's expression became, in order.
    """

    program: TileProgram
    pools: dict[str, Tensor]
    lowering: tuple[str, ...] = ()

    def to_dense(self) -> Tensor:
        """The matrix `[M, K]` that the tiles and what stands beside them hold.

        In the weight's dtype, bit for bit, where nothing but permutations stands beside the
        tiles; float32 where scales or low-rank factors do.
        """
        return effective_matrix(self.program, self.pools)

    def __str__(self) -> str:
        return str(self.program)


class PoolBuilder:
    """Collects planes chunk by chunk and joins them into pools, one segment per format in use."""

    def __init__(
        self, name: str, shape: tuple[int, int], tile: tuple[int, int], dtype: str, formats: tuple[TileFormat, ...]
    ) -> None:
        self.name, self.shape, self.tile, self.dtype, self.formats = name, shape, tile, dtype, formats
        self.columns = -(-shape[1] // tile[1])
        self.choices: list[Tensor] = []
        self.parts: dict[int, dict[str, list[Tensor]]] = {}

    def add(self, choice: Tensor, planes: Mapping[int, Planes]) -> None:
        """Take the next whole tile rows: a format index per tile, and the planes of each format."""
        first = sum(c.numel() for c in self.choices)
        self.choices.append(choice)
        for index, encoded in planes.items():
            if not isinstance(encoded, dict):
                raise FormatError(
                    f"format {self.formats[index]}: expected encode to return a dict of planes, "
                    f"found {type(encoded).__name__}"
                )
            position = first + (choice == index).nonzero().flatten().numpy()
            rows, columns = np.divmod(position, self.columns)
            lists = self.parts.setdefault(index, {})
            for plane in self.formats[index].planes(self.tile, self.dtype):
                if plane.name not in encoded:
                    raise FormatError(
                        f"format {self.formats[index]}: expected encode to return plane {plane.name!r}, "
                        f"found {sorted(encoded)}"
                    )
                folded = self._fold(self.formats[index], plane, encoded[plane.name], rows, columns)
                lists.setdefault(plane.name, []).append(folded)
                if plane.kind is PlaneKind.RAGGED:
                    lists.setdefault(f"{plane.name}_ptr", []).append(encoded[f"{plane.name}_ptr"])

    def finish(self, beside: tuple[Beside, dict[str, Tensor]]) -> TiledWeight:
        """The program with dense segment numbers, and its pools."""
        choice = torch.cat(self.choices)
        used, tile_map = choice.unique(return_inverse=True)
        pools: dict[str, Tensor] = dict(beside[1])
        segments = []
        for number, index in enumerate(used.tolist()):
            names = []
            kinds = {plane.name: plane.kind for plane in self.formats[index].planes(self.tile, self.dtype)}
            for plane, parts in self.parts.pop(index).items():
                names.append(pool_name(number, plane))
                if kinds.get(plane) is PlaneKind.MATRIX:
                    pools[names[-1]] = _only(parts, f"format {self.formats[index]}, plane {plane}")
                else:
                    pools[names[-1]] = _join(parts) if plane in kinds else _join_offsets(parts)
            described = tuple(describe(name, pools[name]) for name in names)
            count = int((tile_map == number).sum())
            tile_bytes = self._ragged_bytes(index, number, pools)
            segments.append(Segment(str(self.formats[index]), count, described, tile_bytes))
        program = TileProgram(
            self.name, self.shape, self.tile, self.dtype, tuple(segments), tuple(tile_map.tolist()), beside[0]
        )
        return TiledWeight(program, pools)

    def _fold(self, fmt: TileFormat, plane: Plane, entries: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """Per-tile entries -> stored entries; tiles that share one must agree bit for bit."""
        if plane.kind not in (PlaneKind.GROUP, PlaneKind.MATRIX):
            return entries.contiguous()
        slots = plane_slots(plane, rows, columns)
        first = torch.from_numpy(np.unique(slots, return_index=True)[1])
        folded = entries[first]
        differs = (folded[torch.from_numpy(slots)] != entries).flatten(1).any(1).nonzero()
        if len(differs):
            tile = int(differs[0])
            raise FormatError(
                f"format {fmt}, tile ({rows[tile]}, {columns[tile]}): expected the {plane.name} of the tiles it "
                "shares them with, found others; use one operator for the whole group, or a smaller group_size"
            )
        return folded

    def _ragged_bytes(self, index: int, number: int, pools: Pools) -> tuple[int, ...]:
        planes = self.formats[index].planes(self.tile, self.dtype)
        if all(plane.kind is not PlaneKind.RAGGED for plane in planes):
            return ()
        fixed = sum(plane.entry_bytes for plane in planes if plane.kind is PlaneKind.TILE)
        ragged = [plane for plane in planes if plane.kind is PlaneKind.RAGGED]
        lengths = [pools[pool_name(number, f"{plane.name}_ptr")].diff() * plane.entry_bytes for plane in ragged]
        return tuple((torch.stack(lengths).sum(0) + fixed).tolist())


def describe(name: str, pool: Tensor) -> Pool:
    """A pool as the IR names it: dtype, shape and content hash."""
    return Pool(name, DTYPE_NAMES[pool.dtype], tuple(pool.shape), digest(pool))


def beside_pools(lowered: Lowered, bias: Tensor | None, activation: str | None) -> tuple[Beside, dict[str, Tensor]]:
    """What stands beside the tiles, as pools: vectors f32, permutations i32, factors f32 or as the weight.

    Pools are copies: what the caller does to the originals later does not reach a kernel.
    """
    rows = lowered.values.shape[0]
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")
    if bias is not None and (not isinstance(bias, Tensor) or tuple(bias.shape) != (rows,) or bias.is_complex()):
        found = f"{list(bias.shape)} of {bias.dtype}" if isinstance(bias, Tensor) else type(bias).__name__
        raise InputError(f"bias: expected a tensor of [{rows}] floats, found {found}")
    vectors = {"bias": bias, "input_scale": lowered.input_scale, "output_scale": lowered.output_scale}
    pools = {name: _own(v, torch.float32) for name, v in vectors.items() if v is not None}
    orders = {"row_permutation": lowered.row_permutation, "column_permutation": lowered.column_permutation}
    pools |= {name: _own(v, torch.int32) for name, v in orders.items() if v is not None}
    factors = None
    names = {name: describe(name, pool) for name, pool in pools.items()}
    if lowered.low_rank is not None:
        factors = _factors(lowered, pools)
    for name, pool in pools.items():
        if not bool(pool.isfinite().all()):
            raise InputError(
                f"{name}: expected finite values, found {pool[~pool.isfinite()][0].item()} (as {pool.dtype})"
            )
    return Beside(low_rank=factors, activation=activation, **names), pools


def _factors(lowered: Lowered, pools: dict[str, Tensor]) -> LowRank:
    """The low-rank factors as their codes where they have some, else in the weight's dtype or in fp32; into `pools`."""
    assert lowered.low_rank is not None
    if lowered.low_rank_codes is not None:
        left, right = (_coded(side, sheet, pools) for side, sheet in zip(_SIDES, lowered.low_rank_codes, strict=True))
        return left, right
    alike = all(factor.dtype == lowered.values.dtype for factor in lowered.low_rank)
    dtype = lowered.values.dtype if alike else torch.float32
    pools |= {side: _own(factor, dtype) for side, factor in zip(_SIDES, lowered.low_rank, strict=True)}
    return describe("left", pools["left"]), describe("right", pools["right"])


def _coded(side: str, sheet: CodeSheet, pools: dict[str, Tensor]) -> CodedFactor:
    codes, scales = f"{side}_codes", f"{side}_scales"
    pools[codes] = pack_codes(sheet.codes, sheet.bits)
    pools[scales] = _own(sheet.scales, sheet.scales.dtype)
    described = describe(codes, pools[codes]), describe(scales, pools[scales])
    return CodedFactor(*described, sheet.bits, sheet.group_size, sheet.codes.shape[1])


def _own(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy on the CPU."""
    return values.detach().to("cpu", dtype, copy=True).contiguous()


def effective_matrix(program: TileProgram, pools: Pools) -> Tensor:
    """The matrix from x to y before bias and activation; see `TiledWeight.to_dense`."""

    def pool(name: str) -> Tensor | None:
        return pools[name] if getattr(program.beside, name) is not None else None

    def order(name: str) -> Tensor | None:
        permutation = pool(name)
        return None if permutation is None else permutation.long()

    low_rank = None
    if program.beside.low_rank is not None:
        left, right = (factor_values(factor, pools) for factor in program.beside.low_rank)
        low_rank = left, right
    return Lowered(
        decode_tiles(program, pools),
        low_rank=low_rank,
        row_permutation=order("row_permutation"),
        column_permutation=order("column_permutation"),
        input_scale=pool("input_scale"),
        output_scale=pool("output_scale"),
    ).dense()


def _join(parts: list[Tensor]) -> Tensor:
    """Entries of all chunks as one pool; each chunk is let go once copied, so memory never doubles."""
    joined = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    begin = len(joined)
    while parts:
        part = parts.pop()
        begin -= len(part)
        joined[begin : begin + len(part)] = part
    return joined


def _only(parts: list[Tensor], where: str) -> Tensor:
    """The one entry of a plane that serves the whole matrix; every chunk has to say the same."""
    if any(not torch.equal(part, parts[0]) for part in parts):
        raise FormatError(f"{where}: expected one entry for the whole matrix, found others in other tile rows")
    return parts[0]


def _join_offsets(parts: list[Tensor]) -> Tensor:
    """Offsets of each chunk (from 0) -> offsets into the joined pool."""
    lengths = torch.cat([part.diff() for part in parts])
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))


def aligned(pool: Tensor) -> Tensor:
    """The pool as kernels may assume it: contiguous, at an address that is a multiple of 16 bytes."""
    pool = pool.contiguous()
    return pool.clone() if not pool.is_meta and pool.data_ptr() % 16 else pool


def rehash(program: TileProgram, pools: Pools) -> TileProgram:
    """The program with the content hashes that its pools have now."""
    return _map_pools(program, lambda pool: replace(pool, digest=digest(pools[pool.name])))


def _map_pools(program: TileProgram, change: Callable[[Pool], Pool]) -> TileProgram:
    """The program with every pool changed."""
    segments = tuple(replace(segment, pools=tuple(map(change, segment.pools))) for segment in program.segments)
    changed: dict[str, Any] = {
        entry.name: change(value)
        for entry in fields(program.beside)
        if isinstance(value := getattr(program.beside, entry.name), Pool)
    }
    if program.beside.low_rank is not None:
        changed["low_rank"] = tuple(_map_factor(factor, change) for factor in program.beside.low_rank)
    return replace(program, segments=segments, beside=replace(program.beside, **changed))


def _map_factor(factor: Pool | CodedFactor, change: Callable[[Pool], Pool]) -> Pool | CodedFactor:
    if isinstance(factor, Pool):
        return change(factor)
    return replace(factor, codes=change(factor.codes), scales=change(factor.scales))


def structure_hash(program: TileProgram) -> bytes:
    """16 bytes that two programs share when their tiles, formats and shapes do; contents may differ."""

    def blank(pool: Pool) -> Pool:
        return replace(pool, digest="")

    structure = repr(_map_pools(replace(program, name=""), blank)) + "".join(map(str, revisions(program).items()))
    return hashlib.blake2b(structure.encode(), digest_size=16).digest()
