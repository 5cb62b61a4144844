"""The invariants of a tile program, one rule each."""

from collections import Counter

import numpy as np

from stoicc.ir.dtypes import TORCH_DTYPES, WEIGHT_DTYPES
from stoicc.ir.errors import FormatError
from stoicc.ir.factors import stored_bits
from stoicc.ir.format import Plane, PlaneKind
from stoicc.ir.planes import entry_count, pool_name, tile_coordinates
from stoicc.ir.rules import Rule, broken, check_numbers, check_texts, rule
from stoicc.ir.types import ACTIVATIONS, TILE_SIZES, CodedFactor, Module, Pool, Segment, TileProgram

PROGRAM_RULES: list[Rule] = []


@rule(PROGRAM_RULES, "program-values")
def _values(module: Module) -> None:
    """Every name is text and every number an integer that the parser reads back."""
    program = module.tiles
    check_texts("program, name and dtype", (program.name, program.dtype))
    check_numbers(f"{_name(module)}, shape and tile", (*program.shape, *program.tile))
    check_numbers(f"{_name(module)}, tile map", program.tile_map)
    for index, segment in enumerate(program.segments):
        check_texts(f"segment %{index}, format", (segment.format,))
        check_numbers(f"{_segment(index, segment)}, count and bytes", (segment.count, *segment.tile_bytes))
    for pool in program.pools():
        check_texts(f"{_name(module)}, a pool's name, dtype and digest", (pool.name, pool.dtype, pool.digest))
        check_numbers(f"{_name(module)}, pool {pool.name}, shape", pool.shape)
    if program.beside.activation is not None:
        check_texts(f"{_name(module)}, beside activation", (program.beside.activation,))


@rule(PROGRAM_RULES, "shape", "program-values")
def _shape(module: Module) -> None:
    shape = module.tiles.shape
    if len(shape) != 2 or min(shape) < 1:
        raise broken(_name(module), "a shape [M, K] of at least [1, 1]", list(shape), "give the shape of the weight")


@rule(PROGRAM_RULES, "tile", "program-values")
def _tile(module: Module) -> None:
    tile = module.tiles.tile
    if len(tile) != 2 or any(extent not in TILE_SIZES for extent in tile):
        found = "x".join(str(extent) for extent in tile)
        raise broken(_name(module), "a tile of powers of two from 16 to 256", found, "choose another tile")


@rule(PROGRAM_RULES, "dtype", "program-values")
def _dtype(module: Module) -> None:
    if module.tiles.dtype not in WEIGHT_DTYPES:
        raise broken(_name(module), f"dtype {' or '.join(WEIGHT_DTYPES)}", repr(module.tiles.dtype), "cast the weight")


@rule(PROGRAM_RULES, "map-length", "shape", "tile")
def _map_length(module: Module) -> None:
    rows, columns = module.tiles.grid
    found = len(module.tiles.tile_map)
    if found != rows * columns:
        raise broken(
            _name(module), f"a tile map of {rows} x {columns} = {rows * columns} tiles", found, "map every tile"
        )


@rule(PROGRAM_RULES, "map-index", "map-length")
def _map_index(module: Module) -> None:
    segments = len(module.tiles.segments)
    # not map_array(), which holds 32 bits
    tile_map = np.asarray(module.tiles.tile_map, dtype=np.int64).reshape(module.tiles.grid)
    wrong = np.argwhere((tile_map < 0) | (tile_map >= segments))
    if len(wrong):
        row, column = wrong[0].tolist()
        found = f"%{tile_map[row, column]}"
        raise broken(
            f"{_name(module)}, tile ({row}, {column})",
            f"one of {segments} segments",
            found,
            "add it or map the tile anew",
        )


@rule(PROGRAM_RULES, "segment-format", "program-values")
def _segment_format(module: Module) -> None:
    for index, segment in enumerate(module.tiles.segments):
        try:
            segment.resolve()
        except FormatError as error:
            raise broken(
                _segment(index, segment),
                "the text of a registered format",
                f"none: {error}",
                "register the format first",
            ) from None


@rule(PROGRAM_RULES, "segment-unique", "program-values")
def _segment_unique(module: Module) -> None:
    seen: dict[str, int] = {}
    for index, segment in enumerate(module.tiles.segments):
        if segment.format in seen:
            raise broken(
                _segment(index, segment), "one segment per format", f"another, %{seen[segment.format]}", "merge the two"
            )
        seen[segment.format] = index


