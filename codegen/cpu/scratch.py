"""Workspaces that one call leaves to the next: the same memory, of whatever kernel, which is still near."""

import torch
from torch import Tensor

ALIGNMENT = 64
LARGEST = 1 << 20
"""Bytes up to which a workspace is kept."""
_free: list[Tensor] = []
"""Those of calls that have ended; as many as there were calls at a time. Lists can be shared by threads."""


def take(nbytes: int) -> Tensor:
    """Uint8 memory of at least so many bytes, contents undefined."""
    if nbytes > LARGEST:
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        return _free.pop()
    except IndexError:
        return torch.empty(LARGEST, dtype=torch.uint8)


def give(workspace: Tensor) -> None:
    """For a later call, if it is of the size that is kept."""
    if workspace.numel() == LARGEST:
        _free.append(workspace)
