"""Kernels of the CPU bench: compiled, checked, and what they keep in memory."""

import copy
import ctypes
import gc
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import stoicc
from bench.cpu_peers import TOLERANCE, relative_error
from bench.cpu_record import Facts
from bench.cpu_weights import Weight
from stoicc.calibration_timing import torch_threads

COLD_BYTES = 2 << 30
"""What is read between two visits of the same copy of a weight, at least."""
REPEATS = 2
"""Calls at each batch size between which the process may not grow."""

CHECKED = 8
"""Rows of a batch whose product is compared."""


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the calls in turn, so that each finds its weight out of the cache."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def copies_for(a_round: int) -> int:
    """How many copies of each weight make a visit cold, where a round reads so many bytes; at least 2."""
    return max(2, -(-COLD_BYTES // max(a_round, 1)))


def resident_bytes() -> int:
    """Resident memory of this process, after what is free was given back; 0 where the system does not say."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library: what it holds back counts
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def inputs(batch: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A batch of normal x `[batch, columns]`; the same numbers in every run."""
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)


def measured(
    weight: Weight, columns: int, dtype: str, batches: Sequence[int], threads: Sequence[int]
) -> tuple[stoicc.Kernel, Facts]:
    """A compiled weight that gives right products, and what it and the process hold after calls.

    Raises:
        RuntimeError: a product is wrong; what follows would time an error.
    """
    xs = [inputs(batch, columns, _torch_dtype(dtype)) for batch in batches]
    before = resident_bytes()
    kernel = stoicc.compile(weight)
    for x in xs:
        kernel(x)
    first = resident_bytes()
    for x in xs * REPEATS:
        kernel(x)
    last = resident_bytes()
    stats = kernel.stats()  # before anything asks for a buffer, which would bring all of them back
    kinds = {batch: kernel.schedule.regime(batch) for batch in batches}
    scratch = max(kernel.executor(kinds[len(x)]).workspace_bytes(len(x), x.dtype) for x in xs)
    held = kernel.to_dense()
    for x in (xs[0], xs[len(xs) // 2], xs[-1]):
        error = relative_error(kernel(x)[-CHECKED:], x[-CHECKED:], held)
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{kernel.program.name}, batch {len(x)}: product is wrong by {error:.1e}")
    same = all(_same_bits(kernel, x, threads) for x in xs if kinds[len(x)] == "tiles")
    facts = Facts(
        payload=stats.payload_bytes,
        packed=stats.resident_bytes - stats.payload_bytes,
        scratch=scratch,
        grown=last - before,
        creep=last - first,
        bytes_per_weight=stats.payload_bytes / held.numel(),
        executors={str(batch): kind for batch, kind in kinds.items()},
        same_bits=same,
    )
    return kernel, facts


def copies_of(kernel: stoicc.Kernel, count: int, batches: Sequence[int]) -> list[stoicc.Kernel]:
    """The kernel and copies of it, their executors built for all batches."""
    found = [kernel, *(copy.deepcopy(kernel) for _ in range(count - 1))]
    dtype = _torch_dtype(kernel.program.dtype)
    kinds = {kernel.schedule.regime(batch): batch for batch in reversed(batches)}
    for each in found[1:]:
        for batch in kinds.values():
            each(inputs(batch, each.in_features, dtype))
    return found


def alone(kernel: stoicc.Kernel, x: Tensor) -> Callable[[], object]:
    """A call of the executor that `kernel(x)` comes to, with y and workspace at hand: no work of Python or torch."""
    executor = kernel.executor(kernel.schedule.regime(x.shape[0]))
    out = kernel(x)
    workspace = torch.empty(executor.workspace_bytes(x.shape[0], x.dtype), dtype=torch.uint8)
    return partial(executor.run, x, out, workspace)


def _same_bits(kernel: stoicc.Kernel, x: Tensor, threads: Sequence[int]) -> bool:
    products = []
    for count in threads:
        with torch_threads(count):
            products.append(kernel(x))
    return all(torch.equal(products[0], other) for other in products[1:])


def _torch_dtype(dtype: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
