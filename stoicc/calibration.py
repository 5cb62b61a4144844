"""Measures what the CPU cost model needs to know of a device: its executors, on small weights of one format.

Executors are called as a user calls them, `kernel(x)`, and nothing is assumed of how they work; a constant is
what remains of a time when what is known already is taken off. One pass takes less than a minute:

    python -m stoicc.calibration
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch

from stoicc.calibration_timing import (
    BATCHES,
    VISITS,
    by_batch,
    least_seconds,
    out_of_cache,
    seconds_of,
    torch_threads,
)
from stoicc.compiler import compile as compile_weight
from stoicc.inspector import inspect
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import StoiccError
from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format
from stoicc.kernel import Kernel
from stoicc.passes.cost_cpu import CpuConstants, Curve, Key, at, by_size, for_batch
from stoicc.pools import TiledWeight

GEMM_BATCHES = (1, 4, 16, 64, 256, 1024)
DTYPES = ("bf16", "f32")
TILES = ((64, 64), (32, 32), (128, 128))
"""What is measured at once; other dtypes and tile shapes when they are first met."""

FORMATS = ("dense", "nv24", "bitmap", "int8", "int4", "int4_nv24")
"""Formats that are measured at once; each takes seconds at every dtype and tile shape, so others when first met."""

SHAPE = (256, 2048)
"""Of the weights that are measured in cache."""

DECODED = (2048, 2048)
"""Of the weights that dense-once decodes: panels are larger than the innermost caches."""

SETS = (4 << 20, 32 << 20, 128 << 20, 640 << 20)
"""Working sets, in bytes, at which reading is measured; the last is beyond most caches."""

_PIPELINE = "drop-empty,build-csr,split-k{{parts={parts}}},balance{{bins=256}},fuse-epilogue,regimes{{tiles={tiles}}}"
_ALL = 1 << 20
_READ_BYTES = 8 << 20

Step = Callable[[str], None]
"""Called before each measurement with what is measured: moves a progress bar."""


def steps(threads: int) -> int:
    """How many times `calibrate` calls its `step`."""
    return 2 + len(DTYPES) * (2 + (len(TILES) + 1) * len(_stored())) + 2 * len(_powers(threads))


def calibrate(step: Step) -> CpuConstants:
    """Measure the constants of this device at torch's number of threads, of FORMATS."""
    threads = torch.get_num_threads()
    step("call")
    call = _calls(threads)
    dense, rows = find_format("dense"), 64 * max(8, 4 * threads)
    product = kernel_of(weight_of(dense, "f32", (64, 64), (rows, 1024)))
    decoder = kernel_of(weight_of(dense, "bf16", (64, 64), DECODED), "dense-once")
    speedup, decoding = (_speedup(kernel, batch, threads, call) for kernel, batch in ((product, 16), (decoder, 1)))
    bandwidth = {count: _reading(count, step) for count in _powers(threads)}
    items: dict[str, Curve] = {}
    pack: dict[str, Curve] = {}
    tiles: dict[Key, Curve] = {}
    exposed: dict[str, float] = {}
    decode: dict[Key, float] = {}
    gemm: dict[str, dict[int, Curve]] = {}
    gemm_call: dict[str, dict[int, Curve]] = {}
    for dtype in DTYPES:
        step(f"items of {dtype}")
        pack[dtype], items[dtype] = _pack_and_items(dtype, call[1])
        step(f"gemm of {dtype}")
        linear = _linear(dtype)
        for fmt in _stored():
            for tile in TILES:
                step(f"{fmt}, {dtype}, {tile[0]}x{tile[1]}")
                tiles |= tile_seconds(fmt, dtype, tile, call[1], pack[dtype], items[dtype])
                decode |= decode_seconds(fmt, dtype, tile, call[1], linear)
            step(f"{fmt}, {dtype}, read")
            exposed |= exposed_reading(fmt, dtype, TILES[0], tiles[str(fmt), dtype, *TILES[0]], bandwidth[1])
        for tile in TILES:
            decode |= decode_seconds(find_format("empty"), dtype, tile, call[1], linear)
        alone = decode["dense", dtype, *TILES[0]]
        both = {count: _gemm(dtype, count, alone / at(decoding, count), bandwidth[count]) for count in {1, threads}}
        gemm[dtype] = {count: rates for count, (rates, _) in both.items()}
        gemm_call[dtype] = {count: calls for count, (_, calls) in both.items()}
    # what threads share once more, as what else a machine does comes and goes
    step("call")
    call = _best(min, call, _calls(threads))
    speedup = _best(max, speedup, _speedup(product, 16, threads, call))
    decoding = _best(max, decoding, _speedup(decoder, 1, threads, call))
    for count, curve in bandwidth.items():
        for size, rate in _reading(count, step).items():
            curve[size] = max(curve[size], rate)
    _never_slower(bandwidth)
    join, join_call = _join(threads)
    return CpuConstants(
        "measured", call, bandwidth, tiles, exposed, items, pack, join, join_call,
        speedup, decode, decoding, gemm, gemm_call,
    )  # fmt: skip