@rule(PROGRAM_RULES, "segment-count", "map-index")
def _segment_count(module: Module) -> None:
    counts = np.bincount(module.tiles.map_array().ravel(), minlength=len(module.tiles.segments))
    for index, segment in enumerate(module.tiles.segments):
        if segment.count != counts[index]:
            raise broken(
                _segment(index, segment),
                f"a count of {counts[index]}, as in the tile map",
                segment.count,
                "correct one",
            )


@rule(PROGRAM_RULES, "tile-bytes", "program-values")
def _tile_bytes(module: Module) -> None:
    for index, segment in enumerate(module.tiles.segments):
        sizes = segment.tile_bytes
        if sizes and (len(sizes) != segment.count or min(sizes) < 0):
            found = f"{len(sizes)} of at least {min(sizes)}"
            raise broken(
                _segment(index, segment), f"bytes >= 0 of each of its {segment.count} tiles", found, "give all or none"
            )


@rule(PROGRAM_RULES, "segment-planes", "tile", "dtype", "segment-format")
def _segment_planes(module: Module) -> None:
    for index, segment in enumerate(module.tiles.segments):
        try:
            segment.resolve().planes(module.tiles.tile, module.tiles.dtype)
        except FormatError as error:
            raise broken(
                _segment(index, segment),
                f"a format that fits tiles of {_by(module.tiles.tile)}",
                f"none: {error}",
                "change the tile or the format",
            ) from None


@rule(PROGRAM_RULES, "segment-pools", "segment-planes")
def _segment_pools(module: Module) -> None:
    for index, segment in enumerate(module.tiles.segments):
        planes = segment.resolve().planes(module.tiles.tile, module.tiles.dtype)
        expected = [name for plane in planes for name in _pool_names(index, plane)]
        found = [pool.name for pool in segment.pools]
        if expected != found:
            raise broken(
                _segment(index, segment),
                f"pools {_listed(expected)}",
                _listed(found),
                "name a pool for every plane, in order",
            )


@rule(PROGRAM_RULES, "pool-type", "segment-pools", "map-index")
def _pool_type(module: Module) -> None:
    for index, segment in enumerate(module.tiles.segments):
        rows, columns = tile_coordinates(module.tiles, index)
        pools = {pool.name: pool for pool in segment.pools}
        for plane in segment.resolve().planes(module.tiles.tile, module.tiles.dtype):
            pool = pools[pool_name(index, plane.name)]
            where = f"{_segment(index, segment)}, pool {pool.name}"
            if plane.kind is PlaneKind.RAGGED:
                _check_ragged(where, plane, pool, pools[pool_name(index, f"{plane.name}_ptr")], rows.size)
            else:
                _check_pool(where, pool, plane.dtype, (entry_count(plane, rows, columns), *plane.shape))


@rule(PROGRAM_RULES, "pool-unique", "program-values")
def _pool_unique(module: Module) -> None:
    name, times = next(iter(Counter(pool.name for pool in module.tiles.pools()).most_common(1)), ("", 0))
    if times > 1:
        raise broken(
            f"{_name(module)}, pool {name}", "a name of its own for every pool", f"{times} of it", "rename one"
        )


@rule(PROGRAM_RULES, "beside-bias", "shape", "dtype")
def _beside_bias(module: Module) -> None:
    _beside_vector(module, "bias", _float_dtypes(module), module.tiles.shape[0])


@rule(PROGRAM_RULES, "beside-scale", "shape", "dtype")
def _beside_scale(module: Module) -> None:
    _beside_vector(module, "input_scale", _float_dtypes(module), module.tiles.shape[1])
    _beside_vector(module, "output_scale", _float_dtypes(module), module.tiles.shape[0])


@rule(PROGRAM_RULES, "beside-permutation", "shape")
def _beside_permutation(module: Module) -> None:
    _beside_vector(module, "row_permutation", ("i32",), module.tiles.shape[0])
    _beside_vector(module, "column_permutation", ("i32",), module.tiles.shape[1])


