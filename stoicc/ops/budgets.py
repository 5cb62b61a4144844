"""Layer budgets: uneven sparsity or bits over the layers of a model, from what each layer can bear.

A layer is measured by itself, when its statistics are at hand; the shares are then worked out from a
number per layer:

    ratios = {name: outlier_ratio(weight, statistics) ...}     # and sizes = {name: weight.numel() ...}
    sparsity = sparsity_budget(ratios, sizes, 0.6)             # {name: share to drop}, 0.6 of all weights
"""

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stoicc.ir.errors import InputError
from stoicc.ops._inputs import checked_statistics
from stoicc.ops.statistics import Statistics
from stoicc.tiling import row_blocks
from stoicc.weights import as_matrix, on_cpu

WIDTHS = (2, 3, 4, 8)
"""Bits of the formats that hold codes."""


@on_cpu
def outlier_ratio(
    weight: Tensor | Sequence[Tensor], statistics: Statistics | Sequence[Statistics], times: float = 5.0
) -> float:
    """OWL's measure: the share of weights whose |W_ij| * ||X_j||_2 is over `times` the mean.

    Of one layer, or of the layers of a block together, as the source has it: the mean is then that of the block.
    Norms are root mean squares over samples, the same for every layer that sees all of them.

    Source: Yin et al. 2023, Outlier Weighed Layerwise sparsity (arXiv 2310.05175), Section 3.2: the layer
    outlier distribution, `times` being their M, 5 or 7.

    Raises:
        InputError: statistics of other layers, or `times` that is not a positive number.
    """
    if not isinstance(times, (int, float)) or not 0 < times < math.inf:
        raise InputError(f"budgets.outlier_ratio: expected times > 0, found {times!r}; OWL takes 5 or 7")
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    seen = [statistics] if isinstance(statistics, Statistics) else list(statistics)
    if not weights or len(weights) != len(seen):
        raise InputError(
            f"budgets.outlier_ratio: expected statistics for each layer, found {len(seen)} for {len(weights)} weights"
        )
    scores = torch.cat([_outlier_scores(*layer) for layer in zip(weights, seen, strict=True)])
    return (scores > times * scores.mean(dtype=torch.float64).item()).count_nonzero().item() / scores.numel()


def _outlier_scores(weight: Tensor, statistics: Statistics) -> Tensor:
    """`[weights]`: |W_ij| by the root mean square of its channel."""
    matrix = as_matrix(weight)
    root = checked_statistics("budgets.outlier_ratio", statistics, matrix.shape[1]).mean_square.sqrt().float()
    return matrix.float().abs().mul_(root).flatten()


def sparsity_budget(
    ratios: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float = 0.08
) -> dict[str, float]:
    """OWL: layers with more outliers keep more weights, and all layers together drop `sparsity` of theirs.

    The share that a layer keeps is 1 - sparsity, plus up to 2 * spread between the layer with the fewest
    outliers and the one with the most, in proportion. Source: Yin et al. 2023 (arXiv 2310.05175), Section 3.3;
    its mean over layers is taken over weights here, so that the total holds where layers differ in size.

    Args:
        ratios: `outlier_ratio` of each layer.
        sizes: weights of each layer.
        sparsity: share of all weights to drop, 0 to 1.
        spread: OWL's lambda, 0 to 0.5.

    Returns:
        The share to drop of each layer, 0 to 1.

    Raises:
        InputError: no layers, other layers in one than in the other, or numbers that are out of range.
    """
    names, sized = _checked("budgets.sparsity_budget", "ratios", ratios, sizes)
    if not 0 <= sparsity <= 1 or not 0 <= spread <= 0.5:
        raise InputError(
            f"budgets.sparsity_budget: expected sparsity from 0 to 1, spread from 0 to 0.5, found {sparsity}, {spread}"
        )
    values = torch.tensor([ratios[name] for name in names], dtype=torch.float64)
    reach = (values.max() - values.min()).item()
    offsets = 2 * spread * (values - values.min()) / reach if reach > 0 else torch.zeros_like(values)
    kept = _level(offsets, sized, 1 - sparsity, 0.0, 1.0)
    return dict(zip(names, (1 - kept).tolist(), strict=True))