def measure_format(fmt: TileFormat, dtype: str, tile: tuple[int, int], known: CpuConstants) -> CpuConstants | None:
    """The constants with those of one more format, dtype and tile shape; None where no weight can be made of it."""
    near = dtype if dtype in known.items else "f32"
    call = known.call
    try:
        tiles = tile_seconds(fmt, dtype, tile, call[min(call)], known.pack[near], known.items[near])
        key, name = (str(fmt), dtype, *tile), f"{fmt}|{dtype}"
        if not tiles:
            return None
        read = {}
        if name not in known.exposed:
            read = exposed_reading(fmt, dtype, tile, tiles[key], known.bandwidth[min(known.bandwidth)])
        decode = decode_seconds(fmt, dtype, tile, call[min(call)], _linear(dtype))
    except StoiccError:
        return None
    return known.joined(tiles, read, decode)


# -- weights -----------------------------------------------------------------------------------


def _stored() -> tuple[TileFormat, ...]:
    """The formats that are measured at once."""
    return tuple(find_format(name) for name in FORMATS)


def weight_of(
    fmt: TileFormat, dtype: str, tile: tuple[int, int], shape: tuple[int, int] = SHAPE, empty: bool = False
) -> TiledWeight:
    """A weight of random values, all of whose tiles have one format; `empty`: only those of the first tile column.

    Values are brought to the format by its lossy door; where it has none, the tiles are zeros.
    """
    grid = -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[dtype])
    rows = [[str(fmt), *([str(fmt) if not empty else "empty"] * (grid[1] - 1))] for _ in range(grid[0])]
    try:
        return inspect(values, tile=tile, tile_map=rows, approximate=True)
    except StoiccError:
        return inspect(torch.zeros_like(values), tile=tile, tile_map=rows)


def kernel_of(tiled: TiledWeight, kind: str = "tiles", parts: int = 1) -> Kernel:
    """A kernel with one executor at every batch."""
    text = _PIPELINE.format(parts=parts, tiles=_ALL if kind == "tiles" else 0)
    return compile_weight(tiled, target="cpu", pipeline=text)


# -- pieces ------------------------------------------------------------------------------------


def _calls(threads: int) -> Curve:
    """Seconds of a call with next to nothing to do; with more threads, of waking and joining them as well."""
    dense = find_format("dense")
    least, small = (kernel_of(weight_of(dense, "f32", (64, 64), shape)) for shape in ((64, 64), SHAPE))
    with torch_threads(1):
        nothing, alone = least_seconds(least, 1), least_seconds(small, 1)
    if threads == 1:
        return {1: nothing}
    together = least_seconds(small, 1)
    return {1: nothing, threads: max(nothing, together - (alone - nothing) / threads)}


