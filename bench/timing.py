"""Timing on shared, noisy machines: interleaved runs in one process, medians, ratios."""

import random
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], repeats: int = 15, minimum_s: float = 0.0
) -> dict[str, float]:
    """Median seconds of each call, run in turns so that drift of the machine meets all alike.

    Each round has an order of its own: a call that always followed the same one would always find what that left in the
    caches, code of its own or a BLAS's panels.

    Args:
        calls: what to time, by name.
        repeats: rounds; every call runs once in each, after one warm-up round.
        minimum_s: a call shorter than this is repeated inside a round until it is reached.
    """
    inner = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        inner[name] = max(1, round(minimum_s / max(time.perf_counter() - start, 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(repeats):
        for name, call in shuffled.sample(list(calls.items()), len(calls)):
            start = time.perf_counter()
            for _ in range(inner[name]):
                call()
            times[name].append((time.perf_counter() - start) / inner[name])
    return {name: statistics.median(values) for name, values in times.items()}
