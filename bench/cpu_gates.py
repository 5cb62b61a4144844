"""The claims that the project made for its CPU executors, each with its figure in a record."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.cpu_record import CODED, LINEAR, Group, Record

LARGE = 64
"""Batch from which no mix may be slower than 0.95 of `F.linear`, tile by tile or decoded for the BLAS."""


@dataclass(frozen=True)
class Gate:
    """One claim.

    Attributes:
        claim: its number in the project's list, and what it says.
        figure: the worst that was measured; None where nothing was.
        worst: where that was.
        target: what the figure must reach, or may not exceed.
        at_most: the target is a ceiling.
    """

    claim: str
    figure: float | None
    worst: str
    target: float
    at_most: bool = False

    @property
    def held(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure <= self.target if self.at_most else self.figure >= self.target

    def to_json(self) -> dict[str, object]:
        return {**self.__dict__, "held": self.held}


def gates(record: Record) -> list[Gate]:
    """Every claim that a record can answer, in the order of the list."""
    return [*_decode(record), *_middle(record), *_large(record), *_memory(record), *_threads(record), *_alone(record)]


Figures = Iterable[tuple[float, str]]


def _gate(claim: str, figures: Figures, target: float, at_most: bool = False) -> Gate:
    found = list(figures)
    if not found:
        return Gate(claim, None, "not measured", target, at_most)
    figure, where = max(found) if at_most else min(found)
    return Gate(claim, figure, where, target, at_most)


def _decode(record: Record) -> Iterator[Gate]:
    """1: the byte bound at batch 1."""
    for dtype in record.facts:
        for threads in record.threads:
            groups = list(record.where(dtype, threads, (1,)))
            for name in _coded(record, dtype):
                yield _gate(
                    f"1 batch 1, {dtype}, {_threads_text(threads)}: {name}, of the byte bound",
                    ((record.byte_fraction(group, name), _place(group, name)) for group in groups),
                    0.85,
                )
            pair = [group for group in groups if {"nv24", "bitmap 50%"} <= group.seconds.keys()]
            if pair:
                yield _gate(
                    f"batch 1, {dtype}, {_threads_text(threads)}: bitmap at 50%, over nv24",
                    ((group.speedup("bitmap 50%", "nv24"), _place(group, "bitmap 50%")) for group in pair),
                    0.85,
                )


def _middle(record: Record) -> Iterator[Gate]:
    """1: the smaller of the byte bound and the multiply-add peak at batch 4 to 16."""
    for dtype in record.facts:
        names = _coded(record, dtype)
        for threads in record.threads:
            groups = list(record.where(dtype, threads, (4, 8, 16)))
            where = f"batch 4-16, {dtype}, {_threads_text(threads)}"
            yield _gate(
                f"1 {where}: of min(byte bound, peak of the host)",
                ((record.roof_fraction(g, name), _place(g, name)) for g in groups for name in names),
                0.6,
            )
            if dtype == "bf16":
                yield _gate(
                    f"1 {where}: of min(byte bound, fp32 multiply-adds in vectors)",
                    (
                        (record.roof_fraction(g, name, g.bounds.multiply_add), _place(g, name))
                        for g in groups
                        for name in names
                    ),
                    0.6,
                )


def _large(record: Record) -> Iterator[Gate]:
    """2: sparsity that pays, int4 up to 32, and large batches, decoded for the BLAS or not."""
    most = record.threads[-1]
    for dtype, target in (("f32", 1.4), ("bf16", 1.1)):
        groups = list(record.where(dtype, most, (64,)))
        yield _gate(f"2 batch 64: nv24 over F.linear, {dtype}", _speedups(groups, ("nv24",)), target)
    groups = [group for group in record.where("bf16", most) if group.batch <= 32]
    yield _gate("2 batch 1-32: int4 over F.linear, bf16", _speedups(groups, ("int4 g=128",)), 1.0)
    for dtype in record.facts:
        yield _gate(
            f"2 from batch {LARGE} on: every mix over F.linear, {dtype}",
            (
                (group.speedup(name), _place(group, name))
                for group in record.where(dtype, most)
                for name in _coded(record, dtype)
                if group.batch >= LARGE
            ),
            0.95,
        )


def _memory(record: Record) -> Iterator[Gate]:
    """2: payload and scratch are all that is resident."""
    facts = [(dtype, name, fact) for dtype, by_name in record.facts.items() for name, fact in by_name.items()]
    yield _gate(
        "2 resident after calls, over payload and scratch",
        ((fact.grown / (fact.payload + fact.scratch), f"{name}, {dtype}") for dtype, name, fact in facts),
        1.1,
        at_most=True,
    )
    yield _gate(
        "2 growth over repeated calls, in MB",
        ((fact.creep / 1e6, f"{name}, {dtype}") for dtype, name, fact in facts),
        8.0,
        at_most=True,
    )


def _threads(record: Record) -> Iterator[Gate]:
    """3: skewed work scales as uniform work does, and threads do not change a bit."""
    if record.threads[-1] > 1:
        yield _gate(
            f"3 speedup from 1 to {record.threads[-1]} threads, skewed over uniform",
            ((skew.skewed / skew.uniform, f"batch {skew.batch}") for skew in record.skew),
            0.95,
        )
    yield _gate(
        "3 the same bits for any number of threads (1 yes, 0 no)",
        (
            (float(fact.same_bits), f"{name}, {dtype}")
            for dtype, by_name in record.facts.items()
            for name, fact in by_name.items()
        ),
        1.0,
    )


def _alone(record: Record) -> Iterator[Gate]:
    """1: F.linear is not slowed down by the company of our kernels."""
    yield _gate(
        "1 F.linear between our kernels, over its time alone",
        ((group.seconds[LINEAR] / group.alone, _place(group, LINEAR)) for group in record.groups),
        1.15,
        at_most=True,
    )


def _coded(record: Record, dtype: str) -> list[str]:
    return [name for name in CODED if name in record.facts[dtype]]


def _speedups(groups: Iterable[Group], names: tuple[str, ...]) -> Figures:
    return ((group.speedup(name), _place(group, name)) for group in groups for name in names if group.has(name))


def _place(group: Group, name: str) -> str:
    return f"{name}, {group.dtype}, batch {group.batch}, {_threads_text(group.threads)}"


def _threads_text(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"
