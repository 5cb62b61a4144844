"""SIMD lane order: how a format's planes are laid out for its C code.

Sixteen rows of a tile are a *strip*, one row a lane. A plane `[entries, BM, C]` becomes
`[entries, strips, C, 16]`, so that the C code reads one vector of rows per column. Rows are
padded with zeros to a multiple of 16.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 16


def strips(rows: int) -> int:
    """Strips of 16 rows that cover a tile of this many rows."""
    return -(-rows // LANES)


def to_lanes(plane: Tensor, columns: int | None = None) -> Tensor:
    """`[entries, BM, C]` -> `[entries, strips, C, 16]`, rows (and columns, if given) padded with zeros."""
    entries, rows, count = plane.shape
    columns = count if columns is None else columns
    if plane.dtype.is_floating_point:  # pad moves bits, never values
        return to_lanes(plane.view(_SAME_WIDTH[plane.dtype]), columns).view(plane.dtype)
    padded = pad(plane, (0, columns - count, 0, strips(rows) * LANES - rows))
    return padded.view(entries, strips(rows), LANES, columns).transpose(2, 3).contiguous()


def to_pairs(vectors: Tensor) -> Tensor:
    """Vectors `[entries, strips, C, 16]`, C even, in the order of `vf_pair_<dtype>`.

    bf16 vectors 2i and 2i + 1 are interleaved: one 32-bit word holds both of a lane.
    """
    if vectors.dtype != torch.bfloat16:
        return vectors
    return vectors.unflatten(2, (-1, 2)).transpose(3, 4).contiguous()


def from_lanes(packed: Tensor, rows: int, columns: int | None = None) -> Tensor:
    """The inverse of `to_lanes`: `[entries, strips, C, 16]` -> `[entries, rows, columns]`, padding left out."""
    flat = packed.transpose(2, 3).flatten(1, 2)
    kept = flat[:, :rows, : flat.shape[2] if columns is None else columns]
    return kept.clone(memory_format=torch.contiguous_format)  # of one column too, which `contiguous` leaves as it is


def from_paired_lanes(packed: Tensor, rows: int, columns: int) -> Tensor:
    """`[entries, strips, C, 16]` in the order of `to_pairs` -> `[entries, rows, columns]`."""
    if packed.dtype != torch.bfloat16:
        return from_lanes(packed, rows, columns)
    pairs = packed.shape[2:].numel() // (2 * LANES)
    words = packed.view(*packed.shape[:2], pairs, 2 * LANES).view(torch.int32)  # both columns of a row move as one
    return from_lanes(words, rows).view(torch.bfloat16)[:, :, :columns].contiguous()


_SAME_WIDTH = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
