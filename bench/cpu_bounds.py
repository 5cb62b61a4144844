"""What this host can do at best, measured between the kernels: reading memory, and multiply-adds.

Two arithmetic peaks are taken. `multiply_add` is fp32 multiply-adds in vector registers; `product`
is `F.linear` in bf16 on operands that stay in the cache, which a BLAS gives to the matrix units of
a CPU that has them. Both count 2 operations for a multiply-add.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from stoicc.codegen.cpu.build import instruction_set, load
from stoicc.codegen.cpu.pages import on_huge_pages

READ_BYTES = 1 << 30
"""What a read goes through: more than the last-level cache of today's hosts."""
ROUNDS = 1 << 19
PRODUCT = (2048, 2048, 1024)
"""N, M, K of the bf16 product; its operands take 12 MB."""


@dataclass(frozen=True)
class Bounds:
    """Bytes a second and operations a second, at one number of threads.

    Attributes:
        read: of memory as programs get it, on ordinary pages. This is the byte bound.
        read_large: of memory on large pages, where our kernels keep their weights and `F.linear` does not.
    """

    read: float
    read_large: float
    multiply_add: float
    product: float

    def peak(self, dtype: str) -> float:
        """Operations a second of the fastest units that this host has for a weight dtype."""
        return max(self.multiply_add, self.product) if dtype == "bf16" else self.multiply_add

    def fraction(self, nbytes: float, operations: float, peak: float, seconds: float) -> float:
        """Which part of the smaller of the byte bound and `peak` a call reaches that took so long."""
        return max(nbytes / self.read, operations / peak) / seconds


class Host:
    """The calls that measure the bounds, and what they work on."""

    def __init__(self) -> None:
        self._words = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        self._large = on_huge_pages({"weight": self._words})["weight"]
        self._start = torch.rand(14 * 16) / 2
        n, m, k = PRODUCT
        self._operands = torch.randn(n, k).bfloat16(), torch.randn(m, k).bfloat16()
        torch.ones(8, 8) @ torch.ones(8, 8)  # torch's OpenMP is loaded, for the library to link to
        self.isa = instruction_set()
        self._library = load(Path(__file__).with_suffix(".c").read_text(), "bench_cpu_bounds", self.isa)
        pointer, whole = ctypes.c_void_p, ctypes.c_int64
        self._library.bench_read.argtypes = (pointer, whole, ctypes.c_int)
        self._library.bench_read.restype = ctypes.c_uint64
        self._library.bench_multiply_add.argtypes = (pointer, whole, ctypes.c_int)
        self._library.bench_multiply_add.restype = ctypes.c_float
        self._library.bench_multiply_adds_a_round.restype = whole

    def calls(self, both_reads: bool) -> dict[str, Callable[[], object]]:
        """What to time, by name; each runs on as many threads as torch is set to when called.

        Args:
            both_reads: read by torch's sum as well as by the loop of `cpu_bounds.c`.
        """
        calls: dict[str, Callable[[], object]] = {
            "bound: read": partial(self._read, self._words),
            "bound: read, large pages": partial(self._read, self._large),
            "bound: multiply-add f32": self._multiply_add,
            "bound: product bf16": partial(F.linear, *self._operands),
        }
        return calls | {"bound: torch sum": self._words.sum} if both_reads else calls

    def bounds(self, times: Mapping[str, float], threads: int) -> Bounds:
        """From the seconds of `calls`, by name; the faster of the two reads counts."""
        n, m, k = PRODUCT
        a_round = self._library.bench_multiply_adds_a_round()
        return Bounds(
            READ_BYTES / min(times[name] for name in ("bound: read", "bound: torch sum") if name in times),
            READ_BYTES / times["bound: read, large pages"],
            2 * a_round * ROUNDS * threads / times["bound: multiply-add f32"],
            2 * n * m * k / times["bound: product bf16"],
        )

    def _read(self, words: torch.Tensor) -> int:
        result: int = self._library.bench_read(words.data_ptr(), words.nbytes // 64, torch.get_num_threads())
        return result

    def _multiply_add(self) -> float:
        result: float = self._library.bench_multiply_add(self._start.data_ptr(), ROUNDS, torch.get_num_threads())
        return result
