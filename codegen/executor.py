"""What a backend gives: an executor, the thing that multiplies.

A backend is a function of a scheduled module and its pools; it keeps no state of its own but
the build cache. An executor reads the pools it was built with and writes y.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from stoicc.ir.format import Planes, Tile, TileFormat
from stoicc.ir.types import Module

Pools = Mapping[str, Tensor]


class PackedPlanes(ABC):
    """Planes that an executor holds in an order of its own, and can give back as they were.

    Attributes:
        names: of the pools that need not be kept beside it.
        apart: those of them that are read by `pool` alone: they may be kept, and differ, while the others are let go.
    """

    names: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it holds."""

    @abstractmethod
    def whole(self) -> dict[str, Tensor]:
        """The canonical pools in `names`, bit for bit; new tensors."""

    def pool(self, name: str) -> Tensor:
        """One of them."""
        return self.whole()[name]

    def held(self, segment: int) -> Planes | None:
        """The packed planes of a segment as they are; None where it does not hold or show that segment."""
        return None

    @abstractmethod
    def entries(self, segment: int, ranges: Mapping[str, tuple[int, int]]) -> Planes | None:
        """Entries [first, last) of canonical planes of a segment; None where it does not hold that segment."""


class Executor(ABC):
    """One emitted kernel bound to one weight.

    Attributes:
        source: the emitted text (C or Triton), or a line that says there is none.
    """

    source: str = ""

    @abstractmethod
    def run(self, x: Tensor, out: Tensor, workspace: Tensor) -> None:
        """Compute y for a batch of inputs.

        Args:
            x: `[N, K]`, contiguous, on the executor's device, N >= 1.
            out: `[N, M]`, contiguous; every element is written, whatever it held before. Its
                dtype is `output_dtype(weight dtype, x.dtype)`.
            workspace: uint8, at least `workspace_bytes(N, x.dtype)` long, contents undefined.
        """

    def workspace_bytes(self, batch: int, x_dtype: torch.dtype) -> int:
        """Scratch memory that one call needs, in bytes; bounded, and no kernel keeps any for itself."""
        return 0

    def prepared(self, shape: torch.Size, x_dtype: torch.dtype) -> Callable[[Tensor], Tensor | None] | None:
        """`run` for x `[..., K]` of one shape and dtype, with all that depends on them looked up.

        It takes a contiguous x on the executor's device and gives a new y `[..., M]`, or None where what it looked up
        no longer holds: then ask for another. None for executors that look up anew at each call.
        """
        return None

    @property
    def resident_bytes(self) -> int:
        """Bytes that this executor keeps beside the canonical pools (repacked planes)."""
        return 0

    @property
    def transient_bytes(self) -> int:
        """Bytes that a call takes beside its workspace to unpack planes; bounded, and none of it is kept."""
        return 0

    @property
    def packed(self) -> PackedPlanes | None:
        """Planes that it can give back, so that their pools may be let go."""
        return None


class Backend(ABC):
    """Emits executors for one kind of device."""

    name: ClassVar[str]
    device_type: ClassVar[str]
    code: ClassVar[str] = "nothing"
    """What a format gives to have code here, for error messages."""

    def has_code(self, fmt: TileFormat, tile: Tile, dtype: str) -> bool:
        """Whether tiles of this format run here as they are stored."""
        return True

    def reads_sources(self, kind: str) -> bool:
        """Whether executors of a kind keep no pool, but ask a `PlaneSource` for what a call reads."""
        return False

    @property
    def runs_on_cpu(self) -> bool:
        """Whether this backend's executors take CPU tensors in this process."""
        return self.device_type != "cuda"

    @abstractmethod
    def available(self) -> str | None:
        """None where the backend can run here, else one clause that says what is missing."""

    @abstractmethod
    def build(self, module: Module, pools: Pools, kind: str, on_missing: str) -> Executor:
        """An executor of `kind` for a scheduled module.

        Kinds are those of `stoicc.ir.schedule.EXECUTORS`, and "transposed", which needs a transposed schedule: the
        product of the tiles alone with rows h, `[N, M]` in the order of tile rows, as x, and h W, `[N, K]` in
        the order of tile columns and of h's dtype, as out.

        Args:
            module: verified, with a schedule.
            pools: the canonical pools by name, all on one device of `device_type`; they may be a
                `PlaneSource` where `reads_sources(kind)`.
            on_missing: "error" or "dense": what to do with a format that has no code here.
        """

    def dialect(self, module: Module, device: torch.device) -> str:
        """Which of a backend's dialects runs a module's tiles on this device, and why; "" where it has one."""
        return ""

    def emit(self, module: Module, x_dtype: torch.dtype) -> str:
        """The source text of the `tiles` executor: the same text for the same input."""
        return ""
