"""A stopwatch for kernels: interleaved calls, on cold weights, on the CPU and on a GPU."""

import itertools
import os
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

UNKNOWN_CACHE = 64 << 20
"""Bytes of the last cache of a CPU that does not tell."""


@dataclass(frozen=True)
class Call:
    """What is timed.

    Attributes:
        run: the function.
        threads: CPU threads that it runs with; None leaves them as they are.
    """

    run: Callable[[], object]
    threads: int | None = None


class Stopwatch:
    """Times calls in turn, so that drift of the machine meets all alike.

    Replace it by a subclass to tune with times of your own (a simulator's, a test's).

    Attributes:
        device: where the calls run.
        between: called before each round, outside of all times; see `Ballast`.
    """

    def __init__(self, device: torch.device | None = None, between: Callable[[], object] | None = None) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.between = between

    def now(self) -> float:
        """Seconds on a clock that only goes forward: what budgets are kept by."""
        return time.perf_counter()

    def samples(self, calls: Mapping[Key, Call], rounds: int) -> dict[Key, list[float]]:
        """Seconds of each call in each of `rounds` rounds; every round makes every call once.

        The order turns from round to round, so that no call always follows the same one.
        """
        times: dict[Key, list[float]] = {key: [] for key in calls}
        before = torch.get_num_threads()
        keys = list(calls)
        try:
            for turn in range(rounds):
                first = turn % len(keys)
                if self.between is not None:
                    self.between()
                    calls[keys[first]].run()  # the code and the threads wake up, at the cost of no one's time
                for key in keys[first:] + keys[:first]:
                    call = calls[key]
                    torch.set_num_threads(before if call.threads is None else call.threads)
                    times[key].append(self._once(call.run))
        finally:
            torch.set_num_threads(before)
        return times

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _once(self, run: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def cache_bytes(device: torch.device) -> int:
    """Bytes of the device's last cache: what a weight must exceed to be read from memory on every call."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [_parsed(file) for file in folder.glob("index*/size")] if folder.is_dir() else []
    return max(sizes, default=UNKNOWN_CACHE)


class Ballast:
    """Memory that is read a part at a time, to displace from the cache what was read long enough ago.

    Where every call has `parts` copies of its weight and takes them in turn, reading a part between
    rounds makes each copy as cold as reading all of it between two calls would, `parts` times as
    fast; and what a program keeps warm from call to call (its code, x) stays so.

    Args:
        nbytes: of all parts together; more than the cache holds.
    """

    def __init__(self, device: torch.device, nbytes: int, parts: int) -> None:
        # ones: untouched zeros are one page of memory, seen at every address
        self._memory = torch.ones(max(nbytes // 8, parts), dtype=torch.int64, device=device)
        self._parts = itertools.cycle(self._memory.chunk(parts))

    def __call__(self) -> torch.Tensor:
        return next(self._parts).sum()


def memory_bytes(device: torch.device) -> int:
    """Bytes of memory of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not every system says
        return 4 << 30


def _parsed(file: Path) -> int:
    """Bytes from a text such as `32K`."""
    text = file.read_text().strip()
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * scale if digits.isdigit() else 0
