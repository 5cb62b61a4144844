"""Checks of the GPU bench in processes of their own: they compile side by side, and one that leaves its device unusable
(an address out of range ends every later launch of a process) spoils no other."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Found = TypeVar("Found")


def side_by_side() -> int:
    """Processes at a time on this machine: compiling takes most of a check, so a core each but one."""
    return max(1, min(12, (os.cpu_count() or 1) - 1))


def outcomes(
    cases: Mapping[str, Callable[[], Found]], jobs: int, deadline: float
) -> Iterator[tuple[str, Found | Exception | None]]:
    """What each case returned or raised, in order; None for one that had not begun at the deadline.

    Args:
        cases: by name; functions that can be pickled where jobs > 1.
        jobs: processes at a time, one for each case; 1: all in this process.
        deadline: of `time.monotonic`.
    """
    if jobs == 1:
        for name, case in cases.items():
            yield name, _outcome(case) if time.monotonic() < deadline else None
        return
    context = multiprocessing.get_context("spawn")  # a device that was used cannot be forked
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {name: pool.submit(case) for name, case in cases.items()}
        for name, future in futures.items():
            wait([future], max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:  # those that have begun are waited for: they would disturb what is timed
                for other in futures.values():
                    other.cancel()
            outcome = None if future.cancelled() else _outcome(future.result)
            if isinstance(outcome, BrokenProcessPool):  # some process died, and those of all others with it
                with ProcessPoolExecutor(1, mp_context=context) as own:
                    outcome = _outcome(own.submit(cases[name]).result)
            yield name, outcome


def _outcome(case: Callable[[], Found]) -> Found | Exception:
    try:
        return case()
    except Exception as error:  # the others are still to be run
        return error
