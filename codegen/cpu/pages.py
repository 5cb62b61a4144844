"""Memory that a weight is read from on large pages.

A stream over ordinary pages of 4 KB ends at each of them: the hardware does not prefetch past a page, and every
page costs a look-up of its address. On pages of 2 MB a core reads more bytes a second from the same memory
(`docs/performance.md` has the figures). Linux gives them to those who ask, unless the machine's owner said never.
"""

import itertools
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes of a large page on x86-64, and on Arm with ordinary pages of 4 KB."""
_ALIGNMENT = 64
_MADVISE = getattr(mmap, "MADV_HUGEPAGE", None)


def on_huge_pages(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of contiguous CPU tensors, side by side on large pages; themselves where all are less than two of them.

    One block for all of them: a scale or an index that a kernel reads beside its codes would otherwise lie on
    ordinary pages, and each of those costs a look-up when a run of tiles begins. Whole large pages only: what is
    left at the end of the block stays on ordinary ones, so that the copies take no more memory than the arrays
    did. Where the system has none, all of it is on ordinary pages.

    Args:
        arrays: emptied on the way, so that one of them at a time is there twice.
    """
    starts = [0, *itertools.accumulate(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values())]
    size = starts.pop()
    if _MADVISE is None or size < 2 * HUGE_PAGE:
        return dict(arrays)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # what is shared has no large pages
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags)  # the part before the first large page is never touched
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    first = -flat.data_ptr() % HUGE_PAGE
    try:
        memory.madvise(_MADVISE, first, size // HUGE_PAGE * HUGE_PAGE)
    except OSError:  # a kernel built without them
        return dict(arrays)
    placed = {}
    for name, start in zip(list(arrays), starts, strict=True):
        array = arrays.pop(name)
        own = flat[first + start : first + start + array.nbytes]
        placed[name] = own.view(array.dtype).view(array.shape).copy_(array)
    return placed
