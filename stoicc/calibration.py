"""Measures what the CPU cost model needs to know of a device: its executors, on small weights of one format.

Executors are called as a user calls them, `kernel(x)`, and nothing is assumed of how they work; a constant is
what remains of a time when what is known already is taken off. One pass takes less than a minute:

    python -m stoicc.calibration
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from stoicc.compiler import compile as compile_weight
from stoicc.formats import formats as registered
from stoicc.inspector import inspect
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import StoiccError
from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format
from stoicc.kernel import Kernel
from stoicc.passes.cost_cpu import CpuConstants, Curve, Key
from stoicc.pools import TiledWeight

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batches at which tiles are measured."""

GEMM_BATCHES = (1, 4, 16, 64, 256, 1024)
DTYPES = ("bf16", "f32")
TILES = ((64, 64), (32, 32), (128, 128))
"""What is measured at once; other dtypes and tile shapes when they are first met."""

SHAPE = (512, 1024)
"""Of the weights that are measured in cache."""

SETS = (4 << 20, 32 << 20, 128 << 20, 640 << 20)
"""Working sets, in bytes, at which reading is measured; the last is beyond most caches."""

_PIPELINE = "drop-empty,build-csr,split-k{{parts={parts}}},balance{{bins=256}},fuse-epilogue,regimes{{tiles={tiles}}}"
_ALL = 1 << 20
_REPEATS, _SAMPLE_S = 9, 1e-4

Step = Callable[[str], None]
"""Called before each measurement with what is measured: moves a progress bar."""


def steps(threads: int) -> int:
    """How many times `calibrate` calls its `step`."""
    return 1 + len(DTYPES) * (2 + len(TILES) * len(_stored()) + len(_stored()) + 1) + len(_powers(threads))


def calibrate(step: Step) -> CpuConstants:
    """Measure the constants of this device at torch's number of threads. Its formats are those registered."""
    threads = torch.get_num_threads()
    step("call")
    call = _calls(threads)
    bandwidth = {count: _reading(count, step) for count in _powers(threads)}
    _never_slower(bandwidth)
    items: dict[str, Curve] = {}
    pack: dict[str, Curve] = {}
    tiles: dict[Key, Curve] = {}
    decode: dict[str, Curve] = {}
    gemm: dict[str, dict[int, Curve]] = {}
    for dtype in DTYPES:
        step(f"items of {dtype}")
        pack[dtype], items[dtype] = _pack_and_items(dtype, call[1])
        step(f"gemm of {dtype}")
        linear = {count: _linear(dtype, count) for count in {1, threads}}
        for fmt in _stored():
            for tile in TILES:
                step(f"{fmt}, {dtype}, {tile[0]}x{tile[1]}")
                tiles |= tile_seconds(fmt, dtype, tile, call[1], pack[dtype], items[dtype])
            step(f"{fmt}, {dtype}, decoded")
            decode |= decode_seconds(fmt, dtype, call, linear)
        step(f"empty, {dtype}, decoded")
        decode |= decode_seconds(find_format("empty"), dtype, call, linear)
        gemm[dtype] = {count: _gemm(dtype, count, call, decode[f"dense|{dtype}"]) for count in {1, threads}}
    join, speedup = _join(), _speedup(threads, call)
    return CpuConstants("measured", call, bandwidth, tiles, items, pack, join, speedup, decode, gemm)


def measure_format(fmt: TileFormat, dtype: str, tile: tuple[int, int], known: CpuConstants) -> CpuConstants | None:
    """The constants with those of one more format, dtype and tile shape; None where no weight can be made of it."""
    near = dtype if dtype in known.items else "f32"
    call, threads = known.call, torch.get_num_threads()
    try:
        tiles = tile_seconds(fmt, dtype, tile, call[min(call)], known.pack[near], known.items[near])
        linear = {count: _linear(dtype, count) for count in {1, threads}}
        decode = {} if f"{fmt}|{dtype}" in known.decode else decode_seconds(fmt, dtype, call, linear)
    except StoiccError:
        return None
    return known.with_tiles(tiles, decode) if tiles else None


# -- weights -----------------------------------------------------------------------------------


def _stored() -> tuple[TileFormat, ...]:
    """Registered formats that store something and have C code."""
    found = [find_format(name) for name in registered()]
    return tuple(fmt for fmt in found if fmt.planes((64, 64), "bf16") and fmt.tile_mac((64, 64), "bf16") is not None)


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
    with torch_threads(1):
        nothing = run_seconds(kernel_of(weight_of(dense, "f32", (64, 64), (64, 64))), 1)
        alone = run_seconds(kernel_of(weight_of(dense, "f32", (64, 64))), 1)
    if threads == 1:
        return {1: nothing}
    together = run_seconds(kernel_of(weight_of(dense, "f32", (64, 64))), 1)
    return {1: nothing, threads: max(nothing, together - (alone - nothing) / threads)}


