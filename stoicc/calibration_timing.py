"""How `calibration.py` times a kernel on a machine that does other things as well: the least of a few visits.

Whatever else a machine does only ever adds to a time, so the lower quartile of repeated calls stands for a visit.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.kernel import Kernel
from stoicc.passes.cost_cpu import Curve

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batches at which tiles are measured."""

VISITS = 3
_REPEATS, _SAMPLE_S = 5, 1e-4


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's number of threads within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_seconds(kernel: Kernel, batch: int) -> float:
    """Seconds of `kernel(x)`, its weight in cache."""
    x: Tensor = torch.ones(batch, kernel.in_features, dtype=TORCH_DTYPES[kernel.program.dtype])
    with torch.no_grad():
        return seconds_of(lambda: kernel(x))


def by_batch(kernel: Kernel) -> Curve:
    """Seconds of `kernel(x)` by batch, on one thread: the least of several visits some time apart."""
    times: dict[int, float] = {}
    with torch_threads(1):
        for _ in range(VISITS):
            for batch in BATCHES:
                times[batch] = min(run_seconds(kernel, batch), times.get(batch, np.inf))
    return times


def least_seconds(kernel: Kernel, batch: int, visits: int = 3 * VISITS) -> float:
    """Seconds of `kernel(x)` at torch's number of threads: the least of several visits."""
    return min(run_seconds(kernel, batch) for _ in range(visits))


def out_of_cache(kernel: Kernel, batch: int, other: Tensor) -> float:
    """Seconds of `kernel(x)` after `other` has been read."""
    x = torch.ones(batch, kernel.in_features, dtype=TORCH_DTYPES[kernel.program.dtype])
    samples = []
    with torch.no_grad():
        for _ in range(_REPEATS + 2):
            other.sum()
            start = time.perf_counter()
            kernel(x)
            samples.append(time.perf_counter() - start)
    return float(np.quantile(samples[2:], 0.25))


def seconds_of(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The lower quartile of repeated times: what else the machine does only ever adds."""
    call()
    start = time.perf_counter()
    call()
    inner = max(1, round(_SAMPLE_S / max(time.perf_counter() - start, 1e-9)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        samples.append((time.perf_counter() - start) / inner)
    return float(np.quantile(samples, 0.25))
