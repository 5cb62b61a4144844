"""How far a compressed weight's output is from the dense one's, from statistics of the inputs."""

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
    own = weight.detach().cpu()
    lost = whole = 0.0
    for rows in row_blocks((own.shape[0], own.shape[1])):
        part = own[rows].to(dense.dtype if statistics is None else statistics.dtype)
        lost += _energy(part - dense[rows].to(part.dtype), statistics)
        whole += _energy(part, statistics)
    return float((max(lost, 0.0) / whole) ** 0.5) if whole > 0 else 0.0


def _energy(part: Tensor, statistics: Statistics | None) -> float:
    """tr(P G P^T)."""
    if statistics is None:
        return part.double().square().sum().item()
    if statistics.gram is None:
        return (part.square() * statistics.square).sum().double().item()
    return ((part @ statistics.gram) * part).sum().double().item()
