"""What surrounds the transposed product: gradients through all that stands beside the tiles, and of the planes.

With y = act(z), z = (S_o P_r W P_c S_i + L R) x + b and g = dL/dz, rows of a batch as rows:

    h = (g S_o) P_r                   what meets the tiles, in the order of tile rows
    dL/dx = (h W) P_c S_i + (g L) R
    dL/db = sum of g,  dL/dL = g^T (x R^T),  dL/dR = (g L)^T x
    dL/dW = h^T (x S_i P_c^T)         only where a format keeps a weight, a panel of tile rows at a time
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from stoicc.codegen.executor import Pools
from stoicc.codegen.reference import ACTIVATION_FUNCTIONS, PanelDecoder
from stoicc.ir.factors import factor_values
from stoicc.ir.format import Plane, PlaneKind
from stoicc.ir.planes import plane_slots, pool_name, tile_coordinates, tile_planes
from stoicc.ir.types import TileProgram


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd at work, in an op too, where torch keeps it out."""
    autograd = torch._C._dispatch_keyset_full() - torch._C._after_autograd_keyset
    excluded = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are computed in besides products: fp32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def trainable_pools(program: TileProgram) -> tuple[str, ...]:
    """Names of the pools that training may change: planes of floats, the bias, low-rank factors that are no codes."""
    names = [pool_name(index, plane.name) for index, plane in _trainable_planes(program)]
    if program.beside.bias is not None:
        names.append(program.beside.bias.name)
    return tuple(names) + _float_factors(program)


def _trainable_planes(program: TileProgram) -> list[tuple[int, Plane]]:
    """(segment, plane) of what formats say may be trained."""
    found = []
    for index, segment in enumerate(program.segments):
        fmt = segment.resolve()
        names = fmt.trainable(program.tile, program.dtype)
        found += [(index, plane) for plane in fmt.planes(program.tile, program.dtype) if plane.name in names]
    return found


def _float_factors(program: TileProgram) -> tuple[str, ...]:
    factors = program.beside.low_rank or ()
    return tuple(factor.name for factor in factors if hasattr(factor, "name"))


def through_activation(program: TileProgram, z: Tensor, grad: Tensor) -> Tensor:
    """dL/dz from dL/dy where y = act(z); all `[N, M]`, of grad's dtype."""
    assert program.beside.activation is not None
    wide = wide_dtype(grad.dtype)
    with _recording():
        before = z.detach().to(wide).requires_grad_()
        after = ACTIVATION_FUNCTIONS[program.beside.activation](before)
    return torch.autograd.grad(after, before, grad.to(wide))[0].to(grad.dtype)


def at_tiles(program: TileProgram, pools: Pools, grad: Tensor) -> Tensor:
    """h `[N, M]` in the order of tile rows, contiguous; of grad's dtype, wide where an output scale meets it."""
    if program.beside.output_scale is not None:
        wide = wide_dtype(grad.dtype)
        grad = grad.to(wide) * pools["output_scale"].to(wide)
    if program.beside.row_permutation is not None:
        grad = grad[:, pools["row_permutation"].long()]
    return grad.contiguous()


def at_input(program: TileProgram, pools: Pools, product: Tensor, grad: Tensor) -> Tensor:
    """dL/dx `[N, K]` of grad's dtype, from h W `[N, K]` in the order of tile columns and g."""
    beside, wide = program.beside, wide_dtype(grad.dtype)
    if beside.column_permutation is not None:
        product = torch.empty_like(product).index_copy_(1, pools["column_permutation"].long(), product)
    if beside.input_scale is not None:
        product = product.to(wide) * pools["input_scale"].to(wide)
    if beside.low_rank is not None:
        left, right = (factor_values(factor, pools).to(wide) for factor in beside.low_rank)
        product = torch.addmm(product.to(wide), grad.to(wide) @ left, right)
    return product.to(grad.dtype)


