"""A format of few bits, and a few weights of each tile in the weight's own dtype.

Source: SpQR (Dettmers et al. 2023, arXiv 2306.03078): weights without which their group's quantization error is least
are kept apart, anywhere. There a threshold chooses them, here a share of the tile.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from stoicc.formats import _outlier_c
from stoicc.formats._mask import offsets
from stoicc.formats.int4 import Int4
from stoicc.ir.dtypes import DTYPE_NAMES, bits, itemsize
from stoicc.ir.errors import FormatError
from stoicc.ir.format import (
    Approximation,
    Plane,
    PlaneKind,
    Planes,
    Tile,
    TileFormat,
    TileMac,
    TritonDecode,
    squared_error,
    tile_shape,
)
from stoicc.ir.registry import register_format

SEGMENT = 32
"""Columns of a row, at most, among which outliers are ranked."""
MOST = 4
"""Outliers of a segment, at most."""
STRIP = 16
"""Rows whose outliers stand together."""
_OWN = ("counts", "columns", "columns_ptr", "outliers", "outliers_ptr")


@triton.jit
def put_outliers(w, counts, columns, outliers, BM: tl.constexpr, BK: tl.constexpr):
    """The first outlier of every row, then the second of those that have one, and so on."""
    count = tl.reshape(tl.load(counts + tl.arange(0, BM)).to(tl.int32), (BM // 16, 16))
    whole = tl.sum(count, 1)
    first = tl.cumsum(whole, 0) - whole
    every = tl.arange(0, BK)[None, :]
    for i in range(tl.max(tl.load(counts + tl.arange(0, BM)).to(tl.int32), 0)):
        has = (i < count).to(tl.int32)
        at = tl.reshape(first[:, None] + tl.cumsum(has, 1) - has, (BM,))
        there = tl.reshape(has, (BM,)) != 0
        column = tl.load(columns + at, mask=there, other=0).to(tl.int32)
        value = tl.load(outliers + at, mask=there, other=0.0)
        w = tl.where(every == tl.where(there, column, -1)[:, None], value[:, None], w)
        first += tl.sum(has, 1)
    return w


@triton.jit
def decode_outlier(
    codes, scales, counts, columns, many, outliers, again,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, DECODE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Outliers at their places among values of two planes."""
    return put_outliers(DECODE(codes, scales, BM, BK, DTYPE, GROUPS), counts, columns, outliers, BM, BK)


