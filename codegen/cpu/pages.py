"""Memory that a weight is read from on large pages.

A stream over ordinary pages of 4 KB ends at each of them: the hardware does not prefetch past a page, and every
page costs a look-up of its address. On pages of 2 MB a core reads more bytes a second from the same memory
(`docs/performance.md` has the figures). Linux gives them to those who ask, unless the machine's owner said never.
"""

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
"""Bytes of a large page on x86-64, and on Arm with ordinary pages of 4 KB."""
_MADVISE = getattr(mmap, "MADV_HUGEPAGE", None)


def on_huge_pages(plane: Tensor) -> Tensor:
    """A contiguous CPU tensor's copy on large pages; itself where it is smaller than two of them.

    Whole large pages only: what is left at the end stays on ordinary ones, so that the copy takes no
    more memory than the plane did. Where the system has none, the copy is on ordinary pages.
    """
    if _MADVISE is None or plane.nbytes < 2 * HUGE_PAGE:
        return plane
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # what is shared has no large pages
    memory = mmap.mmap(-1, plane.nbytes + HUGE_PAGE, flags)  # the part before the first large page is never touched
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    start = -flat.data_ptr() % HUGE_PAGE
    try:
        memory.madvise(_MADVISE, start, plane.nbytes // HUGE_PAGE * HUGE_PAGE)
    except OSError:  # a kernel built without them
        return plane
    own = flat[start : start + plane.nbytes].view(plane.dtype).view(plane.shape)
    return own.copy_(plane)
