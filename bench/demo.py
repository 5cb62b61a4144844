"""The demo: every linear layer of a real sentence encoder becomes a mosaic, and still works.

    make demo

Tiles are ranked within their layer by the energy that they give to the output (weights times the
root mean square of their inputs); shares of the ranking become empty, 2:4 with int4, 2:4, int4 and
dense tiles: a fixed recipe to show every format, not a tuned one. The table gives tiles per
format, bytes per weight, the error of the layer's output on real inputs, and time against
`F.linear` of the dense layer in the same run.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import stoicc
from bench.minilm import encoder_linears, layer_inputs, load_model, replace_layer, sentences
from bench.timing import interleaved_medians

TILE = (64, 64)
RECIPE = (("empty", 0.02), ("int4 on 2:4", 0.05), ("2:4", 0.05), ("int4", 0.68), ("dense", 0.20))
"""Shares of a layer's tiles, from the least energy to the most."""


@dataclass(frozen=True)
class LayerResult:
    """One row of the table."""

    name: str
    kernel: stoicc.Kernel
    error: float
    speed: dict[int, float]


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
    empty, int4_on_24, on_24, int4 = (kinds == index for index in range(4))
    compressed = stoicc.ops.nm_magnitude(weight, 0, 4, where=empty, tile=TILE)
    compressed = stoicc.ops.nm_magnitude(compressed, 2, 4, where=int4_on_24 | on_24, tile=TILE)
    return stoicc.ops.group_absmax(compressed, bits=4, group_size=64, where=int4_on_24 | int4, tile=TILE)


def compile_layer(name: str, layer: nn.Linear, inputs: Tensor, batches: tuple[int, ...]) -> LayerResult:
    """Compile one layer, check it against its own compressed weight, measure error and time."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    compressed = mosaic(weight, inputs)
    kernel = stoicc.compile(compressed, bias=bias, name=name)
    if not torch.equal(kernel.to_dense(), compressed.dense()):
        raise SystemExit(f"{name}: the kernel does not hold the compressed weight")
    dense = F.linear(inputs, weight, bias)
    error = ((kernel(inputs) - dense).norm() / (dense - bias).norm()).item()
    speed = {}
    for batch in batches:
        x = inputs[:batch].contiguous()
        calls = {"dense": partial(F.linear, x, weight, bias), "mosaic": partial(kernel, x)}
        times = interleaved_medians(calls, 9, 5e-4)
        speed[batch] = times["dense"] / times["mosaic"]
    return LayerResult(name, kernel, error, speed)


def table_of(results: list[LayerResult], batches: tuple[int, ...]) -> Table:
    """The table per layer."""
    table = Table(title="all-MiniLM-L6-v2, every encoder layer a mosaic")
    for column in ("layer", "shape", "empty", "int4_nv24", "nv24", "int4", "dense", "bytes/weight", "error"):
        table.add_column(column, justify="left" if column in ("layer", "shape") else "right")
    for batch in batches:
        table.add_column(f"speed @{batch}", justify="right")
    for result in results:
        stats = result.kernel.stats()
        tiles = Counter({entry.format: entry.tiles for entry in stats.formats})
        counts = [str(tiles[name]) for name in ("empty", "int4_nv24", "nv24", "int4", "dense")]
        shape = f"{result.kernel.out_features}x{result.kernel.in_features}"
        speeds = [f"{result.speed[batch]:.2f}" for batch in batches]
        short = (
            result.name.partition("encoder.layer.")[2]
            .replace("attention.self", "attn")
            .replace("attention.output", "attn.out")
        )
        table.add_row(short, shape, *counts, f"{stats.bytes_per_weight:.2f}", f"{result.error:.3f}", *speeds)
    return table


def draw_mosaic(kernel: stoicc.Kernel, path: Path) -> None:
    """A PNG of one layer: each tile in the colour of its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    colours = ["#f2f2f2", "#8ecae6", "#219ebc", "#ffb703", "#023047", "#fb8500", "#606c38", "#bc6c25"]
    segments = kernel.program.segments
    palette = [colours[index % len(colours)] for index in range(len(segments))]
    figure, axes = pyplot.subplots(figsize=(9, 2.9), layout="constrained")
    norm = BoundaryNorm(range(len(segments) + 1), len(segments))
    axes.pcolormesh(
        kernel.program.map_array(), cmap=ListedColormap(palette), norm=norm, edgecolors="white", linewidth=1.2
    )
    axes.invert_yaxis()
    axes.set(
        aspect="equal",
        xlabel=f"tile columns of {kernel.program.tile[1]} inputs",
        ylabel="tile rows",
        title=kernel.program.name,
    )
    handles = [
        Patch(color=colour, label=f"{s.format} ({s.count})") for colour, s in zip(palette, segments, strict=True)
    ]
    figure.legend(handles=handles, loc="outside right center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Compile every layer, put it back, compare embeddings, print the table, draw a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, default=Path("mosaic.png"))
    parser.add_argument("--layers", type=int, default=36, help="compile only the first so many layers")
    arguments = parser.parse_args()
    console, start, batches = Console(width=150), time.perf_counter(), (1, 16, 256)
    model, texts = load_model(), sentences(160)
    layers = dict(list(encoder_linears(model).items())[: arguments.layers])
    inputs = layer_inputs(model, layers, texts[:32])
    with torch.no_grad():
        before = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
        results = []
        with Progress(console=console) as progress:
            for name, layer in progress.track(layers.items(), description="compiling layers"):
                results.append(compile_layer(name, layer, inputs[name], batches))
                replace_layer(model, name, results[-1].kernel)
        after = model.encode(texts, convert_to_tensor=True, show_progress_bar=False)
    console.print(table_of(results, batches))
    cosine = F.cosine_similarity(before, after)
    payload = sum(r.kernel.stats().payload_bytes + r.kernel.stats().beside_bytes for r in results)
    dense = sum(r.kernel.stats().dense_bytes for r in results)
    console.print(
        f"{len(results)} layers: {payload / 1e6:.2f} MB of payload against {dense / 1e6:.2f} MB dense in f32; "
        f"{torch.get_num_threads()} threads. speed @n: time of F.linear in f32 over the mosaic's at a batch of n "
        "tokens, warm: these layers fit in the cache, so bytes saved are not time saved here (see bench.cpu)."
    )
    console.print(
        f"cosine similarity of {len(texts)} sentence embeddings to the dense model's: mean {cosine.mean():.4f}, "
        f"least {cosine.min():.4f} (a fixed recipe, no error compensation)."
    )
    shown = max(results, key=lambda result: result.kernel.in_features)
    draw_mosaic(shown.kernel, arguments.png)
    console.print(f"the mosaic of {shown.name}: {arguments.png}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
