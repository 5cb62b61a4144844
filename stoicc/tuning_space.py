"""The space that the autotuner searches: a dataclass of axes, which users edit with `dataclasses.replace`."""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from stoicc.ir.errors import InputError, StoiccError
from stoicc.ir.options import is_whole
from stoicc.ir.schedule import EVERYWHERE, LAUNCH
from stoicc.passes import Pass, Pipeline, parse_pass
from stoicc.passes.launch import Launch
from stoicc.passes.reorder_rows import ReorderRows
from stoicc.tiling import check_tile

Tile = tuple[int, int]
MOST = 100_000
"""The most schedules of a space; all are enumerated."""


@dataclass(frozen=True)
class Structure:
    """A schedule without its executors: what one kernel has for all batch sizes.

    Attributes:
        tile: (BM, BK).
        passes: pipeline text without `regimes`.
        threads: of the CPU that tiles run on; fewer than the present number are in `passes`.
        changes: in how many choices it differs from the default.
    """

    tile: Tile
    passes: str
    threads: int
    changes: int = field(default=0, compare=False)

    @property
    def reordered(self) -> bool:
        """Whether rows of the weight are reordered before its tiles are made."""
        return self.passes.startswith(ReorderRows.name)

    def pipeline(self, tiles: int | str) -> str:
        """The whole pipeline's text, where `tiles` runs up to so many rows of x (see the pass regimes)."""
        return f"{self.passes},regimes{{tiles={tiles}}}"


