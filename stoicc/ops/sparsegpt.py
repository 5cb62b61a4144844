"""SparseGPT: prune in one sweep over the columns, the weights to come making up for those that go."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.ir.errors import InputError
from stoicc.ops._choosing import Pattern, all_but, check_scope, unquantized
from stoicc.ops._hessian import InverseHessian, invert
from stoicc.ops._inputs import seen_by_tiles
from stoicc.ops._rounding import CodeOptions, ToCodes
from stoicc.ops._sweep import Given, MaskRule, OfEach, Rounding, ShareOfRow, Sweep, ToDtype
from stoicc.ops._uniform import touched_weights
from stoicc.ops.graph import CompressedWeight, Prune, Update
from stoicc.ops.statistics import Statistics
from stoicc.tiling import check_tile, grid_of, spread_tile_mask
from stoicc.weights import on_cpu


@on_cpu
def sparsegpt(
    weight: Tensor | CompressedWeight,
    statistics: Statistics,
    sparsity: float = 0.5,
    n: int | None = None,
    m: int | None = None,
    scope: str = "row",
    bits: int | None = None,
    group_size: int = 128,
    zero_points: bool = False,
    clip: bool = True,
    damping: float = 0.01,
    where: Tensor | None = None,
    tile: tuple[int, int] = (64, 64),
) -> CompressedWeight:
    """Prune column by column, and let the columns to come answer (Frantar and Alistarh 2023, arXiv 2301.00774).

    H = X^T X + damping * mean(diagonal) * I. Weights go by w**2 / [H^-1]_jj, H^-1 being that of the columns
    still to come; 128 columns at a time, or group by group. The work is in the dtype of the statistics.

    Args:
        weight: `[M, K]`, or an operator's result that is not quantized; what was pruned stays pruned.
        statistics: of the layer's inputs, with a gram matrix.
        sparsity: share of the weights (of the tiles) to drop, 0 to 1; not used with n:m.
        n, m: keep n of every m consecutive weights instead. A shorter last group keeps at most n.
        scope: "row" drops the same share of every row in every 128 columns; "tile" drops whole tiles, those
            that cost least once all other weights have answered.
        bits: quantize the weights that stay in the same sweep, 2 to 8; None for floats.
        group_size, zero_points, clip: of the codes, as in `optq`.
        damping: raised where H is not positive definite with it, which the result then says.
        where: bool per tile: with n:m, other tiles are not pruned, but they answer (and are quantized).
        tile: the tile shape of `where` and of scope "tile".

    Raises:
        InputError: a quantized weight, statistics of another layer or without a gram matrix, or
            options that are none.
    """
    pattern = Pattern.of("ops.sparsegpt", sparsity, n, m)
    check_scope("ops.sparsegpt", scope, ("row", "tile"))
    if pattern.m is None and where is not None:
        raise InputError("ops.sparsegpt: expected n and m with where, found a sparsity; scope='tile' drops tiles")
    if pattern.m is not None and scope == "tile":
        raise InputError(f"ops.sparsegpt: expected a sparsity with scope 'tile', found {pattern}; leave n and m out")
    compressed, state = unquantized("ops.sparsegpt", weight)
    values, shape = state.values, (state.values.shape[0], state.values.shape[1])
    options = None if bits is None else CodeOptions.of("ops.sparsegpt", bits, group_size, shape[1], zero_points, clip)
    inverse = invert("ops.sparsegpt", seen_by_tiles("ops.sparsegpt", state, statistics, gram=True), damping)
    by_tile = scope == "tile"
    rule = _tiles_to_keep(values, inverse, pattern, check_tile(tile)) if by_tile else _rule(pattern)
    fixed = None if where is None else ~touched_weights(where, shape, tile, "ops.sparsegpt").T
    codes = None if options is None else ToCodes.empty(options, values, inverse.upper.diagonal() ** -2)
    rounding: Rounding = ToDtype(values.dtype) if codes is None else codes
    swept, kept = Sweep(inverse, rounding, rule, None if state.kept is None else ~state.kept.T, fixed).run(values)
    what = f"SparseGPT {pattern}{' of the tiles' * by_tile}, {inverse.said}"
    bound = tile if by_tile or where is not None else None
    if codes is not None:
        return compressed.then(Prune(kept, what), bound).then(codes.node(f"SparseGPT {options}"))
    return compressed.then(Update(swept.to(values.dtype), what)).then(Prune(kept, what), bound)


def _rule(pattern: Pattern) -> MaskRule:
    if pattern.n is None or pattern.m is None:
        return ShareOfRow(pattern.sparsity)
    return OfEach(pattern.n, pattern.m)


def _tiles_to_keep(values: Tensor, inverse: InverseHessian, pattern: Pattern, tile: tuple[int, int]) -> Given:
    costs = tile_costs(values, inverse, tile)
    kept = all_but(costs.view(1, -1), round(pattern.sparsity * costs.numel())).view_as(costs)
    return Given(spread_tile_mask(kept, (values.shape[0], values.shape[1]), tile).T)


def tile_costs(values: Tensor, inverse: InverseHessian, tile: tuple[int, int]) -> Tensor:
    """What the removal of each tile costs per weight once all others have answered, `[tile rows, tile columns]`.

    A row's weights w_B in the tile's columns B cost w_B ([H^-1]_BB)^-1 w_B^T: OBS for a set of weights.
    """
    shape = (values.shape[0], values.shape[1])
    rows, columns = grid_of(shape, tile)
    extra = rows * tile[0] - shape[0]
    heights = torch.tensor([tile[0]] * (rows - 1) + [tile[0] - extra])
    costs = torch.empty(rows, columns, dtype=torch.float64)
    for index in range(columns):
        part = slice(index * tile[1], min((index + 1) * tile[1], shape[1]))
        upper = inverse.upper[:, part].double()
        factor = torch.linalg.cholesky(upper.T @ upper)
        weights = values[:, part].double().masked_fill(inverse.dead[part], 0)
        by_row = torch.linalg.solve_triangular(factor, weights.T, upper=False).square().mean(0)
        costs[:, index] = pad(by_row, (0, extra)).view(rows, tile[0]).sum(1) / heights
    return costs
