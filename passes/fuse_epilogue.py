"""fuse-epilogue: what stands beside the tiles joins the executor's launch."""

from dataclasses import dataclass, replace
from typing import ClassVar

from stoicc.ir.schedule import EPILOGUE, PROLOGUE
from stoicc.ir.types import Module
from stoicc.passes.base import Pass, scheduled, with_schedule


@dataclass(frozen=True)
class FuseEpilogue(Pass):
    """Scales and permutations of x go to the prologue, all that follows the product to the epilogue."""

    name: ClassVar[str] = "fuse-epilogue"

    def apply(self, module: Module) -> Module:
        beside = module.tiles.beside
        return with_schedule(
            module,
            replace(
                scheduled(module),
                prologue=tuple(name for name in PROLOGUE if getattr(beside, name) is not None),
                epilogue=tuple(name for name in EPILOGUE if getattr(beside, name) is not None),
            ),
        )
