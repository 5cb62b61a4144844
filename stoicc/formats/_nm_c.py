"""Lane order of 2:4 positions, for the CPU backend."""

import torch
from torch import Tensor

from stoicc.codegen.cpu.lanes import to_lanes


def position_words(positions: Tensor, scales: int) -> Tensor:
    """2:4 positions u8 `[entries, BM, C / 8]` -> int32 `[entries, strips, words, 16]`, 32 columns a word.

    Byte i of a word holds groups of four i (bits 0-3) and i + 4 (bits 4-7), the first kept column of
    a group in the lower two bits. Each of the `scales` groups of columns begins a word of its own.
    """
    nibbles = torch.stack((positions & 15, positions >> 4), -1).flatten(2).unflatten(2, (scales, -1))
    nibbles = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[3] % 8)).unflatten(3, (-1, 2, 4))
    words = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    return to_lanes(words.contiguous().view(torch.int32).flatten(2))
