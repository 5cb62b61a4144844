"""SLiM-Quant: one scale for the whole tensor, from the density of its weights' magnitudes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops._uniform import check_bits, one_scale, steps, touched_weights
from stoicc.ops.combine import scale
from stoicc.ops.graph import CompressedWeight
from stoicc.ops.lowering import Lowered, lower
from stoicc.ops.statistics import Statistics
from stoicc.tiling import row_blocks
from stoicc.weights import on_cpu

OCTAVES = 24
"""Magnitudes below 2**-24 of the largest are left out: whatever the clip, their error is next to nothing."""
BINS_PER_OCTAVE = 384
"""Bins are 0.18% wide, so that a step of 8 bits has four or more where it matters."""
COARSE, FINE = 10, 201
BOOSTS = range(-4, 5)
"""Powers of two that are tried for the protected channels."""


@dataclass(frozen=True)
class SlimQuant:
    """Options; `share` and `boost` belong to the activation-aware variant, a boost of None is chosen."""

    bits: int = 4
    share: float = 0.01
    boost: float | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits, "ops.slim_quant")
        if not 0 < self.share <= 1 or (self.boost is not None and not 0 < self.boost < math.inf):
            raise InputError(
                f"ops.slim_quant: expected 0 < share <= 1 and a positive boost, found {self.share} and {self.boost}"
            )


@on_cpu
def slim_quant(
    weight: Tensor | CompressedWeight,
    statistics: Statistics | None = None,
    bits: int = 4,
    activation_aware: bool = False,
    share: float = 0.01,
    boost: float | None = None,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Quantize with the one clip alpha that minimises the expected squared error over the tensor.

    E(alpha) = integral of f(x) (Q_alpha(x) - x)**2 up to alpha + integral of f(x) (alpha - x)**2 beyond it,
    f the density of |w|; alpha comes from 10 coarse points, then a fine search around the best. Source:
    Mozaffari et al. 2025, SLiM (ICML 2025, arXiv 2410.09615), Section 3.1.

    The activation-aware variant (SLiM-Quant-O) multiplies the `share` of input channels with the largest
    mean|x_j| * ||W_:j||_2 by a boost before it quantizes, and the executor divides those channels of x: their
    error is divided too. There f counts a weight by the mean square of its input, so that alpha is the best
    for the layer's output. The published boost is 2; an alpha that minimises squared error leaves no room
    beyond the weights, so a boost that clips what it protects can lose more than it wins: by default the power
    of two with the least E is taken, which may be 1, or below 1 where the protected weights are large.

    Args:
        weight: `[M, K]`, or an operator's result; pruned weights stay exactly zero.
        statistics: of the layer's inputs; read with `activation_aware` alone.
        bits: 2 to 8.
        activation_aware, share, boost: the variant above; powers of two are exact.
        where: bool per tile; weights outside it take no part in the density and keep their values.
        tile: the tile shape that `where` speaks of.

    Raises:
        InputError: options or a mask that cannot be used; with `activation_aware`, statistics that are
            missing, not finite or of another layer, or a weight that is quantized already.
    """
    config = SlimQuant(bits, share, boost)
    compressed = CompressedWeight.of(weight)
    state = lower(compressed)
    values, shape = state.values, (state.values.shape[0], state.values.shape[1])
    touched = touched_weights(where, shape, tile, "ops.slim_quant")
    if not activation_aware:
        clip, what = best_clip([(Density.of(values, touched), 1.0)], bits)[0], "SLiM-Quant"
    elif statistics is None:
        raise InputError("ops.slim_quant: expected statistics with activation_aware=True, found none")
    elif state.sheets:
        raise InputError("ops.slim_quant: expected a weight that is not quantized yet, found codes; quantize once")
    else:
        plan = _protect(state, touched, seen_by_tiles("ops.slim_quant", state, statistics), config)
        clip, what = plan.clip, f"SLiM-Quant-O, {plan.columns.numel()} channels times {plan.boost:g}"
        if plan.boost != 1:
            compressed = scale(compressed, input_scale=plan.input_scale(state))
            values = compressed.values()
    node = one_scale(values, touched, clip, bits, f"int{bits} {what}, clip {clip:.4g}")
    return compressed.then(node, tile if where is not None else None)


@dataclass(frozen=True, eq=False)
class Protection:
    """Columns (in tile order) whose weights are multiplied by `boost`, and the clip that then is best."""

    columns: Tensor
    boost: float
    clip: float

    def input_scale(self, state: Lowered) -> Tensor:
        """What the executor multiplies x by, `[K]` in the order of the source."""
        order = state.column_permutation
        columns = self.columns if order is None else order[self.columns]
        return torch.ones(state.values.shape[1]).index_fill_(0, columns, 1 / self.boost)


