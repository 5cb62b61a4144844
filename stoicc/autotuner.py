"""`stoicc.autotune`: search schedules under a budget, measure, and remember the best."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stoicc.compiler import compile
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, output_dtype
from stoicc.ir.errors import CodegenError, InputError, StoiccError
from stoicc.ir.schedule import EVERYWHERE, Regime
from stoicc.ir.types import Module
from stoicc.kernel import Kernel
from stoicc.ops.graph import CompressedWeight
from stoicc.passes import default_pipeline
from stoicc.passes.cost_model import CostModel
from stoicc.passes.reorder_rows import ReorderRows
from stoicc.pools import TiledWeight
from stoicc.retile import fixed_tile, retile
from stoicc.targets import backend_for, backend_named
from stoicc.timing import Ballast, Stopwatch, cache_bytes, memory_bytes
from stoicc.tuning_result import TuningResult, with_kernel
from stoicc.tuning_search import RANK_BY, Search
from stoicc.tuning_space import Space, Tile
from stoicc.tuning_store import Key, TuningStore, key_of
from stoicc.weights import FormatLike

ROUNDS = 150
"""About how many rounds are timed in one tuning: what decides whether cold weights are affordable."""
COPIES = (1, 2, 4, 8)
"""How many copies of a kernel may be called in turn."""


def autotune(
    weight: Any,
    batch_sizes: Sequence[int] = (1, 16, 64),
    space: Space | None = None,
    budget_s: float = 20.0,
    *,
    x_dtype: torch.dtype | None = None,
    formats: Sequence[FormatLike] | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    target: str = "auto",
    on_missing: str = "error",
    name: str = "weight",
    keep: int = 6,
    cold: bool | None = None,
    progress: bool = True,
    fresh: bool = False,
    store: TuningStore | None = None,
    model: CostModel | None = None,
    stopwatch: Stopwatch | None = None,
) -> TuningResult:
    """Find the schedule of a weight that is fastest on this device.

    Every schedule of the space is ranked by the cost model; the best few are built, their outputs
    held against the default's, and raced: interleaved rounds, medians, the slower half leaves.
    Of schedules that tie the one nearest to the default wins. What was found is remembered on disk,
    and found again without measuring.

    Args:
        weight: what `stoicc.compile` takes. The tile shape varies for a weight, and for a kernel or an
            inspected weight without quantized codes; else it stays, and a note says why.
        batch_sizes: rows of x to tune for; one schedule serves all, with an executor for each.
        space: what may vary; default `Space.of(backend)`. Edit it with `dataclasses.replace`.
        budget_s: seconds that all of it may take, compiling included. What the cost model does not know yet
            (this device, a format at a tile shape) is measured once and beyond the budget.
        x_dtype: of the inputs; default: the weight's.
        formats, bias, activation, target, on_missing, name: see `stoicc.compile`.
        keep: how many schedules per batch size are built, beside the default.
        cold: read weights from memory, not from a cache, by calling copies of a kernel in turn and
            displacing the cache between rounds; default: where a weight would stay in the cache, and
            memory and budget afford it.
        progress: show a progress bar on stderr, where that is a terminal.
        fresh: tune anew, whatever is remembered.
        store: where results are remembered; default: the user's cache folder for stoicc.
        model: ranks schedules; default: `stoicc.cost_model` of the target.
        stopwatch: measures; one of your own sees to cold weights itself.

    Raises:
        InputError: options that cannot be used, or a target with nothing to tune.
    """
    watch = stopwatch or Stopwatch()
    started = watch.now()
    _check(budget_s, keep, space)
    batch_sizes = _batches(batch_sizes)
    subject = Subject(weight, formats, bias, activation, target, on_missing, name)
    backend = backend_for(subject.default.target, subject.default.device.type).name
    if backend == "reference":
        raise InputError("autotune: expected a backend that emits code, found reference; tune for 'cpu' or 'cuda'")
    space = Space.of(backend) if space is None else space
    dtype = TORCH_DTYPES[subject.default.program.dtype] if x_dtype is None else x_dtype
    output_dtype(subject.default.program.dtype, dtype)  # refuses a dtype that no kernel takes

    store = store or TuningStore()
    tiles = subject.tiles(space)
    key = _key(subject.default, batch_sizes, dtype, backend, repr((space, tiles)))
    remembered = None if fresh else _recall(store, key, budget_s)
    if remembered is not None:
        kernel = subject.compile(remembered.tile, remembered.pipeline)
        return with_kernel(remembered, kernel, remembered=True)

    with _shown(progress, budget_s, watch, started) as report:
        report("preparing")
        copies = 1
        if stopwatch is None:
            watch, copies = _coldly(subject, budget_s, keep, cold)
        before = watch.now()
        model = model or _model(backend)
        started += watch.now() - before  # a device is measured once, for all that is tuned on it
        started += _acquaint(model, subject, tiles, DTYPE_NAMES[dtype], watch, started + RANK_BY * budget_s)
        search = Search(
            subject.kernel,
            space.structures(default_pipeline(backend), tiles, torch.get_num_threads(), subject.reorderable),
            space.executors,
            subject.default,
            batch_sizes,
            dtype,
            model,
            watch,
            started,
            budget_s,
            keep,
            copies,
            report,
        )
        plan, trials = search.run()
        pipeline = plan.structure.pipeline(plan.crossover)
        kernel = subject.compile(plan.structure.tile, pipeline)
    program = kernel.program
    result = TuningResult(
        program.name,
        program.shape,
        program.dtype,
        DTYPE_NAMES[dtype],
        backend,
        batch_sizes,
        plan.structure.tile,
        pipeline,
        max(plan.structure.threads, torch.get_num_threads()),
        trials,
        len(search.predicted),
        watch.now() - started,
        float(budget_s),
        (*subject.notes, *search.notes),
    )
    _remember(store, key, result)
    return with_kernel(result, kernel, remembered=False)


class Subject:
    """What is tuned: a weight that can be compiled at several tile shapes, each cut once.

    Attributes:
        default: the kernel that `stoicc.compile` makes.
        notes: why tile shapes were left out.
    """

    def __init__(
        self,
        weight: Any,
        formats: Sequence[FormatLike] | None,
        bias: Tensor | None,
        activation: str | None,
        target: str,
        on_missing: str,
        name: str,
    ) -> None:
        self._weight = weight
        self._placing: dict[str, Any] = {"target": target, "on_missing": on_missing}
        if isinstance(weight, Kernel):
            self._placing = {"target": weight.target if target == "auto" else target, "on_missing": weight.on_missing}
        self._cutting: dict[str, Any] = {"formats": formats, "bias": bias, "activation": activation, "name": name}
        self.default = compile(weight, **self._cutting, **self._placing)
        self._backend = backend_for(self.default.target, self.default.device.type).name
        self._kernels: dict[tuple[Tile, bool], Kernel] = {(self.default.program.tile, False): self.default}
        self.notes: list[str] = []

    def tiles(self, space: Space) -> tuple[Tile, ...]:
        """The weight's own tile shape, then those of the space that it can be cut in."""
        own = self.default.program.tile
        reason = self._fixed()
        others = [tile for tile in dict.fromkeys(space.tiles) if tile != own]
        if reason is not None and others:
            self.notes.append(f"tile {own[0]}x{own[1]} stays: {reason}")
            return (own,)
        return (own, *others)

    @property
    def reorderable(self) -> bool:
        """Whether rows can still be reordered: tiles of an inspected weight are made."""
        return not isinstance(self._weight, (Kernel, TiledWeight)) and self._fixed() is None

    def kernel(self, tile: Tile, reordered: bool = False) -> Kernel:
        """The weight at a tile shape, its rows reordered where that pays, with the default schedule.

        Raises:
            StoiccError: it cannot be cut so, or a format has no code for it there.
        """
        if (tile, reordered) not in self._kernels:
            if isinstance(self._weight, (Kernel, TiledWeight)):
                made = compile(retile(self._weight, tile), **self._placing)
            else:
                passes = default_pipeline(self._backend)
                passes = replace(passes, passes=(ReorderRows(), *passes.passes)) if reordered else passes
                made = compile(self._weight, tile=tile, pipeline=passes, **self._cutting, **self._placing)
            self._kernels[tile, reordered] = made
        return self._kernels[tile, reordered]

    def compile(self, tile: Tile, pipeline: str) -> Kernel:
        """The weight at a tile shape, scheduled by a pipeline; the pools are shared."""
        reordered = pipeline.startswith(ReorderRows.name)
        return compile(self.kernel(tile, reordered), pipeline=pipeline, **self._placing)

    def _fixed(self) -> str | None:
        """Why the tile shape cannot change, or None."""
        if isinstance(self._weight, (Kernel, TiledWeight)):
            return fixed_tile(self.default.program)
        if isinstance(self._weight, CompressedWeight) and self._weight.tile is not None:
            return "operators chose what to do tile by tile"
        return None


