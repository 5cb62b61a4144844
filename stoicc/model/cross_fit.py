"""What rounding a layer does to a model on inputs that the rounding did not answer for, from the inputs there are.

A sweep answers for each rounding with the columns to come, as the calibration inputs have them. On those inputs the
model feels less of it than on others, by a factor that differs between layers. So sequences take turns: every other
one is of one half, the weight is rounded for each half, and each half runs through the weight that was rounded for the
other (cross-fitting, as in Chernozhukov et al. 2018, arXiv 1608.00060).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoicc.model.processes import Processes
from stoicc.ops.statistics import Collector, Statistics

if TYPE_CHECKING:
    from stoicc.model.layers import Layer


class Turns:
    """Sequences by half, counted over all calls of a layer: those of `[..., K]` along the first axis, one if `[K]`."""

    def __init__(self) -> None:
        self._seen = 0

    def next(self, x: Tensor) -> tuple[Tensor, tuple[slice, slice]]:
        """The input with an axis of sequences, and which of them are of each half."""
        x = x if x.ndim > 1 else x[None]
        own = slice(self._seen % 2, None, 2), slice((1 - self._seen) % 2, None, 2)
        self._seen += len(x)
        return x, own


class HalfCollector:
    """Running sums of a layer's inputs, half by half.

    Args:
        dtype: of the sums.
        name: of the layer, for messages.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, name: str = "") -> None:
        self._halves = Collector(dtype=dtype, name=name), Collector(dtype=dtype, name=name)
        self._turns = Turns()

    def add(self, x: Tensor) -> None:
        """Add a batch `[..., K]`; errors are those of `Collector.add`."""
        x, own = self._turns.next(x)
        for half, part in zip(self._halves, own, strict=True):
            if x[part].numel():
                half.add(x[part])

    def statistics(self, processes: Processes | None = None) -> tuple[Statistics, Statistics] | None:
        """Of both halves, of all processes; None where one of them saw a single sequence."""
        processes = processes or Processes(False)
        if not all(processes.told(all(half.samples for half in self._halves))):
            return None
        one, other = (half.statistics() for half in self._halves)
        found = processes.summed({"one": one, "other": other})
        return found["one"], found["other"]


@contextmanager
def running_apart(layer: "Layer", weights: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Sequences of each half run through a weight `[M, K]` of their own; the layer itself is left alone."""
    turns = Turns()

    def apart(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        x, own = turns.next(args[0] if args else next(iter(kwargs.values())))
        found = torch.empty((*x.shape[:-1], output.shape[-1]), dtype=output.dtype, device=output.device)
        for weight, part in zip(weights, own, strict=True):
            bias = module.bias
            assert bias is None or isinstance(bias, Tensor)
            found[part] = F.linear(x[part], weight.to(x.device), bias)
        return found.view_as(output)

    hooks = [module.register_forward_hook(apart, with_kwargs=True) for module in layer.modules.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
