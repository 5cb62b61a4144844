"""The command line: `stoicc inspect | compile | opt`.

stoicc inspect weight.npy
stoicc compile model.safetensors --tensor fc.weight --prune 2:4 --quantize 4 -o fc.stoicc.safetensors
stoicc opt program.tile --pipeline "drop-empty,build-csr,split-k{parts=4}"
"""

import difflib
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.sparse
import torch
import typer
from safetensors import safe_open
from torch import Tensor

import stoicc
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import InputError, StoiccError, brief
from stoicc.ir.printer import print_module
from stoicc.ir.types import Module
from stoicc.passes.pipeline import run_text
from stoicc.targets import backend_named

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Compile weight matrices to mosaic kernels.")

WeightFile = Annotated[Path, typer.Argument(help="a .safetensors, .npy or scipy .npz file")]
TensorName = Annotated[str | None, typer.Option("--tensor", help="which tensor of a .safetensors file")]
Formats = Annotated[str | None, typer.Option(help="formats to choose from, separated by ';'")]
TileShape = Annotated[str, typer.Option(help="tile shape BMxBK")]
Exact = Annotated[bool, typer.Option("--exact", help="print the whole IR, as `stoicc.ir.parse` reads it")]


@app.command()
def inspect(
    file: WeightFile,
    tensor: TensorName = None,
    formats: Formats = None,
    tile: TileShape = "64x64",
    exact: Exact = False,
) -> None:
    """Print the tile IR of a weight: which format each tile has."""
    weight = read_weight(file, tensor)
    tiled = stoicc.inspect(weight, _formats(formats), _tile(tile), name=_name(file, tensor))
    typer.echo(print_module(Module(tiled.program), exact=exact))


@app.command()
def compile(
    file: WeightFile,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the artefact here")] = None,
    tensor: TensorName = None,
    formats: Formats = None,
    tile: TileShape = "64x64",
    prune: Annotated[str | None, typer.Option(help="N:M magnitude pruning first, such as 2:4")] = None,
    quantize: Annotated[int | None, typer.Option(help="group AbsMax quantization to this many bits")] = None,
    group_size: Annotated[int, typer.Option(help="weights along K that share a scale; 0: the row")] = 64,
    pipeline: Annotated[str | None, typer.Option(help="scheduling passes, as text")] = None,
    emit: Annotated[str | None, typer.Option(help="print the emitted source: cpu or triton")] = None,
    show_ir: Annotated[bool, typer.Option("--ir", help="print the scheduled IR")] = False,
    exact: Exact = False,
) -> None:
    """Compile a weight matrix: inspect, schedule, count, and write an artefact.

    Lossless unless --prune or --quantize is given.
    """
    weight: Tensor | stoicc.ops.CompressedWeight = read_weight(file, tensor)
    if prune is not None:
        n, m = _pattern(prune)
        weight = stoicc.ops.nm_magnitude(weight, n, m)
    if quantize is not None:
        weight = stoicc.ops.group_absmax(weight, quantize, group_size)
    kernel = stoicc.compile(weight, _formats(formats), _tile(tile), pipeline=pipeline, name=_name(file, tensor))
    if show_ir:
        typer.echo(print_module(kernel.ir, exact=exact))
    if emit is not None:
        if emit not in ("cpu", "triton"):
            raise InputError(f"--emit: expected cpu or triton, found {emit!r}")
        typer.echo(backend_named(emit).emit(kernel.ir, TORCH_DTYPES[kernel.program.dtype]))
    typer.echo(kernel.stats())
    if output is not None:
        kernel.save(output)
        typer.echo(f"wrote {output} ({output.stat().st_size:,d} bytes)")


@app.command()
def opt(
    file: Annotated[Path, typer.Argument(help="a textual IR file (exact form)")],
    pipeline: Annotated[str, typer.Option(help="passes, such as 'drop-empty,build-csr,split-k{parts=4}'")],
    print_after_all: Annotated[bool, typer.Option("--print-after-all", help="print the IR after each pass")] = False,
    exact: Exact = False,
) -> None:
    """Run a pipeline of passes on textual IR and print the result."""
    typer.echo(run_text(_read_text(file), pipeline, print_after_all=print_after_all, exact=exact))


def read_weight(file: Path, tensor: str | None) -> Tensor:
    """The matrix of a .npy, a scipy .npz, or a named tensor of a .safetensors file."""
    if not os.path.exists(file):
        raise InputError(f"weight file: expected a file, found nothing at {file}")
    if file.suffix not in (".npy", ".npz", ".safetensors"):
        raise InputError(f"weight file {file}: expected .safetensors, .npy or .npz, found {file.suffix or 'no suffix'}")
    try:
        if file.suffix == ".safetensors":
            return _from_safetensors(file, tensor)
        # opened here: numpy leaves a file open that turns out to be broken
        with file.open("rb") as opened:
            return torch.from_numpy(
                np.load(opened) if file.suffix == ".npy" else scipy.sparse.load_npz(opened).toarray()
            )
    except StoiccError:
        raise
    except Exception as error:  # a broken file meets numpy, zipfile, zlib and more, each with errors of its own
        found = brief(str(error)) or type(error).__name__
        raise InputError(f"weight file {file}: expected a readable {file.suffix} file, found {found}") from None


def _read_text(file: Path) -> str:
    """The text of an IR file, which is UTF-8 on every machine."""
    if not os.path.exists(file):
        raise InputError(f"opt: expected a file of tile IR, found nothing at {file}")
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"opt: expected a file of tile IR, found at {file} {brief(str(error))}") from None


def _from_safetensors(file: Path, tensor: str | None) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        names = list(opened.keys())
        matrices = [name for name in names if len(opened.get_slice(name).get_shape()) == 2]
        if tensor is None and len(matrices) == 1:
            tensor = matrices[0]
        if tensor not in names:
            near = difflib.get_close_matches(tensor or "", names, n=3) or matrices[:5]
            raise InputError(
                f"weight file {file}: expected --tensor to name one of {len(names)} tensors, found {tensor!r}; "
                f"for example {', '.join(near)}"
            )
        found: Tensor = opened.get_tensor(tensor)
        return found


def _formats(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(";")]


def _tile(text: str) -> tuple[int, int]:
    try:
        rows, columns = (int(part) for part in text.split("x"))
    except ValueError:
        raise InputError(f"--tile: expected BMxBK such as 64x64, found {text!r}") from None
    return rows, columns


def _pattern(text: str) -> tuple[int, int]:
    try:
        n, m = (int(part) for part in text.split(":"))
    except ValueError:
        raise InputError(f"--prune: expected N:M such as 2:4, found {text!r}") from None
    return n, m


def _name(file: Path, tensor: str | None) -> str:
    return tensor or file.stem


def main() -> None:
    """Entry point: user errors are one sentence on stderr and exit status 2."""
    try:
        app()
    except StoiccError as error:
        typer.echo(f"stoicc: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