def _check(budget_s: float, keep: int, space: Space | None) -> None:
    if not isinstance(budget_s, (int, float)) or not 0 < budget_s < 1e6:
        raise InputError(f"autotune: expected budget_s to be seconds above 0, found {budget_s!r}; for example 20")
    if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
        raise InputError(f"autotune: expected keep from 1, found {keep!r}; 6 builds six schedules a batch size")
    if space is not None and not isinstance(space, Space):
        raise InputError(f"autotune: expected a stoicc.Space, found {type(space).__name__}; edit stoicc.Space()")


def _batches(batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Batch sizes in ascending order, each once, or InputError."""
    sizes = list(batch_sizes) if isinstance(batch_sizes, (list, tuple, range)) else []
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in sizes)
    if not sizes or not whole:
        raise InputError(f"autotune: expected batch_sizes from 1, found {batch_sizes!r:.60}; for example [1, 16, 64]")
    return tuple(sorted(set(sizes)))


def _model(backend: str) -> CostModel:
    from stoicc.device_constants import cost_model

    return cost_model(backend)


def _acquaint(
    model: CostModel, subject: Subject, tiles: Sequence[Tile], x_dtype: str, watch: Stopwatch, until: float
) -> float:
    """Let the model meet the formats at each tile shape; the seconds that it takes to measure those it does not know.

    They are measured once for a device, so no budget pays for them, and no tile shape is left out for them.
    """
    spent = 0.0
    for tile in tiles:
        if watch.now() - spent > until:
            break  # cutting the weight alone takes long
        try:
            module = subject.kernel(tile).ir
        except StoiccError:
            continue  # the search says why
        before = watch.now()
        assert module.schedule is not None  # a kernel has one
        for executor in EVERYWHERE:
            shaped = Module(module.tiles, replace(module.schedule, regimes=(Regime(executor),)))
            model.predict(shaped, 1, x_dtype, torch.get_num_threads())
        spent += watch.now() - before
    return spent


def _key(kernel: Kernel, batch_sizes: Sequence[int], dtype: torch.dtype, backend: str, searched: str) -> Key:
    code = backend_named(backend).emit(kernel.ir, dtype)
    return key_of(kernel, code, batch_sizes, DTYPE_NAMES[dtype], backend, searched)


def _recall(store: TuningStore, key: Key, budget_s: float) -> TuningResult | None:
    """What was tuned before with no smaller a budget; a store that cannot be read has nothing."""
    try:
        found = store.read(key)
    except CodegenError as error:
        warnings.warn(f"{error}", RuntimeWarning, stacklevel=3)
        return None
    return found if found is not None and found.budget_s >= budget_s else None


def _remember(store: TuningStore, key: Key, result: TuningResult) -> None:
    """Write to the store; what was tuned is good even where it cannot be written down."""
    try:
        store.write(key, result)
    except CodegenError as error:
        warnings.warn(f"{error}", RuntimeWarning, stacklevel=3)


def _coldly(subject: Subject, budget_s: float, keep: int, cold: bool | None) -> tuple[Stopwatch, int]:
    """A stopwatch, and how many copies of each kernel it takes, so that weights are read from memory.

    A weight that would stay in the cache is copied, and more is read between rounds: see `Ballast`.
    """
    kernel = subject.default
    device, cache = kernel.device, cache_bytes(kernel.device)
    stats = kernel.stats()
    weight = stats.payload_bytes + stats.beside_bytes
    if cold is False or weight >= 2 * cache:
        return Stopwatch(device), 1
    displaced, room = cache + cache // 4, memory_bytes(device) // 8
    # canonical planes, and the copy in the order of lanes
    fitting = [copies for copies in COPIES if 2 * weight * copies * (keep + 1) <= room]
    if cold is None and (displaced > room or not fitting):
        subject.notes.append("weights were warm: too little memory for copies; cold=True makes them all the same")
        return Stopwatch(device), 1
    copies = max(fitting, default=1)
    ballast, clock = Ballast(device, displaced, copies), Stopwatch(device)
    ballast()
    before = clock.now()
    ballast()
    clock.settle()
    if cold is None and (clock.now() - before) * ROUNDS > budget_s / 3:
        subject.notes.append("weights were warm: emptying the cache would take most of the budget; cold=True does it")
        return Stopwatch(device), 1
    return Stopwatch(device, ballast), copies


@contextmanager
def _shown(progress: bool | None, budget_s: float, watch: Stopwatch, started: float) -> Iterator[Callable[[str], None]]:
    """A function that is told each stage: a progress bar over the budget, or silence."""
    if not progress or not sys.stderr.isatty():
        yield lambda stage: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tuning", total=budget_s)
        yield lambda stage: bar.update(task, description=stage, completed=watch.now() - started)
