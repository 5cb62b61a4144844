"""How far a compressed weight's output is from the dense one's, from statistics of the inputs."""

import torch
from torch import Tensor

from stoicc.ops.statistics import Statistics
from stoicc.tiling import row_blocks
from stoicc.weights import on_cpu


@on_cpu
def output_error(weight: Tensor, dense: Tensor, statistics: Statistics | None) -> float:
    """||X E^T|| / ||X W^T||, E = W - W_c, from the gram matrix of X: sqrt(tr(E G E^T) / tr(W G W^T)).

    0.0 where X W^T is zero. Without a gram matrix its diagonal stands for it, without statistics the identity.

    Args:
        weight, dense: W and W_c `[M, K]`.
    """
    lost, whole = squared_output(weight.float().cpu() - dense.float(), statistics), squared_output(weight, statistics)
    return float((max(lost, 0.0) / whole) ** 0.5) if whole > 0 else 0.0


@on_cpu
def squared_output(matrix: Tensor, statistics: Statistics | None) -> float:
    """||X P^T||^2 = tr(P G P^T) of P `[M, K]`, with G's diagonal, or the identity, where there is no more."""
    total = 0.0
    for rows in row_blocks((matrix.shape[0], matrix.shape[1])):
        part = matrix[rows].detach().cpu()
        if statistics is None:
            squares = part.float().square()
        else:
            part = part.to(statistics.dtype)
            squares = (part * statistics.square if statistics.gram is None else part @ statistics.gram) * part
        total += float(squares.sum(dtype=torch.float64))
    return total
