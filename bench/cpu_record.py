"""What `bench.cpu` measures, as data: written to and read from JSON, with the figures that follow."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.cpu_bounds import Bounds
from bench.cpu_weights import KEPT

LINEAR = "F.linear"
CODED = ("dense", "nv24", "int8 g=128", "int4 g=128", "int4_nv24 g=128", "mosaic of 5")
"""The mixes that the claims speak of."""


@dataclass(frozen=True)
class Facts:
    """One compiled weight.

    Attributes:
        payload: bytes of the canonical planes.
        packed: bytes that the kernel holds beyond them after calls, by its own count.
        scratch: most workspace of a call at any batch measured, in bytes.
        grown: by how much the process grew from before compiling to after calls at every batch.
        creep: by how much it grew between the first round of calls at every batch and the last.
        bytes_per_weight: payload over M x K.
        executors: which executor runs, by batch.
        same_bits: whether products were the same bits at each number of threads, over all batches.
    """

    payload: int
    packed: int
    scratch: int
    grown: int
    creep: int
    bytes_per_weight: float
    executors: dict[str, str]
    same_bits: bool


@dataclass(frozen=True)
class Group:
    """Times that were taken in turn: one weight dtype, number of threads and batch size.

    Attributes:
        bounds: of the host, from the same rounds.
        seconds: median by name: `F.linear`, our mixes, as a user calls them.
        executors: median by name of our mixes' executors alone, with y and workspace at hand.
        peers: median by name, from rounds of their own with `F.linear` in them.
        alone: seconds of `F.linear` before any kernel of ours was built.
        rounds: how many.
    """

    dtype: str
    threads: int
    batch: int
    bounds: Bounds
    seconds: dict[str, float]
    executors: dict[str, float]
    peers: dict[str, float]
    alone: float
    rounds: int

    def has(self, name: str) -> bool:
        """Whether a mix was timed: some are at few batches."""
        return name in self.seconds

    def speedup(self, name: str, over: str = LINEAR) -> float:
        """How many times faster than `F.linear` on the dense weight, or than a peer."""
        other = self.peers[over] if over in self.peers else self.seconds[over]
        return other / self.seconds[name]


@dataclass(frozen=True)
class Skew:
    """Speedup from one thread to all of two mosaics of the same bytes."""

    shape: list[int]
    batch: int
    threads: int
    payload: int
    skewed: float
    uniform: float


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        facts: by dtype and mix.
        absent: peers that were not timed, by dtype and name: why.
        peer_of: the mix whose matrix a peer holds.
    """

    machine: dict[str, Any]
    quick: bool
    shape: list[int]
    threads: list[int]
    batches: list[int]
    groups: list[Group] = field(default_factory=list)
    facts: dict[str, dict[str, Facts]] = field(default_factory=dict)
    absent: dict[str, dict[str, str]] = field(default_factory=dict)
    peer_of: dict[str, str] = field(default_factory=dict)
    skew: list[Skew] = field(default_factory=list)
    elapsed: float = 0.0

    def where(
        self, dtype: str | None = None, threads: int | None = None, batches: tuple[int, ...] | None = None
    ) -> Iterator[Group]:
        """The groups of a dtype, number of threads and some batches; None takes all."""
        for group in self.groups:
            if dtype in (None, group.dtype) and threads in (None, group.threads):
                if batches is None or group.batch in batches:
                    yield group

    def at(self, dtype: str, threads: int, batch: int) -> Group | None:
        """One group, or None where it was not measured."""
        return next(self.where(dtype, threads, (batch,)), None)

    def byte_fraction(self, group: Group, name: str, read: float | None = None, called: bool = False) -> float:
        """Of the byte bound that an executor reaches: payload over the read bandwidth over the time.

        Args:
            read: bytes a second; None takes those from ordinary pages.
            called: of a call `kernel(x)`, with what Python and torch take.
        """
        seconds = group.seconds if called else group.executors
        return self.facts[group.dtype][name].payload / (read or group.bounds.read) / seconds[name]

    def roof_fraction(self, group: Group, name: str, peak: float | None = None) -> float:
        """Of the smaller of the byte bound and a peak of operations a second (None: the host's for the dtype).

        What an executor reaches.

        Only weights that are kept are multiplied.
        """
        operations = 2 * KEPT[name] * self.shape[0] * self.shape[1] * group.batch
        peak = group.bounds.peak(group.dtype) if peak is None else peak
        payload = self.facts[group.dtype][name].payload
        return group.bounds.fraction(payload, operations, peak, group.executors[name])

    def read_bandwidth(self, threads: int) -> float:
        """Median over the groups, in bytes a second."""
        return statistics.median(group.bounds.read for group in self.where(threads=threads))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Record":
        """The inverse of `to_json`; what else stands in the file is not looked at."""
        known = {name: found[name] for name in Record.__dataclass_fields__}
        known["groups"] = [Group(**group | {"bounds": Bounds(**group["bounds"])}) for group in found["groups"]]
        known["facts"] = {
            dtype: {name: Facts(**facts) for name, facts in by_name.items()}
            for dtype, by_name in found["facts"].items()
        }
        known["skew"] = [Skew(**skew) for skew in found["skew"]]
        return Record(**known)
