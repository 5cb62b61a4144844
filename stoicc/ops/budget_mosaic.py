"""The budget policy as an operator: formats chosen for every tile, then rounded in a sweep; what recipes name."""

from collections.abc import Sequence

from torch import Tensor

from stoicc.ops.graph import CompressedWeight
from stoicc.ops.statistics import Statistics
from stoicc.weights import FormatLike


def budget_mosaic(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    bytes_per_weight: float = 0.5,
    formats: Sequence[FormatLike] | None = None,
    tile: tuple[int, int] = (64, 64),
    sort_inputs: bool | None = None,
) -> CompressedWeight:
    """Give each tile the format that serves the output best at so many bytes per weight, and round with compensation.

    What `stoicc.compile(weight, policy=stoicc.Budget(bytes_per_weight=...), statistics=...)` compiles. In a recipe,
    `budget: {bytes_per_weight: ...}` spreads the bytes over the layers of a rule, for steps that leave them open.

    Args:
        weight: `[M, K]`, or an operator's result that is not quantized; what was pruned stays pruned.
        statistics: of the layer's inputs, with a gram matrix.
        bytes_per_weight, formats, sort_inputs: as in `stoicc.Budget`.
        tile: the tile shape.

    Raises:
        InputError: a quantized weight, statistics of another layer or without a gram matrix, formats without a
            lattice, or bytes that no choice of them keeps.
    """
    from stoicc.policy.budget import Budget  # the policy imports operators
    from stoicc.policy.choose import Task, choose, mosaic_of

    policy = Budget(bytes_per_weight, formats=formats, compensate=True, sort_inputs=sort_inputs)
    task = Task.of(weight, statistics, policy, tile)
    return mosaic_of(task, *choose(task))