def _protect(state: Lowered, touched: Tensor, inputs: Statistics, config: SlimQuant) -> Protection:
    """The channels to protect, and the boost and clip with the least error of the output."""
    values, square = state.values, inputs.mean_square.float()
    saliency = inputs.mean_absolute.float() * values.float().norm(dim=0)
    chosen = saliency.topk(max(1, round(config.share * values.shape[1]))).indices.sort().values
    others = torch.ones(values.shape[1], dtype=torch.bool).index_fill_(0, chosen, False)
    protected, rest = (Density.of(values[:, at], touched[:, at], square[at]) for at in (chosen, others))
    boosts = [2.0**power for power in BOOSTS] if config.boost is None else [config.boost]
    fitting = [boost for boost in boosts if boost == config.boost or _exact(values[:, chosen], boost)]
    found = [(*best_clip([(rest, 1.0), (protected, boost)], config.bits), boost) for boost in fitting]
    clip, _, boost = min(found, key=lambda each: (each[1], abs(math.log(each[2]))))
    return Protection(chosen, boost, clip)


def _exact(values: Tensor, boost: float) -> bool:
    """Whether values times a power of two stay in the range of their dtype."""
    return torch.equal(((values.float() * boost).to(values.dtype).float() / boost).to(values.dtype), values)


@dataclass(frozen=True, eq=False)
class Density:
    """A histogram of the magnitudes of non-zero weights, its bins as wide as a fixed share of where they stand.

    Attributes:
        edges: float64 `[bins + 1]`, ascending; the last is the largest magnitude.
        counts: float64 `[bins]`, spread evenly over each bin.
    """

    edges: Tensor
    counts: Tensor

    @staticmethod
    def of(values: Tensor, touched: Tensor, importance: Tensor | None = None) -> "Density":
        """Of the touched weights of `values [M, K]`, each counted `importance [K]` times (default once).

        Without any weight that is not zero, counts and edges are zero.
        """
        blocks = list(row_blocks((values.shape[0], values.shape[1]))) if values.numel() else []
        largest = max((_magnitudes(values[rows], touched[rows]).max().item() for rows in blocks), default=0.0)
        bins = OCTAVES * BINS_PER_OCTAVE
        edges = largest * torch.linspace(-OCTAVES, 0, bins + 1, dtype=torch.float64).exp2()
        counts = torch.zeros(bins + 1, dtype=torch.float64)
        for rows in blocks if largest > 0 else []:
            octave = (_magnitudes(values[rows], touched[rows]) / largest).log2_()
            index = ((octave + OCTAVES) * BINS_PER_OCTAVE).clamp_(-1, bins - 1).floor_().int().add_(1)
            weights = None if importance is None else importance.expand(values[rows].shape).flatten()
            counts += index.flatten().bincount(weights, bins + 1).double()
        return Density(edges, counts[1:])  # the first is of what is too small, or zero

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return self.edges[-1].item()

    @property
    def typical(self) -> float:
        """The root mean square of the magnitudes; 0 without any."""
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        total = self.counts.sum().item()
        return math.sqrt((self.counts * middle.square()).sum().item() / total) if total else 0.0

    def error(self, clips: Tensor, bits: int) -> Tensor:
        """E(alpha) times the count of all weights, for clips `[n]`: float64 `[n]`."""
        width = self.edges.diff()
        primitive = _primitive(self.edges, clips.double()[:, None], steps(bits))
        return (primitive.diff() * (self.counts / torch.where(width > 0, width, 1.0))).sum(1)


def best_clip(parts: Sequence[tuple[Density, float]], bits: int) -> tuple[float, float]:
    """The clip with the least error, and that error: coarse points, then fine ones between the best's neighbours.

    Args:
        parts: densities, and what their weights are multiplied by before they meet the clip (their
            errors are divided by it again).
    """
    parts = [(density, boost) for density, boost in parts if density.typical > 0]
    if not parts:
        return 0.0, 0.0

    def error(clips: Tensor) -> Tensor:
        return torch.stack([density.error(clips / boost, bits) for density, boost in parts]).sum(0)

    low = min(density.typical * boost for density, boost in parts) / 4
    coarse = _between(low, max(density.largest * boost for density, boost in parts), COARSE)
    best = int(error(coarse).argmin())
    fine = _between(coarse[max(best - 1, 0)].item(), coarse[min(best + 1, COARSE - 1)].item(), FINE)
    errors = error(fine)
    return fine[errors.argmin()].item(), errors.min().item()


def _between(low: float, high: float, count: int) -> Tensor:
    """Points at equal ratios, both ends exact."""
    points = torch.linspace(math.log(low), math.log(high), count, dtype=torch.float64).exp()
    points[0], points[-1] = low, high
    return points


def _magnitudes(values: Tensor, touched: Tensor) -> Tensor:
    return torch.where(touched, values, torch.zeros((), dtype=values.dtype)).float().abs_()


def _primitive(x: Tensor, clip: Tensor, levels: int) -> Tensor:
    """The integral from 0 to x of (Q(t) - t)**2, Q rounding to multiples of clip / levels up to clip.

    Between the middles of two levels the integrand is a parabola around its level: a whole one adds
    step**3 / 12, and beyond the clip the last one goes on.
    """
    step = clip / levels
    level = (x / step).round().clamp_max(levels)
    return (x - level * step) ** 3 / 3 + level * step**3 / 12
