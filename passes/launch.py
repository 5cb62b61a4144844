"""launch: launch parameters of a kernel, for schedules that are searched or written by hand."""

from dataclasses import dataclass, fields
from typing import ClassVar

from stoicc.ir.schedule import LAUNCH
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule


@dataclass(frozen=True)
class Launch(Pass):
    """Set launch parameters; `none` leaves one to the backend, which chooses by batch and dtype.

    block_n: rows of the batch per program. num_warps: warps per program. num_stages: stages of
    the load pipeline. gluon: 0 keeps NVIDIA GPUs to the portable dialect. prologue: 1 scales and permutes x
    in the launch on tensor cores, 0 in launches before it. wgmma: 1 multiplies batches of 64 and more by warpgroups on
    Hopper GPUs, which no GPU has confirmed yet. threads: the most that tiles run on, where torch has more; the only
    one that a CPU knows, and no GPU does.
    """

    name: ClassVar[str] = "launch"
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    gluon: int | None = None
    prologue: int | None = None
    wgmma: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in (entry.name for entry in fields(self)):
            value, allowed = getattr(self, name), LAUNCH[name]
            # True is 1 to `in`
            known = value is None or (not isinstance(value, bool) and value in allowed)
            self.check(name, known, f"none or one of {', '.join(map(str, allowed))}")

    def apply(self, module: Module) -> Module:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return with_schedule(module, scheduled(module).launch_with(**chosen))
