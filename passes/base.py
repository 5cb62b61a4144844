"""What a pass is: a frozen dataclass from module to module, whose fields are its text options."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from stoicc.ir.errors import PassError, brief
from stoicc.ir.options import option_text, print_options, read_options
from stoicc.ir.schedule import Schedule
from stoicc.ir.types import Module, TileProgram


@dataclass(frozen=True)
class Pass(ABC):
    """A scheduling decision. Subclass as a frozen dataclass, set `name`, write `apply`.

    Fields are the options of the pass's text, `name{field=value,...}`; their types are
    those of `stoicc.ir.options`.

    Class attributes:
        name: the name in a pipeline's text.
        requires: passes that must have run before this one.
        after: passes that, where a pipeline has them too, must come before this one, because
            they would undo it.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, module: Module) -> Module:
        """A new module; the input stays as it was. The result satisfies `stoicc.ir.verify`."""

    def __str__(self) -> str:
        """The pipeline text: the first option always, the others where they differ from their default."""
        options = print_options(self, f"pass {self.name}", PassError, first=True)
        return f"{self.name}{{{','.join(options)}}}" if options else self.name

    @classmethod
    def from_text(cls, options: Mapping[str, str]) -> Self:
        """Build the pass from the options of its text; PassError names a wrong one."""
        return read_options(cls, options, f"pass {cls.name}", PassError)

    def check(self, option: str, holds: bool, expected: str) -> None:
        """Raise a PassError about an option of this pass unless `holds`."""
        if not holds:
            found = brief(option_text(getattr(self, option)))
            raise PassError(
                f"pass {self.name}, option {option}: expected {expected}, found {found!r}; correct the value"
            )


@dataclass(frozen=True, eq=False)
class WeightView:
    """What a pass on a weight sees of it.

    Attributes:
        occupied: bool `[M, tile columns]`: where a row has a weight that is stored (any bit set).
        tile: (BM, BK) that the weight will be cut in.
        payload: bytes of all tiles, in the cheapest format that holds each, with the rows in a given
            order (None: as they are); infinite where some tile has no format then.
    """

    occupied: NDArray[np.bool_]
    tile: tuple[int, int]
    payload: Callable[[NDArray[np.int64] | None], float]


@dataclass(frozen=True)
class WeightPass(Pass):
    """A decision about the weight, before it is cut in tiles: first in a pipeline of `stoicc.compile`.

    Subclass it, write `row_order`. It is recorded in `schedule.applied` as any other pass; a module
    that says so may go through a pipeline that has the pass again.
    """

    @abstractmethod
    def row_order(self, weight: WeightView) -> NDArray[np.int64] | None:
        """The row that comes to stand at each place, a permutation `[M]`; None leaves the weight alone.

        The executor writes the rows of y back where they belong.
        """

    def apply(self, module: Module) -> Module:
        """Nothing, where the module's tiles were made with this pass.

        Raises:
            PassError: they were not, and cannot be cut anew.
        """
        if str(self) in scheduled(module).applied:
            return module
        raise PassError(
            f"pass {self.name}: expected a weight, found a program whose tiles are cut already; run it on the weight, "
            f"stoicc.compile(weight, pipeline='{self},...'), or take it out of the pipeline"
        )


def initial_schedule(program: TileProgram) -> Schedule:
    """The schedule before any pass: every segment live, tile rows in natural order."""
    return Schedule(live=tuple(range(len(program.segments))), row_order=tuple(range(program.grid[0])))


def scheduled(module: Module) -> Schedule:
    """The module's schedule, or the initial one of a module that has none yet."""
    return initial_schedule(module.tiles) if module.schedule is None else module.schedule


def with_schedule(module: Module, schedule: Schedule) -> Module:
    """The same tiles under another schedule."""
    return replace(module, schedule=schedule)