@dataclass(frozen=True)
class Space:
    """What may vary. The default schedule of the target is in every space, whatever its axes say.

    Axes that a target's default pipeline has no pass for (bins on a GPU) are left out.

    Attributes:
        tiles: tile shapes besides the one that the weight has.
        orders: in which order tile rows run, as in the pass order.
        parts: split-K, as in the pass split-k.
        bins: units of thread scheduling on a CPU, as in the pass balance.
        executors: which executors may serve a batch.
        threads: numbers of CPU threads besides the present one; tiles run on fewer by the pass launch.
        reorder: whether rows of the weight may be reordered, as in the pass reorder-rows, for a weight that is not
            inspected yet; where the pass finds no order that pays, there is nothing to choose.
        block_n, num_warps, num_stages: launch parameters of a GPU, as in the pass launch; None leaves
            one to the backend.
    """

    tiles: tuple[Tile, ...] = ((32, 64), (64, 128), (128, 64))
    orders: tuple[str, ...] = ("cost", "row")
    parts: tuple[int | str, ...] = (1, 2, 4)
    bins: tuple[int, ...] = (32, 256)
    executors: tuple[str, ...] = EVERYWHERE
    threads: tuple[int, ...] = ()
    reorder: tuple[bool, ...] = (False, True)
    block_n: tuple[int | None, ...] = (None,)
    num_warps: tuple[int | None, ...] = (None,)
    num_stages: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        for axis in (entry.name for entry in fields(self)):
            values = getattr(self, axis)
            if not isinstance(values, (tuple, list)) or (not values and axis not in ("tiles", "threads")):
                raise InputError(f"space, {axis}: expected a tuple of choices, found {values!r}; give at least one")
            object.__setattr__(self, axis, tuple(values))
        object.__setattr__(self, "tiles", tuple(check_tile(tile) for tile in self.tiles))
        for kind in self.executors:
            if kind not in EVERYWHERE:
                raise InputError(
                    f"space, executors: expected some of {', '.join(EVERYWHERE)}, found {kind!r}; name one"
                )
        for threads in self.threads:
            if not is_whole(threads) or threads < 1:
                raise InputError(f"space, threads: expected whole numbers from 1, found {threads!r}; correct it")
        for choice in self.reorder:
            if not isinstance(choice, bool):
                raise InputError(f"space, reorder: expected some of False, True, found {choice!r}; name one")
        try:
            self._axes()
        except StoiccError as error:
            raise InputError(f"space: expected choices that passes take, found one that {error}") from None

    @staticmethod
    def of(target: str) -> "Space":
        """The usual space of a backend ("cpu" or "triton")."""
        if target == "triton":
            return Space(
                tiles=((64, 128), (128, 64)),
                parts=("auto", 1, 2, 4, 8),
                num_warps=(None, 4, 8),
                num_stages=(None, 2, 4),
            )
        present = torch.get_num_threads()
        return Space(threads=tuple(count for count in LAUNCH["threads"] if count < present))

    @property
    def digest(self) -> str:
        """16 hex digits that equal spaces share."""
        return hashlib.blake2b(repr(self).encode(), digest_size=8).hexdigest()

    def structures(
        self, default: Pipeline, tiles: Sequence[Tile], threads: int, reorderable: bool = False
    ) -> list[Structure]:
        """All schedules without their executors, the default first, then those nearest to it.

        Args:
            default: the target's pipeline; passes that no axis names stay as they are.
            tiles: the weight's own tile shape first, then those that it can be cut in.
            threads: the present number.
            reorderable: whether the rows of the weight can still be reordered.
        """
        axes = self._axes()
        steps = [step for step in default.passes if step.name != "regimes"]
        choices: list[list[Pass | None]] = [
            _distinct(None, [ReorderRows()] if reorderable and True in self.reorder else [])
        ]
        choices += [_distinct(step, axes.get(step.name, ())) for step in steps]
        choices.append(_distinct(None, axes["launch"]))
        counts = list(dict.fromkeys([threads, *self.threads]))
        size = len(tiles) * len(counts)
        for choice in choices:
            size *= len(choice)
        if size > MOST:
            raise InputError(f"space: expected at most {MOST:,d} schedules, found {size:,d}; leave choices out")
        found = [
            Structure(
                tile,
                _text(_on_threads(passes, count if count < threads else None)),
                count,
                _changes(passes, choices) + (tile != tiles[0]) + (count != threads),
            )
            for tile, count, passes in itertools.product(tiles, counts, itertools.product(*choices))
        ]
        return sorted(found, key=lambda structure: structure.changes)

    def _axes(self) -> dict[str, list[Pass | None]]:
        """The choices of each pass by its name."""
        launches = itertools.product(self.block_n, self.num_warps, self.num_stages)
        return {
            "order": [parse_pass(f"order{{by={by}}}") for by in self.orders],
            "split-k": [parse_pass(f"split-k{{parts={parts}}}") for parts in self.parts],
            "balance": [parse_pass(f"balance{{bins={bins}}}") for bins in self.bins],
            "launch": [Launch(*values) if any(value is not None for value in values) else None for values in launches],
        }


def _distinct(default: Pass | None, others: Sequence[Pass | None]) -> list[Pass | None]:
    """The default first, then the others that differ from it."""
    return list(dict.fromkeys([default, *others]))


def _on_threads(passes: Sequence[Pass | None], count: int | None) -> Sequence[Pass | None]:
    """The passes, the last of which is that of launch parameters or none, for tiles on so many threads."""
    last = passes[-1]
    if count is None:
        return passes
    return (*passes[:-1], replace(last, threads=count) if isinstance(last, Launch) else Launch(threads=count))


def _text(passes: Sequence[Pass | None]) -> str:
    return ",".join(str(step) for step in passes if step is not None)


def _changes(passes: Sequence[Pass | None], choices: Sequence[Sequence[Pass | None]]) -> int:
    return sum(step != choice[0] for step, choice in zip(passes, choices, strict=True))


def differences(passes: str, default: str) -> str:
    """The passes of a pipeline that another lacks, in short: `split-k{parts=4}`; "" where they are equal."""
    held = {str(step) for step in Pipeline.parse(default).passes}
    return ", ".join(text for text in _texts(passes) if text not in held)


def _texts(passes: str) -> Iterator[str]:
    return (str(step) for step in Pipeline.parse(passes).passes)
