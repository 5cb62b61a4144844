"""The demo: every linear layer of the encoder (36) of all-MiniLM-L6-v2 becomes a mosaic, and still works.

    make demo

Tiles are ranked within their layer by the energy that they give to the output (weights times the
root mean square of their inputs); shares of the ranking become empty, 2:4 with int4, 2:4, int4,
int8 and dense tiles: a fixed recipe to show every format, not a tuned one. The table gives tiles
per format, bytes per weight, the error of the layer's output on real inputs, and time against
`F.linear` of the dense layer in the same run.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import stoicc
from bench.minilm import encoder_linears, layer_inputs, load_model, replace_layer, sentences, short_name
from bench.timing import interleaved_medians

TILE = (64, 64)
RECIPE = (("empty", 0.02), ("int4 on 2:4", 0.03), ("2:4", 0.03), ("int4", 0.27), ("int8", 0.60), ("dense", 0.05))
"""Shares of a layer's tiles, from the least energy to the most."""
FORMATS = ("empty", "int4_nv24", "nv24", "int4", "int8", "dense")
BATCHES = (1, 16, 256)
SWEEPS, TIMING_S = 8, 25.0
"""A layer is timed so many times, the others in between: a burst of other work meets one sweep of it, not all.
No sweep starts after TIMING_S seconds: a busy machine gets fewer."""
LEGEND = """\
empty ... dense: tiles of 64 x 64 in that format. B/w: bytes per weight (f32 has 4).
error: relative Frobenius error of the layer's output on real inputs, bias excluded.
@n: time of F.linear in f32 over the mosaic's time for n tokens, same run (above 1: mosaic faster).
Each time is the least of the sweeps over all layers, a sweep's the median of interleaved rounds."""
COLOURS = {
    "empty": "#f2f2f2",
    "int4_nv24": "#fb8500",
    "nv24": "#ffb703",
    "int4": "#8ecae6",
    "int8": "#219ebc",
    "dense": "#023047",
}


@dataclass(frozen=True)
class LayerResult:
    """One row of the table.

    Attributes:
        speed: time of `F.linear` over the kernel's, by batch.
        dense_s: seconds of `F.linear`, by batch.
    """

    name: str
    kernel: stoicc.Kernel
    error: float
    speed: dict[int, float]
    dense_s: dict[int, float]

    @property
    def shape(self) -> str:
        return f"{self.kernel.out_features} x {self.kernel.in_features}"

    @property
    def tiles(self) -> Counter[str]:
        return Counter({entry.format: entry.tiles for entry in self.kernel.stats().formats})

    @property
    def bytes(self) -> int:
        return self.kernel.stats().payload_bytes + self.kernel.stats().beside_bytes


