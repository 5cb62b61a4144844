"""What one layer holds while it trains and when it serves, counted from the allocations of torch's allocator."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from stoicc.nn import SlopeLinear

T = TypeVar("T")


@dataclass(frozen=True)
class Allocated(Generic[T]):
    """What a piece of work took of memory, in bytes.

    Attributes:
        held: allocated in it and not freed: what its result (and what it changed) holds.
        peak: the most at any time, beyond what was there before.
    """

    result: T
    held: int
    peak: int


def allocated(work: Callable[[], T]) -> Allocated[T]:
    """Run some work, and add up every allocation and release of tensor memory meanwhile."""
    gc.collect()  # what earlier work left in cycles must not be released meanwhile
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = work()
            gc.collect()
    finally:
        gc.enable()
    found = profiler.profiler.kineto_results.events()
    sizes = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    held = peak = 0
    for _, size in sizes:
        held += size
        peak = max(peak, held)
    return Allocated(result, held, peak)


class WideAdamW(torch.optim.Optimizer):
    """AdamW with fp32 moments for bf16 weights; torch's own gives moments the dtype of the weight."""

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step over the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, wide = self.state[parameter], gradient.float()
        if not state:
            state.update(step=0, mean=torch.zeros_like(wide), square=torch.zeros_like(wide))
        state["step"] += 1
        fast, slow = group["betas"]
        mean, square = state["mean"].lerp_(wide, 1 - fast), state["square"].lerp_(wide * wide, 1 - slow)
        scale = (square / (1 - slow ** state["step"])).sqrt_().add_(group["eps"])
        moved = parameter.float().mul_(1 - group["lr"] * group["decay"])
        parameter.copy_(moved.addcdiv_(mean, scale, value=-group["lr"] / (1 - fast ** state["step"])))


def training_bytes(make: Callable[[], nn.Module], x: Tensor, adapting: bool = False) -> Allocated[Any]:
    """What weights, gradients and optimizer state of a layer hold after a step, and the most during it."""

    def one_step() -> tuple[nn.Module, torch.optim.Optimizer]:
        layer = make()
        if isinstance(layer, SlopeLinear):
            layer.adapting = adapting
        optimizer = WideAdamW(layer.parameters())
        layer(x).sum().backward()
        optimizer.step()
        return layer, optimizer

    return allocated(one_step)


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one bf16 layer `[size, size]`, 2:4 beside dense.

    Attributes:
        training, dense_training: weights, gradients and fp32 Adam moments.
        adapting: the same with an adapter that trains.
        serving, dense_serving: what a kernel of the trained layer holds, and a dense weight.
        serving_adapter: with the adapter.
    """

    size: int
    rank: int
    training: int
    adapting: int
    dense_training: int
    serving: int
    serving_adapter: int
    dense_serving: int


def layer_memory(size: int = 1024, rank: int = 64, batch: int = 64) -> LayerMemory:
    """Count all of it for one size."""
    x = torch.randn(batch, size).bfloat16()

    def slope(rank: int) -> Callable[[], SlopeLinear]:
        return lambda: SlopeLinear(size, size, bias=False, rank=rank, dtype=torch.bfloat16)

    def dense() -> nn.Linear:
        return nn.Linear(size, size, bias=False, dtype=torch.bfloat16)

    trained = slope(rank)()
    plain = _served(trained)
    trained.adapting = True
    return LayerMemory(
        size,
        rank,
        training_bytes(slope(0), x).held,
        training_bytes(slope(rank), x, adapting=True).held,
        training_bytes(dense, x).held,
        plain,
        _served(trained),
        allocated(dense).held,
    )


def _served(layer: SlopeLinear) -> int:
    """Bytes of tensors that a kernel of the layer holds once it was called, beside its y."""

    def serve() -> Any:
        kernel = layer.to_kernel()
        kernel(torch.zeros(1, layer.in_features, dtype=layer.kept.dtype))
        return kernel

    return allocated(serve).held
