"""What SLoPe does between steps: repack for the backward product, and switch adapters on near the end."""

from typing import Any

from torch import nn

from stoicc.ir.errors import InputError
from stoicc.nn.slope import SlopeLinear


class SlopeSchedule:
    """Call `step()` after each step of the optimizer.

    - Each layer's double-pruned weight is chosen anew every `repack_every` steps, a slice of its rows with each step,
      so that no step pays for all of it.
    - Adapters join for the last `lazy` share of the steps (SLoPe: 1%), and at least for one.

    Every process of a data-parallel run keeps its own; they agree, as their weights do. With
    `DistributedDataParallel`, pass `find_unused_parameters=True` where there are adapters.

    Attributes:
        position: steps done.
        adapters_from: how many steps are done when adapters join.
    """

    def __init__(self, model: nn.Module, steps: int, repack_every: int = 100, lazy: float = 0.01) -> None:
        if steps < 1 or repack_every < 1 or not 0 <= lazy <= 1:
            raise InputError(
                f"slope schedule: expected steps >= 1, repack_every >= 1 and 0 <= lazy <= 1, found {steps}, "
                f"{repack_every} and {lazy}; correct them"
            )
        self._layers = [module for module in model.modules() if isinstance(module, SlopeLinear)]
        if not self._layers:
            raise InputError(
                f"slope schedule, model {type(model).__name__}: expected SlopeLinear layers, found none; "
                "stoicc.sparsify_for_training makes them"
            )
        self.steps, self.repack_every = steps, repack_every
        self.adapters_from = steps - max(1, round(lazy * steps)) if lazy else steps + 1
        self.position = 0
        self._switch()

    def step(self) -> None:
        """One step of the optimizer is done."""
        self.position += 1
        for layer in self._layers:
            layer.repack((self.position - 1) % self.repack_every, self.repack_every)
        self._switch()

    @property
    def adapters(self) -> list[nn.Parameter]:
        """The factors of all adapters: give them a group of the optimizer, with a rate that is not zero at the end."""
        factors = (factor for layer in self._layers for factor in (layer.left, layer.right))
        return [factor for factor in factors if factor is not None]

    def _switch(self) -> None:
        for layer in self._layers:
            layer.adapting = self.position >= self.adapters_from and layer.left is not None

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; masks and packed state are in the model's."""
        return {"position": self.position, "steps": self.steps, "repack_every": self.repack_every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            InputError: of a run of other length or repacking.
        """
        found = state["steps"], state["repack_every"]
        if found != (self.steps, self.repack_every):
            raise InputError(
                f"slope schedule: expected a state of {self.steps} steps, repacked every {self.repack_every}, found "
                f"{found[0]} and {found[1]}; make the schedule alike"
            )
        self.position = state["position"]
        self._switch()
