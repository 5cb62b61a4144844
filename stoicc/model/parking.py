"""Dense weights whose layers were replaced wait in files, out of memory, until nobody can want them back."""

import ctypes
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

SLACK_BYTES = 4 << 20
"""Dense weights that are freed before the system is given their memory back, which takes milliseconds."""


class Parking:
    """Keeps the values of parameters in files without a name, which vanish with the last mapping, whatever happens.

    Args:
        folder: on a disk; default: the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parked: list[tuple[weakref.ref[Tensor], torch.device]] = []
        self._waiting = 0

    @torch.no_grad()
    def park(self, weight: Tensor) -> None:
        """Move values to a file and map them from there; they stay readable, and the same bits.

        A weight that is part of a larger storage stays where it is, as does one for which there is no room.
        """
        if weight.numel() == 0 or weight.untyped_storage().nbytes() != weight.nbytes or not weight.is_contiguous():
            return
        try:
            mapped = _mapped(weight.detach(), self._folder)
        except (OSError, RuntimeError):
            return
        self._parked.append((weakref.ref(weight), weight.device))
        self._waiting += weight.nbytes
        weight.data = mapped
        if self._waiting > SLACK_BYTES:
            self._waiting = 0
            _trim()

    @torch.no_grad()
    def fetch(self) -> None:
        """Bring the values that somebody still holds back to where they were."""
        while self._parked:
            reference, device = self._parked.pop()
            weight = reference()
            if weight is not None:
                weight.data = weight.detach().to(device, copy=True)


def _trim() -> None:
    """Return free memory to the system: glibc keeps what large tensors left once it has seen some come and go.

    Other C libraries have no malloc_trim.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _mapped(values: Tensor, folder: Path | None) -> Tensor:
    """A copy of `values` in a file that has no name any more."""
    own = values.cpu()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="stoicc-dense-") as file:
        own.view(-1).view(torch.uint8).numpy().tofile(file)
        file.flush()
        flat = torch.from_file(file.name, shared=False, size=own.numel(), dtype=own.dtype)
    return flat.view(own.shape)