@on_cpu
def bit_sensitivity(weight: Tensor, statistics: Statistics, group_size: int = 0, relative: bool = True) -> float:
    """c of a layer whose squared output error is c * 4**-bits when it is rounded to so many bits.

    Rounding to steps of 2 R / 2**bits, R the largest magnitude of a group, leaves R**2 / 3 * 4**-bits for each
    weight, independent of one another; the layer's Hessian X^T X then counts by its diagonal alone. Source:
    Zhang et al. 2025, BAQ (arXiv 2506.05664), Section 3, with AbsMax ranges.

    Args:
        weight: `[M, K]`.
        statistics: of the layer's inputs; with a gram matrix, the layer's output is measured with it.
        group_size: weights along K that share a scale; 0 for the row.
        relative: as a share of the squared norm of the layer's output, which makes layers comparable.

    Raises:
        InputError: statistics of another layer, or a group size that is none.
    """
    matrix = as_matrix(weight)
    columns = matrix.shape[1]
    if not isinstance(group_size, int) or group_size < 0:
        raise InputError(f"budgets.bit_sensitivity: expected group_size >= 0, found {group_size!r}; 0 is the row")
    gram = isinstance(statistics, Statistics) and statistics.gram is not None
    seen = checked_statistics("budgets.bit_sensitivity", statistics, columns, gram)
    size = min(group_size or columns, columns)
    energy = _by_group(seen.mean_square.double(), size).sum(1)
    error = output = 0.0
    for rows in row_blocks((matrix.shape[0], columns)):
        block = matrix[rows].float()
        largest = _by_group(block.abs(), size).amax(-1)
        error += float((largest.double().square() * energy).sum()) / 3
        if relative:
            product = block * seen.mean_square if seen.gram is None else block @ seen.gram.float() / seen.samples
            output += float((product * block).sum(dtype=torch.float64))
    if not relative:
        return error
    return error / output if output > 0 else 0.0


def exact_bits(
    sensitivities: Mapping[str, float], sizes: Mapping[str, int], bits: float, least: float = 2, most: float = 8
) -> dict[str, float]:
    """The bits of each layer, as real numbers, with the least sum of c * 4**-bits at `bits` a weight.

    In closed form: bits + log2(c / size) / 2 minus its mean over weights, so that every weight loses equally
    much; layers that this takes beyond `least` or `most` stay there, and the others share what that leaves.
    Source: Zhang et al. 2025, BAQ (arXiv 2506.05664), Section 4.

    Raises:
        InputError: as `bit_budget`.
    """
    names, sized = _checked("budgets.exact_bits", "sensitivities", sensitivities, sizes)
    _check_bits("budgets.exact_bits", bits, least, most)
    values = torch.tensor([sensitivities[name] for name in names], dtype=torch.float64)
    loss = (values / sized).clamp_min(1e-300).log2() / 2
    return dict(zip(names, _level(loss, sized, bits, least, most).tolist(), strict=True))