def _pack_and_items(dtype: str, call: float) -> tuple[Curve, Curve]:
    """Seconds per column of x, and per row of an item, by batch, on one thread.

    A wide weight of empty tiles is all packing; a tall one and a square one of equal bytes differ by their items.
    """
    dense = find_format("dense")
    area = SHAPE[0] * SHAPE[1]
    with torch_threads(1):
        wide = kernel_of(weight_of(dense, dtype, (64, 64), (64, 16384), empty=True))
        tall = kernel_of(weight_of(dense, dtype, (64, 64), (area // 64, 64)))
        square = kernel_of(weight_of(dense, dtype, (64, 64)))
        pack = {batch: max(0.0, run_seconds(wide, batch) - call) / 16384 for batch in BATCHES}
        items = {}
        for batch in BATCHES:
            more = run_seconds(tall, batch) - run_seconds(square, batch) + pack[batch] * (SHAPE[1] - 64)
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
    with torch_threads(1):
        for batch in BATCHES:
            rest = call + pack[batch] * SHAPE[1] + items[batch] * SHAPE[0]
            total = run_seconds(kernel, batch)
            curve[batch] = max(total - rest, total / 4) / count
    return {(str(fmt), dtype, *tile): _grow(curve)}


def decode_seconds(fmt: TileFormat, dtype: str, call: Curve, linear: dict[int, float]) -> dict[str, Curve]:
    """Seconds per weight that dense-once decodes, by threads."""
    tile = (64, 64)
    kernel = kernel_of(weight_of(fmt, dtype, tile), "dense-once")
    curve = {}
    for threads, product in linear.items():
        with torch_threads(threads):
            total = run_seconds(kernel, 1)
        curve[threads] = max(total - call[_nearest(threads, call)] - product, 0.0) / (SHAPE[0] * SHAPE[1])
    return {f"{fmt}|{dtype}": curve}


def _linear(dtype: str, threads: int) -> float:
    """Seconds of the vendor's product with one row of x, for a weight as large as those that are decoded."""
    weight, x = torch.zeros(SHAPE, dtype=TORCH_DTYPES[dtype]), torch.zeros(1, SHAPE[1], dtype=TORCH_DTYPES[dtype])
    with torch_threads(threads):
        return seconds_of(lambda: torch.nn.functional.linear(x, weight))


def _gemm(dtype: str, threads: int, call: Curve, decode: Curve) -> Curve:
    """Seconds per multiply-add of dense-once by batch."""
    shape = (1024, 2048)
    macs = shape[0] * shape[1]
    kernel = kernel_of(weight_of(find_format("dense"), dtype, (64, 64), shape), "dense-once")
    known = call[_nearest(threads, call)] + decode[_nearest(threads, decode)] * macs
    with torch_threads(threads):
        totals = {batch: run_seconds(kernel, batch) for batch in GEMM_BATCHES}
    return {batch: max(total - known, total / 4) / (macs * batch) for batch, total in totals.items()}


def _join() -> float:
    """Seconds per fp32 sum of one part of a split tile row, written, read and added, on one thread."""
    tiled, parts, batch = weight_of(find_format("dense"), "f32", (64, 64)), 8, 16
    with torch_threads(1):
        whole, split = (run_seconds(kernel_of(tiled, parts=count), batch) for count in (1, parts))
    return max(split - whole, 0.0) / (parts * SHAPE[0] * batch)


def _speedup(threads: int, call: Curve) -> Curve:
    """How much faster than one thread all of them run what is bound by compute."""
    kernel = kernel_of(weight_of(find_format("dense"), "f32", (64, 64), (64 * max(8, 4 * threads), 1024)))
    with torch_threads(1):
        alone = run_seconds(kernel, 16) - call[1]
    together = run_seconds(kernel, 16) - call[threads]
    return {1: 1.0, threads: min(float(threads), max(1.0, alone / max(together, 1e-9)))}


def _reading(threads: int, step: Step) -> dict[int, float]:
    """Bytes read per second by working set: what a sum over integers reaches."""
    step(f"reading, {threads} threads")
    longest = torch.ones(SETS[-1] // 8, dtype=torch.int64)
    with torch_threads(threads):
        return {size: size / seconds_of(longest[: size // 8].sum, repeats=5) for size in SETS}


# -- timing ------------------------------------------------------------------------------------


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's number of threads within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_seconds(kernel: Kernel, batch: int) -> float:
    """Seconds of `kernel(x)`, its weight in cache."""
    x: Tensor = torch.ones(batch, kernel.in_features, dtype=TORCH_DTYPES[kernel.program.dtype])
    with torch.no_grad():
        return seconds_of(lambda: kernel(x))


def seconds_of(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The lower quartile of repeated times: what else the machine does only ever adds."""
    call()
    start = time.perf_counter()
    call()
    inner = max(1, round(_SAMPLE_S / max(time.perf_counter() - start, 1e-9)))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        samples.append((time.perf_counter() - start) / inner)
    return float(np.quantile(samples, 0.25))


# -- curves ------------------------------------------------------------------------------------


def _grow(curve: Curve) -> Curve:
    """The curve made to grow with the batch: a smaller time at a larger batch is noise in the one before."""
    points = sorted(curve)
    lowest = np.minimum.accumulate([curve[point] for point in reversed(points)])[::-1]
    return dict(zip(points, lowest.tolist(), strict=True))


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


def _nearest(threads: int, known: Iterable[int]) -> int:
    return min(known, key=lambda count: abs(count - threads))


def main() -> None:
    """Measure this CPU anew and say where the constants are."""
    from stoicc.device_constants import calibrate as calibrate_and_store
    from stoicc.device_constants import constants_file

    calibrate_and_store()
    print(constants_file())


if __name__ == "__main__":
    main()