@triton.jit
def decode_outlier_3(
    codes, scales, zeros, counts, columns, many, outliers, again,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, DECODE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Outliers at their places among values of three planes."""
    return put_outliers(DECODE(codes, scales, zeros, BM, BK, DTYPE, GROUPS), counts, columns, outliers, BM, BK)


@triton.jit
def decode_outlier_4(
    codes, high, scales, zeros, counts, columns, many, outliers, again,
    BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr, DECODE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Outliers at their places among values of four planes."""
    return put_outliers(DECODE(codes, high, scales, zeros, BM, BK, DTYPE, GROUPS), counts, columns, outliers, BM, BK)


_VALUES = Int4()
_DECODES = {2: decode_outlier, 3: decode_outlier_3, 4: decode_outlier_4}


@dataclass(frozen=True)
class Outlier(TileFormat):
    """The planes of the values, how many outliers each row has u8 `[BM]`, and their columns u8 and weights.

    Of 16 rows at a time: the first outlier of each row that has one, then the second ones, and so on; so that sixteen
    lanes have a row each. Where an outlier stands the values hold zero.

    Attributes:
        values: how all other weights are stored.
        share: of a tile's weights, how many `approximate` keeps apart at most.
    """

    name: ClassVar[str] = "outlier"
    by_default: ClassVar[bool] = False  # trying which weights to keep apart takes several encodings
    revision: ClassVar[int] = 2
    values: TileFormat = _VALUES
    share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.125:
            raise FormatError(
                f"format outlier: expected a share of the weights from above 0 to 0.125, found {self.share}; correct it"
            )

    def planes(self, tile: Tile, dtype: str) -> tuple[Plane, ...]:
        planes = self.values.planes(tile, dtype)
        if any(plane.kind is PlaneKind.RAGGED or plane.name in _OWN for plane in planes) or not planes:
            raise FormatError(
                f"format outlier: expected values with planes of fixed size, found {self.values}; use int4, int3, fp8 "
                "or another format of codes"
            )
        return (
            *planes,
            Plane("counts", "u8", (tile[0],)),
            Plane("columns", "u8", (), PlaneKind.RAGGED),
            Plane("outliers", dtype, (), PlaneKind.RAGGED),
        )

    def encode(self, tiles: Tensor) -> Planes:
        return self.encode_shared(tiles, torch.arange(tiles.shape[0]))

    def encode_shared(self, tiles: Tensor, slots: Tensor) -> Planes:
        out = self._apart(tiles, slots)
        return {**self.values.encode_shared(tiles.where(~out, 0), slots), **_runs(tiles, out)}

    def decode(self, planes: Planes, tile: Tile, dtype: str) -> Tensor:
        whole = {name: plane for name, plane in planes.items() if name not in _OWN}
        back = self.values.decode(whole, tile, dtype).contiguous()
        rows = _rows(planes["counts"])
        return (
            back.view(-1).index_put((rows * tile[1] + planes["columns"].long(),), planes["outliers"]).view(back.shape)
        )

    def migrate(self, planes: Planes, tile: Tile, dtype: str, revision: int) -> Planes | None:
        """Revision 1 had outliers row by row. Files of both orders say 1; columns ascend in each row, which tells."""
        counts, columns = planes["counts"], planes["columns"]
        order = _by_row(counts)[0]
        was, now = _ascend(columns, counts), _ascend(_undone(columns, order), counts)
        if was and not now:
            return {**planes, "columns": columns[order], "outliers": planes["outliers"][order]}
        same = torch.equal(order, torch.arange(len(order), device=order.device))
        return planes if same or (now and not was) else None

    def reject(self, tiles: Tensor) -> Tensor:
        return self.reject_shared(tiles, torch.arange(tiles.shape[0]))

    def reject_shared(self, tiles: Tensor, slots: Tensor) -> Tensor:
        """True where the values hold no tile that has up to four zeros more in each segment."""
        return self.values.reject_shared(tiles.where(~self._apart(tiles, slots), 0), slots)

    def why(self, tile: Tensor) -> str:
        out = self._apart(tile[None], torch.zeros(1, dtype=torch.int64))[0]
        return self.values.why(tile.where(~out, 0))

    def tile_bytes(self, tiles: Tensor, dtype: str) -> Tensor:
        out = self._apart(tiles, torch.arange(tiles.shape[0]))
        return out.flatten(1).sum(1).double() * (1 + itemsize(dtype)) + super().tile_bytes(tiles, dtype)

    def approximate(self, tiles: Tensor, slots: Tensor, statistics: Tensor | None = None) -> Approximation:
        """Those apart without which the values' error falls most; of a segment, the largest first."""
        rank, weight = _ranks(tiles), 1.0 if statistics is None else statistics[:, None, :]
        errors = []
        for count in range(MOST + 1):
            held = tiles.where(rank >= count, 0)
            planes = self.values.approximate(held, slots, statistics).planes
            square = (self._back(planes, tiles) - held.float()).square() * weight
            errors.append(_segments(square.where(rank >= count, 0)).sum(3))
        gains = _slopes(errors).flatten(1)  # T, row x segment x count
        most = min(int(tiles[0].numel() * self.share) if len(tiles) else 0, gains.shape[1])
        top = gains.topk(most, dim=1)
        chosen = torch.zeros_like(gains).scatter_(1, top.indices, (top.values > 0).float())
        counts = chosen.view(*errors[0].shape, MOST).sum(-1)
        out = (_segments(rank) < counts[..., None]).flatten(2)
        held = tiles.where(~out, 0)
        planes = self.values.approximate(held, slots, statistics).planes
        back = self._back(planes, tiles).to(tiles.dtype).where(~out, tiles)
        return Approximation({**planes, **_runs(tiles, out)}, squared_error(tiles, back, statistics))

    def trainable(self, tile: Tile, dtype: str) -> tuple[str, ...]:
        return ("outliers",)

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode | None:
        inner, count = self.values.decode_block(tile, dtype), len(self.values.planes(tile, dtype))
        if inner is None or inner.constants.keys() != {"GROUPS"} or count not in _DECODES:
            return None
        return TritonDecode(_DECODES[count], {"DECODE": inner.function, **inner.constants})

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:
        return _outlier_c.outlier_mac(self.values, tile, dtype)

    @property
    def bits(self) -> Any:
        """Width of the codes of the values, where they are codes."""
        return getattr(self.values, "bits")  # noqa: B009 (not every format has it)

    # -- help --------------------------------------------------------------------------------

    def _back(self, planes: Planes, like: Tensor) -> Tensor:
        return self.values.decode(planes, tile_shape(like), DTYPE_NAMES[like.dtype]).float()

    def _apart(self, tiles: Tensor, slots: Tensor) -> Tensor:
        """Bool `[T, BM, BK]`: the fewest largest of each segment, of a whole row alike, without which it is exact.

        All `MOST` where no number is enough: the values then reject the tile.
        """
        rank, out = _ranks(tiles), torch.zeros_like(tiles, dtype=torch.bool)
        left = torch.ones(tiles.shape[:2], dtype=torch.bool)
        for count in range(MOST + 1):
            out = torch.where(left[..., None], (rank < count) & bits(tiles).ne(0), out)
            held = tiles.where(~out, 0)
            back = self.values.decode(
                self.values.encode_shared(held, slots), tile_shape(tiles), DTYPE_NAMES[tiles.dtype]
            )
            left &= (bits(back) != bits(held)).any(2)
            if not left.any():
                break
        return out


def _slopes(errors: list[Tensor]) -> Tensor:
    """Errors with 0, 1, .. weights apart -> what each is worth, `[..., MOST]`: slopes of the hull, which never rise.

    Two heavy weights in a group are worth nothing one by one: each is worth half of what both are.
    """
    slopes = []
    for step in range(1, len(errors)):
        best = [
            torch.stack([(errors[k] - errors[j]) / (j - k) for j in range(step, len(errors))]).amax(0)
            for k in range(step)
        ]
        slopes.append(torch.stack(best).amin(0))
    return torch.stack(slopes, -1)


def _segments(tiles: Tensor) -> Tensor:
    """`[T, BM, BK]` -> `[T, BM, segments, columns]`."""
    return tiles.unflatten(2, (-1, min(SEGMENT, tiles.shape[2])))


def _ranks(tiles: Tensor) -> Tensor:
    """How many weights of its segment are larger than each, `MOST` at most: uint8 `[T, BM, BK]`."""
    segments = _segments(tiles.float().abs())
    largest = segments.topk(MOST, dim=3).indices
    ranks = torch.full(segments.shape, MOST, dtype=torch.uint8)
    return ranks.scatter_(3, largest, torch.arange(MOST, dtype=torch.uint8).expand(largest.shape)).flatten(2)


def _rows(counts: Tensor) -> Tensor:
    """Counts `[T, BM]` -> the row of each outlier among all rows of all tiles, in the order of the planes."""
    return _by_row(counts)[1]


def _by_row(counts: Tensor) -> tuple[Tensor, Tensor]:
    """The place of each outlier among those sorted by row and column, and its row."""
    count = counts.flatten().long()
    rows = torch.arange(len(count), device=count.device).repeat_interleave(count)
    rank = torch.arange(len(rows), device=count.device) - (count.cumsum(0) - count)[rows]
    key = (rows // STRIP * 256 + rank) * STRIP + rows % STRIP
    places = key.argsort()
    return places, rows[places]


def _undone(values: Tensor, order: Tensor) -> Tensor:
    """What `order` would have taken these from."""
    return torch.empty_like(values).index_copy_(0, order, values)


def _ascend(columns: Tensor, counts: Tensor) -> bool:
    """Whether columns, row by row, ascend within each."""
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts.flatten().long())
    later = rows[1:] == rows[:-1]
    return bool((~later | (columns[1:] > columns[:-1])).all())


def _runs(tiles: Tensor, out: Tensor) -> Planes:
    """The planes of outliers."""
    counts = out.sum(2)
    places, runs = _by_row(counts)[0], offsets(counts.sum(1))
    return {
        "counts": counts.to(torch.uint8),
        "columns": out.nonzero()[places, 2].to(torch.uint8),
        "columns_ptr": runs,
        "outliers": tiles[out][places],
        "outliers_ptr": runs.clone(),
    }


register_format(Outlier())
