"""What processes that compress the same model together tell each other; each has batches of its own."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from stoicc.ir.errors import InputError
from stoicc.ops.statistics import Statistics, all_reduce

T = TypeVar("T")


class Processes:
    """The processes of torch.distributed, or this one alone.

    Args:
        together: whether there are others.

    Raises:
        InputError: others are meant, and torch.distributed is not initialised.
    """

    def __init__(self, together: bool) -> None:
        import torch.distributed as dist

        self.together = together
        if together and not (dist.is_available() and dist.is_initialized()):
            raise InputError(
                "compress: expected torch.distributed to be initialised with distributed=True, found that it is not; "
                "call torch.distributed.init_process_group first"
            )

    def summed(self, statistics: Mapping[str, Statistics]) -> dict[str, Statistics]:
        """Statistics of the batches of all."""
        return all_reduce(statistics) if self.together else dict(statistics)

    def told(self, mine: T) -> list[T]:
        """What each process has, in their order."""
        import torch.distributed as dist

        if not self.together:
            return [mine]
        found: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found  # type: ignore[return-value]  # all are there now

    def agree(self, stages: Sequence[Sequence[str]]) -> None:
        """InputError where batches of another process call layers in another order."""
        if any(other != stages for other in self.told(stages)):
            raise InputError(
                "compress: expected the batches of every process to call the same layers in the same order, found that "
                "they do not; give each process batches that reach all layers"
            )
