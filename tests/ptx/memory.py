"""Memory of an emulated kernel: global buffers with bounds and shared memory, which know who touched what and when.

They find what a GPU would not say, whatever order it would have run threads in:

- shared memory: a read of bytes that no finished copy or store has filled; a store or copy to bytes that a copy is on
  its way to; two warps that touch the same bytes without a barrier between them, at least one of them writing;
- global memory: a byte that one program of a launch writes and another reads or writes.

Threads of a warp are taken to run in step.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.ptx.program import EmulationError

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]
Owners = NDArray[np.int32]

FIRST_BASE, GAP = 1 << 32, 1 << 20
NOBODY, SEVERAL = -1, -2
"""Who has touched a byte, where that is not one warp or one program."""


class GlobalMemory:
    """Buffers far apart: an address outside all of them is an error, and so is a byte that two programs share.

    Attributes:
        program: the one that runs.
    """

    def __init__(self) -> None:
        self.program = 0
        self._names: list[str] = []
        self._buffers: list[Bytes] = []
        self._bases: list[int] = []
        self._next = FIRST_BASE
        self._readers: list[Owners] = []
        self._writers: list[Owners] = []

    def begin_launch(self) -> None:
        """What the launches before it wrote is there for all programs."""
        for owners in (*self._readers, *self._writers):
            owners.fill(NOBODY)

    def add(self, name: str, buffer: Bytes) -> int:
        """Its address; kernels read and write the array itself."""
        assert buffer.ndim == 1
        base = self._next
        self._names.append(name)
        self._buffers.append(buffer)
        self._readers.append(np.full(buffer.size, NOBODY, np.int32))
        self._writers.append(np.full(buffer.size, NOBODY, np.int32))
        self._bases.append(base)
        self._next = base + -(-(buffer.size + GAP) // GAP) * GAP
        return base

    def read(self, addresses: Addresses, width: int) -> Bytes:
        """`[threads, width]` bytes."""
        out = np.empty((addresses.size, width), np.uint8)
        for index, chosen, places in self._places(addresses, width):
            self._refuse(self._writers[index][places], index, "read", "written")
            readers = self._readers[index]
            readers[places] = np.where(np.isin(readers[places], (NOBODY, self.program)), self.program, SEVERAL)
            out[chosen] = self._buffers[index][places]
        return out

    def write(self, addresses: Addresses, data: Bytes) -> None:
        """`data` is `[threads, width]`."""
        for index, chosen, places in self._places(addresses, data.shape[1]):
            self._refuse(self._writers[index][places], index, "written", "written")
            self._refuse(self._readers[index][places], index, "written", "read")
            self._writers[index][places] = self.program
            self._buffers[index][places] = data[chosen]

    def _refuse(self, owners: Owners, index: int, now: str, before: str) -> None:
        if ((owners != NOBODY) & (owners != self.program)).any():
            raise EmulationError(
                f"global memory: bytes of {self._names[index]} {now} that another program of the launch has {before}"
            )

    def _places(self, addresses: Addresses, width: int) -> list[tuple[int, NDArray[np.bool_], Addresses]]:
        check_aligned(addresses, width, "global memory")
        index = np.searchsorted(self._bases, addresses, side="right") - 1
        found = []
        for buffer in np.unique(index):
            chosen = index == buffer
            offsets = addresses[chosen] - (self._bases[buffer] if buffer >= 0 else 0)
            if buffer < 0 or (offsets + width > self._buffers[buffer].size).any():
                where = "no buffer" if buffer < 0 else f"{self._names[buffer]} of {self._buffers[buffer].size} bytes"
                raise EmulationError(f"global memory: access of {width} bytes at offset {offsets.max()} of {where}")
            found.append((int(buffer), chosen, offsets[:, None] + np.arange(width)))
        return found


@dataclass
class SharedMemory:
    """Shared memory of one program.

    Attributes:
        epoch: barriers passed.
        valid: bytes that were written and whose copy has arrived.
        coming: bytes that a copy is on its way to.
        written, writer: when and by which warp a byte was written last.
        touched, reader: when and by which warp a byte was read last.
        published: bytes that the asynchronous proxy sees as they are.
    """

    size: int
    epoch: int = 0
    data: Bytes = field(init=False)
    _pending: list[tuple[Addresses, Bytes, Addresses]] = field(default_factory=list)
    _groups: list[list[tuple[Addresses, Bytes, Addresses]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.data = np.full(self.size, 0xFF, np.uint8)
        self.valid = np.zeros(self.size, bool)
        self.coming = np.zeros(self.size, bool)
        self.published = np.zeros(self.size, bool)
        self.written = np.full(self.size, -1, np.int32)
        self.writer = np.full(self.size, -1, np.int16)
        self.touched = np.full(self.size, -1, np.int32)
        self.reader = np.full(self.size, -1, np.int16)

    def barrier(self) -> None:
        """All threads have come this far."""
        self.epoch += 1

    def read(self, addresses: Addresses, width: int, warps: Addresses) -> Bytes:
        """`[threads, width]` bytes; `warps` says which warp each thread is of."""
        places = self._places(addresses, width)
        if not self.valid[places].all():
            raise EmulationError("shared memory: read of bytes that no store or finished copy has filled")
        mine = np.broadcast_to(warps[:, None], places.shape)
        self._refuse((self.written[places] == self.epoch) & (self.writer[places] != mine), "read", "written")
        fresh = self.touched[places] != self.epoch
        self.reader[places[fresh]] = mine[fresh]
        self.reader[places[self.reader[places] != mine]] = SEVERAL
        self.touched[places] = self.epoch
        return self.data[places]

    def write(self, addresses: Addresses, data: Bytes, warps: Addresses) -> None:
        """`data` is `[threads, width]`."""
        places = self._places(addresses, data.shape[1])
        self._claim(places, warps)
        self.data[places] = data
        self.valid[places] = True
        self.published[places] = False

    def copy(self, addresses: Addresses, data: Bytes, warps: Addresses) -> None:
        """Start an asynchronous copy: its bytes may not be read before a wait."""
        places = self._places(addresses, data.shape[1])
        self._claim(places, warps)
        self.valid[places] = self.published[places] = False
        self.coming[places] = True
        self._pending.append((places, data, warps))

    def commit(self) -> None:
        """Close a group of copies."""
        self._groups.append(self._pending)
        self._pending = []

    def wait(self, newest: int) -> None:
        """All groups but the `newest` have arrived, for the threads that started them."""
        while len(self._groups) > newest:
            for places, data, warps in self._groups.pop(0):
                self.data[places] = data
                self.valid[places] = True
                self.coming[places] = False
                self.written[places], self.writer[places] = self.epoch, warps[:, None]

    def publish(self) -> None:
        """`fence.proxy.async`: what has been written so far is there for matrix descriptors."""
        self.published[:] = self.valid

    def read_by_descriptor(self, addresses: Addresses, width: int, warps: Addresses) -> Bytes:
        """As `read`, past the caches of the warps."""
        data = self.read(addresses, width, warps)
        if not self.published[self._places(addresses, width)].all():
            raise EmulationError("shared memory: wgmma reads bytes that no fence.proxy.async has published")
        return data

    def finish(self) -> None:
        """A program ends: nothing may still be on its way into memory that the next one gets."""
        if self._pending or any(self._groups):
            raise EmulationError("shared memory: the program ends while copies are on their way")

    def _claim(self, places: Addresses, warps: Addresses) -> None:
        if self.coming[places].any():
            raise EmulationError("shared memory: bytes written that a copy is on its way to")
        mine = warps[:, None]
        self._refuse((self.written[places] == self.epoch) & (self.writer[places] != mine), "written", "written")
        self._refuse((self.touched[places] == self.epoch) & (self.reader[places] != mine), "written", "read")
        self.written[places], self.writer[places] = self.epoch, mine

    def _places(self, addresses: Addresses, width: int) -> Addresses:
        check_aligned(addresses, width, "shared memory")
        if addresses.size and (addresses.min() < 0 or addresses.max() + width > self.size):
            raise EmulationError(f"shared memory: access of {width} bytes at {addresses.max()} of {self.size}")
        return addresses[:, None] + np.arange(width)

    @staticmethod
    def _refuse(raced: NDArray[np.bool_], now: str, before: str) -> None:
        if raced.any():
            raise EmulationError(f"shared memory: bytes {now} that another warp has {before} since the last barrier")


def check_aligned(addresses: Addresses, width: int, where: str) -> None:
    """EmulationError unless every address is a multiple of the access's width."""
    if (addresses % width).any():
        raise EmulationError(f"{where}: access of {width} bytes at an address that is no multiple of it")