def ranks_to_kinds(weight: Tensor, inputs: Tensor) -> Tensor:
    """An index into RECIPE for each tile of `[M, K]`, by rank of the energy it gives to the output."""
    weight = weight * inputs.square().mean(0).sqrt()
    rows, columns = -(-weight.shape[0] // TILE[0]), -(-weight.shape[1] // TILE[1])
    padded = F.pad(weight, (0, columns * TILE[1] - weight.shape[1], 0, rows * TILE[0] - weight.shape[0]))
    energy = padded.view(rows, TILE[0], columns, TILE[1]).square().sum((1, 3)).flatten()
    share = energy.argsort().argsort() / energy.numel()
    bounds = torch.tensor([part for _, part in RECIPE]).cumsum(0)[:-1]
    return torch.bucketize(share, bounds, right=True).view(rows, columns)


def mosaic(weight: Tensor, inputs: Tensor) -> stoicc.ops.CompressedWeight:
    """The recipe as operators: drop, prune 2:4, quantize, each on its own tiles."""
    kinds = ranks_to_kinds(weight, inputs)
    empty, int4_on_24, on_24, int4, int8 = (kinds == index for index in range(5))
    compressed = stoicc.ops.nm_magnitude(weight, 0, 4, where=empty, tile=TILE)
    compressed = stoicc.ops.nm_magnitude(compressed, 2, 4, where=int4_on_24 | on_24, tile=TILE)
    compressed = stoicc.ops.group_absmax(compressed, bits=4, group_size=64, where=int4_on_24 | int4, tile=TILE)
    return stoicc.ops.group_absmax(compressed, bits=8, group_size=64, where=int8, tile=TILE)


def compile_layer(name: str, layer: nn.Linear, inputs: Tensor) -> tuple[stoicc.Kernel, float]:
    """The layer's kernel, checked against the compressed weight, and its error on these inputs."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    compressed = mosaic(weight, inputs)
    kernel = stoicc.compile(compressed, bias=bias, name=name)
    if not torch.equal(kernel.to_dense(), compressed.dense()):
        raise SystemExit(f"{name}: the kernel does not hold the compressed weight")
    dense = F.linear(inputs, weight, bias)
    return kernel, ((kernel(inputs) - dense).norm() / (dense - bias).norm()).item()


def time_layer(layer: nn.Linear, kernel: stoicc.Kernel, inputs: Tensor, batch: int) -> tuple[float, float]:
    """Seconds of `F.linear` and of the kernel on `batch` tokens: medians of interleaved rounds."""
    x = inputs[:batch].contiguous()
    calls = {"dense": partial(F.linear, x, layer.weight, layer.bias), "mosaic": partial(kernel, x)}
    times = interleaved_medians(calls, 3, 1e-3)
    return times["dense"], times["mosaic"]


def result_of(
    name: str, kernel: stoicc.Kernel, error: float, times: dict[int, list[tuple[float, float]]]
) -> LayerResult:
    """The least time of the sweeps on either side: other work on the machine only adds to one."""
    dense_s = {batch: min(dense for dense, _ in pairs) for batch, pairs in times.items()}
    speed = {batch: dense_s[batch] / min(ours for _, ours in pairs) for batch, pairs in times.items()}
    return LayerResult(name, kernel, error, speed, dense_s)


def by_shape(results: Sequence[LayerResult]) -> list[tuple[str, list[LayerResult]]]:
    """Layers of one shape together, in order within it."""
    ordered = sorted(results, key=lambda result: (result.kernel.in_features * result.kernel.out_features, result.shape))
    return [(shape, list(layers)) for shape, layers in groupby(ordered, lambda result: result.shape)]


def table_of(results: Sequence[LayerResult], batches: Sequence[int]) -> Table:
    """A row per layer, a section per shape, and totals: at most 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for column in ("layer", *FORMATS, "B/w", "error", *(f"@{batch}" for batch in batches)):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for shape, layers in by_shape(results):
        table.add_row(f"[bold]{shape}[/]")
        for result in layers:
            counts = [str(result.tiles[name]) for name in FORMATS]
            speeds = [f"{result.speed[batch]:.2f}" for batch in batches]
            stats = result.kernel.stats()
            table.add_row(
                short_name(result.name), *counts, f"{stats.bytes_per_weight:.2f}", f"{result.error:.3f}", *speeds
            )
        table.add_section()
    payload = sum(result.bytes for result in results)
    weights = sum(result.kernel.in_features * result.kernel.out_features for result in results)
    counts = [str(sum(result.tiles[name] for result in results)) for name in FORMATS]
    error = statistics.mean(result.error for result in results)
    table.add_row(f"all, {payload / 1e6:.1f} MB", *counts, f"{payload / weights:.2f}", f"{error:.3f}", style="bold")
    return table


def summary_of(results: Sequence[LayerResult], batches: Sequence[int]) -> Table:
    """A row per shape: `F.linear` at the first batch; median and range over the layers at each: 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("shape (layers)", no_wrap=True)
    for column in ("F.linear", *(f"@{batch}" for batch in batches)):
        table.add_column(column, justify="right", no_wrap=True)
    for shape, layers in by_shape(results):
        microseconds = 1e6 * statistics.median(result.dense_s[batches[0]] for result in layers)
        cells = [f"{microseconds:.0f} us"]
        for batch in batches:
            speeds = [result.speed[batch] for result in layers]
            cells.append(f"{statistics.median(speeds):.2f} ({min(speeds):.2f}-{max(speeds):.2f})")
        table.add_row(f"{shape} ({len(layers)})", *cells)
    return table


def draw_mosaic(kernel: stoicc.Kernel, path: Path) -> None:
    """A PNG of one layer: each tile in the colour of its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    program, tiles = kernel.program, kernel.program.map_array()
    palette = [COLOURS.get(segment.format, "#606c38") for segment in program.segments]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 7 * tiles.shape[0] / tiles.shape[1]), layout="constrained")
    norm = BoundaryNorm(range(len(palette) + 1), len(palette))
    axes.pcolormesh(tiles, cmap=ListedColormap(palette), norm=norm, edgecolors="white", linewidth=1.2)
    axes.invert_yaxis()
    for axis, count in ((axes.yaxis, tiles.shape[0]), (axes.xaxis, tiles.shape[1])):
        shown = range(0, count, -(-count // 24))
        axis.set_ticks([index + 0.5 for index in shown], labels=[str(index) for index in shown])
    axes.set(
        aspect="equal",
        xlabel=f"tile columns ({program.tile[1]} inputs each)",
        ylabel=f"tile rows ({program.tile[0]} outputs each)",
        title=short_name(program.name),
    )
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", label=f"{segment.format} ({segment.count})")
        for colour, segment in zip(palette, program.segments, strict=True)
    ]
    figure.legend(handles=handles, loc="outside center right", title="format (tiles)")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def time_all(
    layers: dict[str, nn.Linear], kernels: dict[str, stoicc.Kernel], inputs: dict[str, Tensor], progress: Progress
) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Times of every layer at every batch, one pair a sweep."""
    times: dict[str, dict[int, list[tuple[float, float]]]] = {name: {b: [] for b in BATCHES} for name in layers}
    start = time.perf_counter()
    for _ in progress.track(range(SWEEPS), description="timing layers   "):
        if times[next(iter(layers))][BATCHES[0]] and time.perf_counter() - start > TIMING_S:
            break
        for name, batch in product(layers, BATCHES):
            times[name][batch].append(time_layer(layers[name], kernels[name], inputs[name], batch))
    return times


def show(console: Console, results: Sequence[LayerResult], before: Tensor, after: Tensor, all_layers: bool) -> None:
    """Title, legend, table, summary, and what they say."""
    what = "every linear layer of the encoder" if all_layers else "the first linear layers of the encoder"
    console.print(f"\n[bold]all-MiniLM-L6-v2: {what} ({len(results)}) as a mosaic[/]")
    console.print(LEGEND, highlight=False)
    console.print(table_of(results, BATCHES))
    console.print(
        f"By shape: F.linear for 1 token, and @n as median (range) over layers; {torch.get_num_threads()} threads:"
    )
    console.print(summary_of(results, BATCHES))
    sizes = [result.kernel.stats().dense_bytes for result in results]
    console.print(
        f"These layers ({min(sizes) / 1e6:.1f}-{max(sizes) / 1e6:.1f} MB in f32) live in the cache and take "
        "microseconds, so the call's overhead dominates at batch 1: fewer bytes are not less time here. Large "
        "weights gain: see the table in README.md.",
        highlight=False,
    )
    cosine = F.cosine_similarity(before, after)
    console.print(
        f"\n{sum(result.bytes for result in results) / 1e6:.1f} MB against {sum(sizes) / 1e6:.1f} MB dense in f32. "
        f"Cosine similarity of {len(before)} sentence embeddings to the dense model's: mean {cosine.mean():.4f}, "
        f"least {cosine.min():.4f} (a fixed recipe, no error compensation).",
        highlight=False,
    )


def main() -> None:
    """Compile every layer, put it back, compare embeddings, print the tables, draw a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("mosaic.png"))
    parser.add_argument("--layers", type=int, default=36, help="compile only the first so many layers")
    arguments = parser.parse_args()
    console, start = Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=100)
    console.print("loading all-MiniLM-L6-v2")
    model, texts = load_model(), sentences(160)
    every = encoder_linears(model)
    layers = dict(list(every.items())[: arguments.layers])
    inputs = layer_inputs(model, layers, texts[:32])
    with torch.no_grad(), Progress(console=console) as progress:
        before = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        kernels, errors = {}, {}
        for name, layer in progress.track(layers.items(), description="compiling layers"):
            kernels[name], errors[name] = compile_layer(name, layer, inputs[name])
            replace_layer(model, name, kernels[name])
        after = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        times = time_all(layers, kernels, inputs, progress)
    results = [result_of(name, kernels[name], errors[name], times[name]) for name in layers]
    show(console, results, before, after, len(layers) == len(every))
    shown = max(results, key=lambda result: result.kernel.in_features)
    draw_mosaic(shown.kernel, arguments.png)
    console.print(
        f"\nThe mosaic of {short_name(shown.name)}: {arguments.png}; {time.perf_counter() - start:.0f} s in all",
        highlight=False,
    )


if __name__ == "__main__":
    main()