def beside_gradients(program: TileProgram, pools: Pools, grad: Tensor, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """By pool name what computes dL/d(pool) of the bias and of float factors, from g `[N, M]` and x `[N, K]`."""
    wide = wide_dtype(grad.dtype)
    found: dict[str, Callable[[], Tensor]] = {}
    if program.beside.bias is not None:
        found[program.beside.bias.name] = lambda: grad.to(wide).sum(0)
    if factors := _float_factors(program):
        left, right = (pools[name].to(wide) for name in factors)
        found[factors[0]] = lambda: grad.to(wide).T @ (x.to(wide) @ right.T)
        found[factors[1]] = lambda: (grad.to(wide) @ left).T @ x.to(wide)
    return found


def plane_gradients(
    program: TileProgram, pools: Pools, inner: Tensor, x: Tensor, names: frozenset[str]
) -> dict[str, Tensor]:
    """dL/d(plane) of the named pools, each of its pool's shape and dtype.

    A panel of tile rows of h^T x is dense at a time; each format's own `decode` says which of its numbers go where.

    Args:
        inner: h `[N, M]`, in the order of tile rows.
        x: `[N, K]` as the tiles meet it, of the same dtype.
    """
    by_segment: dict[int, list[Plane]] = {}
    gradients: dict[str, Tensor] = {}
    for index, plane in _trainable_planes(program):
        if (name := pool_name(index, plane.name)) in names:
            by_segment.setdefault(index, []).append(plane)
            shared = plane.kind in (PlaneKind.GROUP, PlaneKind.MATRIX)  # sums over tiles, not rounded on the way
            gradients[name] = torch.zeros_like(pools[name], dtype=torch.float32 if shared else None)
    decoder, (height, width), (rows, columns) = PanelDecoder(program, pools), program.tile, program.grid
    x = pad(x, (0, columns * width - x.shape[1]))
    for first in range(0, rows, decoder.height):
        last = min(first + decoder.height, rows)
        of_rows = {s: np.searchsorted(decoder.coordinates[s][0], (first, last)).tolist() for s in by_segment}
        if all(begin == end for begin, end in of_rows.values()):
            continue
        panel = inner[:, first * height : last * height].T @ x
        panel = pad(panel, (0, 0, 0, (last - first) * height - panel.shape[0]))
        by_tile = panel.view(last - first, height, columns, width)
        for index, (begin, end) in of_rows.items():
            tile_rows, tile_columns = (torch.from_numpy(at[begin:end]) for at in decoder.coordinates[index])
            of_tiles = by_tile[(tile_rows - first).to(x.device), :, tile_columns.to(x.device)]
            if begin < end:
                _add(program, pools, (index, begin, end), by_segment[index], of_tiles, gradients)
    return {name: gradient.to(pools[name].dtype) for name, gradient in gradients.items()}


def _add(
    program: TileProgram,
    pools: Pools,
    run: tuple[int, int, int],
    planes: list[Plane],
    of_tiles: Tensor,
    gradients: Mapping[str, Tensor],
) -> None:
    """Add the gradients of tiles `[T, BM, BK]`, a run (segment, begin, end) of them, where their planes stand."""
    segment, begin, end = run
    held = tile_planes(program, segment, pools, begin, end)
    leaves = [held[plane.name].detach().requires_grad_() for plane in planes]
    with _recording():
        given = {**held, **{plane.name: leaf for plane, leaf in zip(planes, leaves, strict=True)}}
        tiles = program.segments[segment].resolve().decode(given, program.tile, program.dtype)
    found = torch.autograd.grad(tiles, leaves, of_tiles.to(tiles.dtype))
    for plane, gradient in zip(planes, found, strict=True):
        into = gradients[pool_name(segment, plane.name)]
        if plane.kind is PlaneKind.RAGGED:
            ptr = pools[f"{pool_name(segment, plane.name)}_ptr"]
            into[int(ptr[begin]) : int(ptr[end])] = gradient
        else:
            slots = plane_slots(plane, *tile_coordinates(program, segment))[begin:end]
            into.index_add_(0, torch.from_numpy(slots).to(into.device), gradient.to(into.dtype))
