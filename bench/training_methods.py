"""Ways to train a model 2:4: SLoPe, and the baselines on the same dense layers, each a few lines.

All of them change the four linear layers of every block and nothing else. A baseline keeps the dense weight and puts
a function of it in its place (`torch.nn.utils.parametrize`); its gradient goes straight through to the dense weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.gpt import Gpt, block_linears
from stoicc.formats._nm import top2
from stoicc.nn import SlopeSchedule, sparsify_for_training

Options: TypeAlias = Mapping[str, Any]
RANK = 1 / 16
"""Rank of adapters over the width: the most that SLoPe's paper uses."""
REFRESH = 40
"""Steps between searches for transposable masks, as in Hu et al. 2024 (arXiv 2404.01847)."""


class _Masked(torch.autograd.Function):
    """w on its mask; the gradient goes straight through, and what is masked decays by `decay` in it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grad + ctx.decay * weight.where(~mask, 0), None, None


class SrSte(nn.Module):
    """SR-STE (Zhou et al. 2021, arXiv 2102.04010, equation 9) extended to Adam: the decay is part of its gradient.

    The mask is that of the largest magnitudes at every step; for Adam as Hu et al. 2024 (arXiv 2404.01847) have it.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, 2:4."""
        found: Tensor = _Masked.apply(weight, top2(weight.detach().abs()), self.decay)
        return found


class Transposable(nn.Module):
    """Masks that are 2:4 along rows and columns, so that both products are sparse and the gradient of x is exact.

    The best mask of each 4 x 4 block (Hubara et al. 2021, arXiv 2102.08124), all 90 tried, sought again every
    `REFRESH` steps; between them and for dropped weights as SR-STE with decay (Hu et al. 2024).
    """

    mask: Tensor

    def __init__(self, weight: Tensor, decay: float) -> None:
        super().__init__()
        self.decay, self.uses = decay, 0
        self.register_buffer("mask", transposable_mask(weight.detach()))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, 2:4 both ways."""
        if self.training and torch.is_grad_enabled():
            if self.uses % REFRESH == 0:
                self.mask = transposable_mask(weight.detach())
            self.uses += 1
        found: Tensor = _Masked.apply(weight, self.mask, self.decay)
        return found


class Static(nn.Module):
    """SLoPe's mask, chosen once, with every gradient exact: what SLoPe would be without its second prune."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", top2(weight.detach().abs()))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, 2:4."""
        return weight * self.mask


class SSte(nn.Module):
    """S-STE (Hu et al. 2024, arXiv 2409.09099): soft thresholds of groups, continuous in w; a scale fixed at the start.

    The third largest magnitude of a group is taken off all of them; the scale makes the result nearest to the first
    weight.
    """

    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        soft = soft_threshold(weight.detach())
        self.register_buffer("scale", (weight.detach() * soft).sum() / soft.square().sum())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, 2:4."""
        found: Tensor = _Straight.apply(weight, soft_threshold(weight.detach()) * self.scale)
        return found


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, projected: Tensor) -> Tensor:
        return projected

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def soft_threshold(weight: Tensor) -> Tensor:
    """sign(w) max(|w| - t, 0), t the third largest magnitude of each four along a row: at most two are left."""
    groups = weight.unflatten(1, (-1, 4))
    threshold = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - threshold).clamp_min(0)).flatten(1)


def _patterns() -> Tensor:
    """The 90 binary 4 x 4 matrices with two ones in every row and column: `[90, 16]`."""
    rows = [[float(column in pair) for column in range(4)] for pair in combinations(range(4), 2)]
    found = torch.tensor([list(four) for four in product(rows, repeat=4)])
    return found[(found.sum(1) == 2).all(1)].flatten(1)


PATTERNS = _patterns()


def transposable_mask(weight: Tensor) -> Tensor:
    """Bool `[M, K]`, 2:4 along both: in each 4 x 4 block the mask that keeps the most magnitude."""
    rows, columns = weight.shape
    blocks = weight.abs().view(rows // 4, 4, columns // 4, 4).transpose(1, 2)
    best = (blocks.flatten(2) @ PATTERNS.T).argmax(-1)
    return PATTERNS[best].view(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns).bool()


_DECAYS = tuple({"decay": value} for value in (0.1, 0.03, 0.3, 1.0))
_LAMBDAS = tuple({"lambda": value} for value in (2e-3, 2e-4, 2e-2, 1e-1, 5e-1))
_CHOICES = ({"mask": "magnitude"}, {"mask": "random"}, {"decay": 0.3}, {"decay": 0.03})


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name, source: what it is called, and where it comes from.
        apply: changes a new model, which trains for so many steps; of what it returns, `step` follows each step.
        options: what `apply` takes beside, or `decay` (of weights, for the optimizer): sets to tune over, the first
            the default.
        like: a method that it takes apart: it is run with the settings of that one, not tuned.
    """

    name: str
    source: str
    apply: Callable[[Gpt, int, Options], SlopeSchedule | None]
    options: tuple[Options, ...] = _DECAYS
    like: str = ""


def _dense(model: Gpt, steps: int, options: Options) -> None:
    """As it is."""


def _slope(model: Gpt, steps: int, options: Options) -> SlopeSchedule:
    recipe = {"layers": "blocks.*", "rank": RANK, "mask": options.get("mask", "magnitude"), "seed": options["seed"]}
    sparsify_for_training(model, recipe)
    return SlopeSchedule(model, steps, lazy=options.get("lazy", 0.0))


def _throughout(model: Gpt, steps: int, options: Options) -> SlopeSchedule:
    return _slope(model, steps, {**options, "lazy": 1.0})


def _sr_ste(model: Gpt, steps: int, options: Options) -> None:
    for layer in block_linears(model).values():
        parametrize.register_parametrization(layer, "weight", SrSte(options["lambda"]))


def _transposable(model: Gpt, steps: int, options: Options) -> None:
    for layer in block_linears(model).values():
        parametrize.register_parametrization(layer, "weight", Transposable(layer.weight, options["lambda"]))


def _static(model: Gpt, steps: int, options: Options) -> None:
    for layer in block_linears(model).values():
        parametrize.register_parametrization(layer, "weight", Static(layer.weight))


def _s_ste(model: Gpt, steps: int, options: Options) -> None:
    for layer in block_linears(model).values():
        parametrize.register_parametrization(layer, "weight", SSte(layer.weight))


METHODS = {
    method.name: method
    for method in (
        Method("dense", "no pruning", _dense),
        Method("slope", "SLoPe", _slope, _CHOICES),
        Method("sr-ste", "SR-STE with decay, extended to Adam", _sr_ste, _LAMBDAS),
        Method("s-ste", "S-STE", _s_ste),
        Method("transposable", "transposable masks with decay", _transposable, _LAMBDAS),
        Method("static", "SLoPe without its second prune", _static, like="slope"),
        Method("throughout", "SLoPe, adapters from the first step", _throughout, like="slope"),
    )
}


@dataclass(frozen=True)
class Fork:
    """Adapters in the last steps: a fork of the run named slope.

    Attributes:
        share: of the steps.
        own: whether they have a learning rate of their own, tuned, which falls linearly to zero; else the schedule's.
    """

    share: float
    own: bool = True


LAZY = "slope + lazy"
"""As published: adapters in the last 1% of the steps."""
FORKS = {
    LAZY: Fork(0.01),
    "lazy, schedule's rate": Fork(0.01, own=False),
    "lazy, 10%": Fork(0.1),
}