@rule(PROGRAM_RULES, "beside-low-rank", "shape", "dtype")
def _beside_low_rank(module: Module) -> None:
    if module.tiles.beside.low_rank is None:
        return
    left, right = module.tiles.beside.low_rank
    for factor in (left, right):
        if isinstance(factor, CodedFactor):
            _check_codes(f"{_name(module)}, beside low_rank, {factor.codes.name}", factor)
    rows, columns = module.tiles.shape
    fits = len(left.shape) == len(right.shape) == 2 and (left.shape[0], right.shape[1]) == (rows, columns)
    if not fits or left.shape[1] != right.shape[0] or left.shape[1] < 1:
        raise broken(
            f"{_name(module)}, beside low_rank",
            f"factors [{rows}, r] and [r, {columns}] with r >= 1",
            f"{list(left.shape)} and {list(right.shape)}",
            "give both factors in the order of y and x",
        )
    if left.dtype != right.dtype or left.dtype not in _float_dtypes(module):
        raise broken(
            f"{_name(module)}, beside low_rank",
            f"both factors in one of {', '.join(_float_dtypes(module))}",
            f"{left.dtype} and {right.dtype}",
            "cast the factors",
        )


@rule(PROGRAM_RULES, "beside-activation", "program-values")
def _beside_activation(module: Module) -> None:
    activation = module.tiles.beside.activation
    if activation is not None and activation not in ACTIVATIONS:
        raise broken(
            f"{_name(module)}, beside activation",
            f"one of {', '.join(ACTIVATIONS)}",
            repr(activation),
            "apply it after",
        )


# -- helpers -------------------------------------------------------------------------------


def _check_codes(where: str, factor: CodedFactor) -> None:
    """Bytes and scales for every column of every row."""
    check_numbers(f"{where}, bits, group and columns", (factor.bits, factor.group_size, factor.columns))
    if not 2 <= factor.bits <= 8 or factor.group_size < 0 or factor.columns < 1:
        found = f"{factor.bits} bits, groups of {factor.group_size}, {factor.columns} columns"
        raise broken(where, "2 to 8 bits, groups of 0 or more, a column", found, "quantize the factor again")
    rows = factor.codes.shape[0] if factor.codes.shape else 0
    groups = -(-factor.columns // (factor.group_size or factor.columns))
    _check_pool(where, factor.codes, "u8", (rows, -(-factor.columns * stored_bits(factor.bits) // 8)))
    _check_pool(where, factor.scales, factor.scales.dtype, (rows, groups))


def _beside_vector(module: Module, field: str, dtypes: tuple[str, ...], length: int) -> None:
    pool: Pool | None = getattr(module.tiles.beside, field)
    if pool is not None and (pool.shape != (length,) or pool.dtype not in dtypes):
        expected = f"{' or '.join(dtypes)} of shape [{length}]"
        raise broken(
            f"{_name(module)}, beside {field}", expected, _typed(pool.dtype, pool.shape), "convert the tensor first"
        )


def _float_dtypes(module: Module) -> tuple[str, ...]:
    """What a vector or factor beside the tiles may be stored in."""
    return tuple(dict.fromkeys(("f32", module.tiles.dtype)))


def _pool_names(segment: int, plane: Plane) -> list[str]:
    name = pool_name(segment, plane.name)
    return [name, f"{name}_ptr"] if plane.kind is PlaneKind.RAGGED else [name]


def _check_pool(where: str, pool: Pool, dtype: str, shape: tuple[int, ...]) -> None:
    if pool.dtype != dtype or pool.shape != shape or dtype not in TORCH_DTYPES:
        raise broken(where, _typed(dtype, shape), _typed(pool.dtype, pool.shape), "encode the tiles again")


def _check_ragged(where: str, plane: Plane, pool: Pool, offsets: Pool, tiles: int) -> None:
    elements = pool.shape[0] if pool.shape else 0
    _check_pool(where, pool, plane.dtype, (elements, *plane.shape))
    if offsets.dtype not in ("i32", "i64") or offsets.shape != (tiles + 1,):
        raise broken(
            f"{where}_ptr", f"i32 or i64[{tiles + 1}]", _typed(offsets.dtype, offsets.shape), "encode the tiles again"
        )


def _name(module: Module) -> str:
    return f"program {module.tiles.name!r}"


def _segment(index: int, segment: Segment) -> str:
    return f"segment %{index}, format {segment.format}"


def _typed(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{', '.join(str(extent) for extent in shape)}]"


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _by(tile: tuple[int, int]) -> str:
    return f"{tile[0]}x{tile[1]}"


def stores_something(program: TileProgram, segment: int) -> bool:
    """Whether tiles of this segment have payload, so that an executor must visit them."""
    return bool(program.segments[segment].resolve().planes(program.tile, program.dtype))
