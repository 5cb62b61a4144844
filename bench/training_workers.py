"""Training runs side by side: a process of one thread for each core, which for so small a model beats threads."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.corpus import Corpus, Split
from bench.training_runs import Run, Setting, runs_of


@dataclass(frozen=True)
class Job:
    """What `runs_of` is given."""

    name: str
    steps: int
    seed: int
    setting: Setting
    corpus: Corpus
    split: Split
    folder: Path | None = None


def jobs_for(
    settings: Mapping[str, Setting], steps: int, seeds: Sequence[int], corpus: Corpus, folder: Path | None = None
) -> list[Job]:
    """Every method with every seed, on held-out text."""
    unread = replace(corpus)  # each process reads the files itself, so they need not be sent
    return [
        Job(name, steps, seed, setting, unread, "held-out", folder)
        for seed in seeds
        for name, setting in settings.items()
    ]


def side_by_side(
    jobs: Sequence[Job], processes: int = 0, wanted: Callable[[Job], bool] = lambda job: True
) -> Iterator[tuple[Job, list[Run], float]]:
    """Each job with its runs and its seconds, as they end; by default in as many processes as there are cores.

    Args:
        wanted: asked whenever a job has ended, of those that have not begun: what is no longer wanted is not run.
    """
    spawn = get_context("spawn")  # a fork would share the state of this process's threads
    with ProcessPoolExecutor(processes or _cores(), spawn, torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(_run, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                if done.cancelled():
                    continue
                for future, job in waiting.items():
                    if not wanted(job):
                        future.cancel()
                runs, seconds = done.result()
                yield waiting[done], runs, seconds
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _run(job: Job) -> tuple[list[Run], float]:
    start = time.perf_counter()
    found = runs_of(job.name, job.steps, job.seed, job.setting, job.corpus, job.split, job.folder)
    return found, time.perf_counter() - start


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
