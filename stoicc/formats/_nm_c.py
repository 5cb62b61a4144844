"""Lane order of 2:4 positions, for the CPU backend."""

import torch
from torch import Tensor

from stoicc.codegen.cpu.lanes import to_lanes


def position_words(positions: Tensor) -> Tensor:
    """2:4 positions u8 `[entries, BM, C / 8]` -> int32 `[entries, strips, C / 2]`.

    One word per kept column: bits 2i and 2i + 1 are the position of row i of the strip.
    """
    fields = torch.stack([positions >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(2)
    lanes = to_lanes(fields)
    quads = lanes[..., 0::4] | lanes[..., 1::4] << 2 | lanes[..., 2::4] << 4 | lanes[..., 3::4] << 6
    return quads.contiguous().view(torch.int32).flatten(2)
