"""drop-empty: segments that store nothing leave the live ones."""

from dataclasses import dataclass, replace
from typing import ClassVar

from stoicc.ir.schedule import WorkItem
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule


@dataclass(frozen=True)
class DropEmpty(Pass):
    """Executors visit live segments only; a format without planes adds nothing to y."""

    name: ClassVar[str] = "drop-empty"

    def apply(self, module: Module) -> Module:
        schedule, program = scheduled(module), module.tiles
        stores = [bool(segment.resolve().planes(program.tile, program.dtype)) for segment in program.segments]
        kept = [index for index, csr in enumerate(schedule.csrs) if stores[csr.segment]]
        transposed = schedule.transposed
        if transposed is not None:
            transposed = replace(transposed, cscs=tuple(csc for csc in transposed.cscs if stores[csc.segment]))
        return with_schedule(
            module,
            replace(
                schedule,
                live=tuple(segment for segment in schedule.live if stores[segment]),
                csrs=tuple(schedule.csrs[index] for index in kept),
                items=tuple(_only(item, kept) for item in schedule.items),
                transposed=transposed,
            ),
        )


def _only(item: WorkItem, kept: list[int]) -> WorkItem:
    return replace(item, ranges=tuple(item.ranges[index] for index in kept))