def bit_budget(
    sensitivities: Mapping[str, float], sizes: Mapping[str, int], bits: float, widths: Sequence[int] = WIDTHS
) -> dict[str, int]:
    """Bits of each layer out of `widths`, at most `bits` a weight over all layers, with little error in sum.

    From the fewest bits for all, the step that wins most error per bit is taken while it fits. Errors c * `codes_lose`
    are convex in the bits, so this is the best of its own size, and within one layer's step of the best there is.

    Args:
        sensitivities: `bit_sensitivity` of each layer; multiply them where a layer matters more.
        sizes: weights of each layer.
        bits: mean bits a weight, scales not counted.
        widths: bits that formats have.

    Raises:
        InputError: no layers, other layers in one than in the other, or numbers that are out of range.
    """
    names, sized = _checked("budgets.bit_budget", "sensitivities", sensitivities, sizes)
    steps = sorted(set(widths))
    if not steps:
        raise InputError("budgets.bit_budget: expected at least one width, found none; formats have 2, 3, 4 and 8 bits")
    _check_bits("budgets.bit_budget", bits, steps[0], steps[-1])
    counts = [int(size) for size in sized.tolist()]
    left = math.floor(bits * sum(counts)) - steps[0] * sum(counts)
    level = [0] * len(names)

    def gain(layer: int) -> tuple[float, int]:
        at, to = steps[level[layer]], steps[level[layer] + 1]
        won = sensitivities[names[layer]] * (codes_lose(at) - codes_lose(to))
        return -won / (counts[layer] * (to - at)), layer

    heap = [gain(layer) for layer in range(len(names))] if len(steps) > 1 else []
    heapq.heapify(heap)
    while heap:
        _, layer = heapq.heappop(heap)
        cost = counts[layer] * (steps[level[layer] + 1] - steps[level[layer]])
        if cost > left:
            continue
        left -= cost
        level[layer] += 1
        if level[layer] + 1 < len(steps):
            heapq.heappush(heap, gain(layer))
    return {name: steps[at] for name, at in zip(names, level, strict=True)}


def codes_lose(bits: int) -> float:
    """What 4**-bits becomes for the 2**bits - 1 levels of symmetric codes: at 2 bits four times as much."""
    return 0.25 / (2.0 ** (bits - 1) - 1) ** 2


def _level(offsets: Tensor, sizes: Tensor, mean: float, least: float, most: float) -> Tensor:
    """offsets + t, kept between least and most, with t such that the mean over weights is as asked."""
    target = mean * sizes.sum()
    held = torch.full_like(offsets, torch.nan)  # layers at a bound, as they are found
    while True:
        free = held.isnan()
        if not bool(free.any()):
            return held
        shift = (target - (held[~free] * sizes[~free]).sum() - (offsets * sizes)[free].sum()) / sizes[free].sum()
        found = torch.where(free, offsets + shift, held)
        low, high = (least - found).clamp_min(0) * sizes, (found - most).clamp_min(0) * sizes
        if not bool(((low + high) > 1e-12 * sizes).any()):
            return found.clamp(least, most)
        # The side that overshoots more is beyond its bound in the answer too; the other may yet come back.
        held = torch.where(free & (found < least), least, held) if low.sum() >= high.sum() else held
        held = torch.where(free & (found > most), most, held) if high.sum() >= low.sum() else held


def _by_group(values: Tensor, size: int) -> Tensor:
    """`[..., K]` -> `[..., groups, size]`, the last group filled with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % size)).unflatten(-1, (-1, size))


def _checked(who: str, what: str, measured: Mapping[str, float], sizes: Mapping[str, int]) -> tuple[list[str], Tensor]:
    """Names in the order of what was measured, and their sizes."""
    if not measured:
        raise InputError(f"{who}: expected at least one layer, found none")
    if set(measured) != set(sizes):
        odd = sorted(set(measured) ^ set(sizes))[0]
        raise InputError(f"{who}: expected {what} and sizes of the same layers, found {odd} in one of them alone")
    for name, value in measured.items():
        if not math.isfinite(value) or value < 0 or sizes[name] < 1:
            raise InputError(
                f"{who}: expected {what} >= 0 and sizes >= 1, found {value} and {sizes[name]} for layer {name}"
            )
    return list(measured), torch.tensor([sizes[name] for name in measured], dtype=torch.float64)


def _check_bits(who: str, bits: float, least: float, most: float) -> None:
    if not least <= bits <= most:
        raise InputError(f"{who}: expected bits from {least:g} to {most:g} a weight, found {bits:g}")
