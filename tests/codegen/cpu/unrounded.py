"""Mosaics of random codes with the matrix that they mean before any rounding, inputs that are hard
on number formats, and how close a product has to be."""

from dataclasses import replace

import torch
from torch import Tensor

from stoicc.codegen.cpu.backend import CpuBackend
from stoicc.codegen.executor import Executor
from stoicc.formats._affine import Affine
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES
from stoicc.ir.planes import pool_name, tile_planes
from tests.codegen.cpu.mosaics import Mosaic, mosaic, run

ULP = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}
LEAST = {"f32": 2.0**-126, "f16": 2.0**-24, "bf16": 2.0**-126}
"""Numbers of a dtype whose neighbours are as far apart as they are large, or that may be flushed to zero."""
SLACK = 2e-6
"""Relative error of a sum in fp32, or of 22 bits of x; one of three digits lost is twenty times that."""


def coded(
    shape: tuple[int, int],
    formats: tuple[str, ...],
    dtype: str,
    tile: tuple[int, int],
    scale: float | None = None,
    **options,
) -> Mosaic:
    """A mosaic whose codes and zero points are any, with the matrix of (code - zero) * scale in float64."""
    case = mosaic(shape, formats, dtype, tile, **options)
    program, pools = case.module.tiles, dict(case.pools)
    (rows, columns), (height, width) = program.grid, program.tile
    full = torch.zeros(rows, columns, height, width, dtype=torch.float64)
    for index, segment in enumerate(program.segments):
        fmt = segment.resolve()
        if not segment.count or not fmt.planes(program.tile, dtype):
            continue
        most = (1 << fmt.bits) - 1 if isinstance(fmt, Affine) else 255
        for name, limit in (("codes", 255), ("zeros", most)):
            if (pool := pools.get(pool_name(index, name))) is not None:
                pools[pool_name(index, name)] = torch.randint(0, limit + 1, pool.shape, dtype=torch.uint8)
        if scale is not None:
            pools[pool_name(index, "scales")] = torch.full_like(pools[pool_name(index, "scales")], scale)
        planes = tile_planes(program, index, pools)
        full[torch.from_numpy(program.map_array() == index)] = _matrix(fmt, planes, program.tile, dtype)
    matrix = full.permute(0, 2, 1, 3).reshape(rows * height, columns * width)[: shape[0], : shape[1]]
    return replace(case, pools=pools, weight=matrix.contiguous())


def _matrix(fmt, planes, tile, dtype) -> Tensor:
    if not isinstance(fmt, Affine):
        return fmt.decode(planes, tile, dtype).double()
    scales = planes["scales"].double()
    codes = fmt.unpack(planes, tile).double().unflatten(2, (scales.shape[2], -1))
    zeros = planes["zeros"].double()[..., None] if fmt.zero_points else 1 << (fmt.bits - 1)
    return ((codes - zeros) * scales[..., None]).flatten(2)


def build(case: Mosaic) -> Executor:
    return CpuBackend().build(case.module, case.pools, "tiles", "error")


def product(executor: Executor, case: Mosaic, x: Tensor) -> Tensor:
    return run(executor, x, case.module.tiles.dtype, case.module.tiles.shape[0])


def hard_inputs(batch: int, columns: int, dtype: torch.dtype, first: int = 0) -> Tensor:
    """Entries in turn: random, zero, of many binades, huge, one column, tiny, integers, subnormal."""
    x = torch.randn(batch, columns)
    largest, least = (100.0, 1e-6) if dtype == torch.float16 else (1e30, 1e-25)
    for entry in range(batch):
        match (entry + first) % 8:
            case 1:
                x[entry] = 0
            case 2:
                x[entry] *= torch.exp2(torch.randint(-20, 5, (columns,)))
            case 3:
                x[entry] *= largest
            case 4:
                x[entry] *= torch.arange(columns) == torch.randint(columns, ())
            case 5:
                x[entry] *= least
            case 6:
                x[entry] = torch.randint(-9, 10, (columns,))
            case 7:
                x[entry] *= 1e-7 if dtype == torch.float16 else 1e-41
    return x.to(dtype)


def assert_close(y: Tensor, x: Tensor, case: Mosaic) -> None:
    """Each number of y within half a unit in its last place of float64, and SLACK of its entry's size.

    That is the root mean square over rows, of y and of what y would be if no two products cancelled.
    """
    expected, squares = case.expected(x), x.double().square() @ case.weight.square().T
    size = torch.maximum(expected.square().mean(1), squares.mean(1)).sqrt()[:, None]
    name = DTYPE_NAMES[y.dtype]
    allowed = ULP[name] * 0.501 * expected.abs() + SLACK * size + LEAST[name]
    wrong = ~((y.double() - expected).abs() <= allowed)  # NaN is wrong
    if wrong.any():
        rows, entries = (wrong.any(axis).nonzero().flatten()[:8].tolist() for axis in (0, 1))
        most = ((y.double() - expected).abs() / allowed).nan_to_num(torch.inf).max()
        raise AssertionError(
            f"batch {len(x)}: {int(wrong.sum())} of {wrong.numel()} wrong, in rows {rows} and entries {entries}, "
            f"{most:.3g} times what is allowed"
        )


def assert_columns(executor: Executor, case: Mosaic, dtype: torch.dtype, batch: int) -> None:
    """Every column of the matrix comes back, to the bit, as the product with one column of the identity."""
    columns = case.module.tiles.shape[1]
    exact = case.weight.T.to(TORCH_DTYPES[case.module.tiles.dtype] if dtype != torch.float32 else dtype)
    identity = torch.eye(columns, dtype=dtype)
    for first in range(0, columns, batch):
        y = product(executor, case, identity[first : first + batch])
        wrong = y != exact[first : first + batch]
        if wrong.any():
            entry, row = wrong.nonzero()[0].tolist()
            raise AssertionError(
                f"batch {batch}: weight at row {row}, column {first + entry} is {y[entry, row].item()}, "
                f"expected {exact[first + entry, row].item()}; {int(wrong.sum())} of {wrong.numel()} differ"
            )