def _pack_and_items(dtype: str, call: float) -> tuple[Curve, Curve]:
    """Seconds per column of x, and per row of an item, by batch, on one thread.

    A wide weight of empty tiles is all packing; a tall one and a square one of equal bytes differ by their items.
    """
    dense = find_format("dense")
    area = SHAPE[0] * SHAPE[1]
    wide = kernel_of(weight_of(dense, dtype, (64, 64), (64, 16384), empty=True))
    tall = kernel_of(weight_of(dense, dtype, (64, 64), (area // 64, 64)))
    square = kernel_of(weight_of(dense, dtype, (64, 64)))
    pack = {batch: max(0.0, total - call) / 16384 for batch, total in by_batch(wide).items()}
    high, level, items = by_batch(tall), by_batch(square), {}
    for batch in BATCHES:
        more = high[batch] - level[batch] + pack[batch] * (SHAPE[1] - 64)
        items[batch] = max(0.0, more) / (area // 64 - SHAPE[0])
    return _grow(pack), _grow(items)


def tile_seconds(
    fmt: TileFormat, dtype: str, tile: tuple[int, int], call: float, pack: Curve, items: Curve
) -> dict[Key, Curve]:
    """Seconds of a tile in cache by batch, on one thread; nothing where the format does not meet the tile."""
    try:
        tiled = weight_of(fmt, dtype, tile)
    except StoiccError:
        return {}
    kernel, count = kernel_of(tiled), SHAPE[0] * SHAPE[1] // (tile[0] * tile[1])
    curve = {}
    for batch, total in by_batch(kernel).items():
        rest = call + for_batch(pack, batch) * SHAPE[1] + for_batch(items, batch) * SHAPE[0]
        curve[batch] = max(total - rest, total / 4) / count
    return {(str(fmt), dtype, *tile): _grow(curve)}


def exposed_reading(
    fmt: TileFormat, dtype: str, tile: tuple[int, int], tiles: Curve, bandwidth: Curve
) -> dict[str, float]:
    """What a kernel's arithmetic does not hide of the time to read its bytes, as a share of that time, on one thread.

    Another buffer is read before each call, so that the weight is out of the caches; so is what a call
    itself needs, which a weight of one tile tells.
    """
    size = SETS[2]
    cost = fmt.cost(tile, dtype).bytes / (tile[0] * tile[1])
    shape = (1024, max(4, min(64, round(_READ_BYTES / max(cost, 0.01) / 1024 / 256))) * 256)
    kernel, least = (kernel_of(weight_of(fmt, dtype, tile, extents)) for extents in (shape, tile))
    reading = kernel.stats().payload_bytes / by_size(bandwidth, size)
    other = torch.zeros(size // 8, dtype=torch.int64)
    shares = []
    with torch_threads(1):
        for batch in (1, 16):
            seconds, call = (out_of_cache(each, batch, other) for each in (kernel, least))
            arithmetic = tiles[batch] * shape[0] * shape[1] / (tile[0] * tile[1])
            shares.append((seconds - call - arithmetic) / reading)
    return {f"{fmt}|{dtype}": min(max(float(np.mean(shares)), 0.0), 2.0)}


def decode_seconds(fmt: TileFormat, dtype: str, tile: tuple[int, int], call: float, product: float) -> dict[Key, float]:
    """Seconds per weight that dense-once decodes, on one thread; `product` is what its BLAS takes at batch 1."""
    kernel = kernel_of(weight_of(fmt, dtype, tile, DECODED), "dense-once")
    kernel.executor("tiles")  # which packs planes, as calls of a small batch do
    with torch_threads(1):
        total = least_seconds(kernel, 1)
    return {(str(fmt), dtype, *tile): max(total - call - product, total / 10) / (DECODED[0] * DECODED[1])}


def _linear(dtype: str) -> float:
    """Seconds of the vendor's product with one row of x, for a weight as large as those that are decoded."""
    weight, x = (torch.zeros(rows, DECODED[1], dtype=TORCH_DTYPES[dtype]) for rows in (DECODED[0], 1))
    with torch_threads(1):
        return min(seconds_of(lambda: torch.nn.functional.linear(x, weight)) for _ in range(VISITS))


def _gemm(dtype: str, threads: int, decode: float, bandwidth: Curve) -> tuple[Curve, Curve]:
    """Seconds per multiply-add of dense-once by batch, and per call besides: from a large and a small weight.

    Both are out of the caches when they are called; so is a tile by itself, whose call is taken off.
    """
    dense, size = find_format("dense"), SETS[2]
    shapes = ((2048, 4096), (256, 1024))
    kernels = [kernel_of(weight_of(dense, dtype, (64, 64), shape), "dense-once") for shape in shapes]
    kernels.append(kernel_of(weight_of(dense, dtype, (64, 64), (64, 64))))
    for kernel in kernels:
        kernel.executor("tiles")
    other = torch.zeros(size // 8, dtype=torch.int64)
    per_weight = decode + torch.finfo(TORCH_DTYPES[dtype]).bits / 8 / by_size(bandwidth, size)
    (large, small), rates, calls = (shape[0] * shape[1] for shape in shapes), {}, {}
    with torch_threads(threads):
        for batch in GEMM_BATCHES:
            big, little, call = (out_of_cache(kernel, batch, other) for kernel in kernels)
            slope = max((big - little) / (large - small), big / large / 4)  # whatever disturbed the small one
            rates[batch] = max(slope - per_weight, slope / 4) / batch
            calls[batch] = max(little - call - slope * small, 0.0)
    return rates, {1: float(np.median(list(calls.values())))}


def _join(threads: int) -> tuple[Curve, Curve]:
    """What splits cost: per row of a part by batch, on one thread, and per call by threads."""
    tiled, parts = weight_of(find_format("dense"), "f32", (64, 64)), 8
    whole, halves, split = (kernel_of(tiled, parts=count) for count in (1, 2, parts))
    few, many, none = by_batch(halves), by_batch(split), by_batch(whole)
    join = _grow({batch: max(many[batch] - few[batch], 0.0) / ((parts - 2) * SHAPE[0]) for batch in BATCHES})
    calls = {1: max(few[1] - none[1] - 2 * SHAPE[0] * join[1], 0.0)}
    if threads > 1:
        with torch_threads(threads):
            calls[threads] = max(least_seconds(halves, 1) - least_seconds(whole, 1), calls[1])
    return join, calls


def _speedup(kernel: Kernel, batch: int, threads: int, call: Curve) -> Curve:
    """How much faster than one thread all of them run a kernel."""
    if threads == 1:
        return {1: 1.0}
    with torch_threads(1):
        alone = least_seconds(kernel, batch) - call[1]
    together = least_seconds(kernel, batch) - call[threads]
    return {1: 1.0, threads: min(float(threads), max(1.0, alone / max(together, 1e-9)))}


def _reading(threads: int, step: Step) -> dict[int, float]:
    """Bytes read per second by working set: what a sum over integers reaches."""
    step(f"reading, {threads} threads")
    longest = torch.ones(SETS[-1] // 8, dtype=torch.int64)
    with torch_threads(threads):
        return {size: size / seconds_of(longest[: size // 8].sum, repeats=5) for size in SETS}


# -- curves ------------------------------------------------------------------------------------


def _grow(curve: Curve) -> Curve:
    """The curve made to grow with the batch: where it falls, that is noise, in the middle of which it is put."""
    points = sorted(curve)
    values = np.array([curve[point] for point in points])
    least, most = np.minimum.accumulate(values[::-1])[::-1], np.maximum.accumulate(values)
    return dict(zip(points, ((least + most) / 2).tolist(), strict=True))


def _best(choose: Callable[[float, float], float], first: Curve, again: Curve) -> Curve:
    """Of a curve that was measured twice, the better value at each point."""
    return {point: choose(first[point], again[point]) for point in first}


def _never_slower(bandwidth: dict[int, dict[int, float]]) -> None:
    """More threads read at least as fast, and a smaller set is read at least as fast, as far as the model goes."""
    best: dict[int, float] = {}
    for threads in sorted(bandwidth):
        curve, fastest = bandwidth[threads], 0.0
        for size in sorted(curve, reverse=True):
            fastest = max(fastest, curve[size], best.get(size, 0.0))
            best[size] = curve[size] = fastest


def _powers(threads: int) -> Sequence[int]:
    """1, 2, 4, ... and the number itself."""
    return sorted({threads, *(1 << p for p in range(threads.bit_length()) if 1 << p <= threads)})


def main() -> None:
    """Measure this CPU anew and say where the constants are."""
    from stoicc.device_constants import calibrate as calibrate_and_store
    from stoicc.device_constants import constants_file

    argparse.ArgumentParser(description="Measures this CPU for the cost model; under a minute.").parse_args()
    calibrate_and_store()
    print(constants_file())


if __name__ == "__main__":
    main()
