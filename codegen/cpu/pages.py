"""Memory that a weight is read from on large pages.

A stream over ordinary pages of 4 KB ends at each of them: the hardware does not prefetch past a page, and every
page costs a look-up of its address. On pages of 2 MB a core reads more bytes a second from the same memory
(`docs/performance.md` has the figures). Linux gives them to those who ask, unless the machine's owner said never.
"""

import ctypes
import itertools
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes of a large page on x86-64, and on Arm with ordinary pages of 4 KB."""
_ALIGNMENT = 64
_COLLAPSE = 25
"""Linux 6.1's MADV_COLLAPSE, which the mmap module has no name for."""
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


def collapse(plane: Tensor) -> bool:
    """Move a contiguous CPU tensor to large pages where it is, as far as whole ones are in it; whether that was done.

    For planes that others share. The system takes one large page at a time; one older than Linux 6.1, or one that
    has no large pages, refuses, and the tensor stays as it was.
    """
    start = -(-plane.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    length = (plane.data_ptr() + plane.nbytes - start) // HUGE_PAGE * HUGE_PAGE
    if _MADVISE is None or plane.nbytes < 2 * HUGE_PAGE or length <= 0:
        return False
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None:
        return False
    return bool(advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _COLLAPSE) == 0)
