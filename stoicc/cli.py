"""The command line: `stoicc inspect | compile | tune | opt | compress | report`.

stoicc inspect weight.npy
stoicc compile model.safetensors --tensor fc.weight --prune 2:4 --quantize 4 -o fc.stoicc.safetensors
stoicc compile fc.stoicc.safetensors --emit cpu > fc.c
stoicc tune fc.stoicc.safetensors --batch 1,16 -o tuned.safetensors
stoicc opt program.tile --pipeline "drop-empty,build-csr,split-k{parts=4}"
stoicc compress model.py:load --recipe recipe.yaml --calibration model.py:batches -o compressed
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

import stoicc
from stoicc.files import check_output, is_artefact, read_weight
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.errors import InputError, StoiccError, brief
from stoicc.ir.options import split_list
from stoicc.ir.printer import print_module
from stoicc.ir.registry import find_format
from stoicc.ir.types import Module
from stoicc.model.command import compress_command, report_command
from stoicc.passes.pipeline import run_text
from stoicc.targets import backend_named

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Compile weight matrices to mosaic kernels.")

EMITTERS = {"cpu": "cpu", "triton": "triton", "cuda": "triton"}
"""The backend that `--emit` names; cuda is the target that triton serves."""

WeightFile = Annotated[Path, typer.Argument(help="a .safetensors, .npy or scipy .npz file, or an artefact of stoicc")]
TensorName = Annotated[str | None, typer.Option("--tensor", help="which tensor of a .safetensors file")]
Formats = Annotated[str | None, typer.Option(help="formats to choose from, separated by ',' or ';'")]
TileShape = Annotated[str | None, typer.Option(help="tile shape BMxBK; 64x64 if left out")]
Dtype = Annotated[str | None, typer.Option(help="convert to f32, f16 or bf16 first; this rounds")]
Prune = Annotated[str | None, typer.Option(help="N:M magnitude pruning first, such as 2:4")]
Quantize = Annotated[
    int | None, typer.Option(help="group AbsMax quantization; bits: 2 to 4 or 8 with the built-in formats")
]
GroupSize = Annotated[int, typer.Option(help="with --quantize: weights along K that share a scale; 0: the row")]
Exact = Annotated[bool, typer.Option("--exact", help="print the whole IR, as `stoicc.ir.parse` reads it")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stoicc {stoicc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Compile weight matrices to mosaic kernels."""


@app.command()
def inspect(
    file: WeightFile,
    tensor: TensorName = None,
    formats: Formats = None,
    tile: TileShape = None,
    dtype: Dtype = None,
    exact: Exact = False,
) -> None:
    """Print the tile IR of a weight: which format each tile has. Of an artefact: its IR and, on stderr, its counts."""
    if is_artefact(file):
        _refuse(file, {"--tensor": tensor, "--formats": formats, "--tile": tile, "--dtype": dtype})
        kernel = stoicc.load(file)
        typer.echo(print_module(kernel.ir, exact=exact))
        typer.echo(kernel.stats(), err=True)
        return
    weight = read_weight(file, tensor, dtype)
    tiled = stoicc.inspect(weight, _formats(formats), _tile(tile), name=_name(file, tensor))
    typer.echo(print_module(Module(tiled.program), exact=exact))


@app.command()
def compile(
    file: WeightFile,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the artefact here")] = None,
    tensor: TensorName = None,
    formats: Formats = None,
    tile: TileShape = None,
    dtype: Dtype = None,
    prune: Prune = None,
    quantize: Quantize = None,
    group_size: GroupSize = 64,
    pipeline: Annotated[str | None, typer.Option(help="scheduling passes, as text")] = None,
    emit: Annotated[str | None, typer.Option(help="print the emitted source: cpu, or triton (alias cuda)")] = None,
    show_ir: Annotated[bool, typer.Option("--ir", help="print the scheduled IR")] = False,
    exact: Exact = False,
) -> None:
    """Compile a weight matrix: inspect, schedule, count, and write an artefact.

    Lossless unless --dtype, --prune or --quantize is given. An artefact keeps its
    tiles; --pipeline schedules it anew. With --ir or --emit the counts go to stderr.
    """
    if emit is not None and emit not in EMITTERS:
        raise InputError(f"--emit: expected cpu, triton or cuda, found {emit!r}")
    if output is not None:
        check_output(output, file)
    if is_artefact(file):
        taken = {"--tensor": tensor, "--formats": formats, "--tile": tile, "--dtype": dtype}
        _refuse(file, {**taken, "--prune": prune, "--quantize": quantize})
        kernel = stoicc.load(file)
        if pipeline is not None:
            kernel = stoicc.compile(kernel, pipeline=pipeline)
    else:
        weight = _compressed(read_weight(file, tensor, dtype), prune, quantize, group_size, formats)
        kernel = stoicc.compile(weight, _formats(formats), _tile(tile), pipeline=pipeline, name=_name(file, tensor))
    if show_ir:
        typer.echo(print_module(kernel.ir, exact=exact))
    if emit is not None:
        typer.echo(backend_named(EMITTERS[emit]).emit(kernel.ir, TORCH_DTYPES[kernel.program.dtype]))
    # what is printed may go to a file that `opt` or a compiler reads
    beside = show_ir or emit is not None
    typer.echo(kernel.stats(), err=beside)
    if output is not None:
        kernel.save(output)
        typer.echo(f"wrote {output} ({output.stat().st_size:,d} bytes)", err=beside)


app.command("compress")(compress_command)
app.command("report")(report_command)


@app.command()
def tune(
    file: WeightFile,
    batch: Annotated[str, typer.Option(help="rows of x to tune for, such as 1,16,64")] = "1,16,64",
    budget: Annotated[float, typer.Option(help="seconds that tuning may take, compiling included")] = 20.0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="write the tuned artefact here")] = None,
    tensor: TensorName = None,
    formats: Formats = None,
    dtype: Dtype = None,
    prune: Prune = None,
    quantize: Quantize = None,
    group_size: GroupSize = 64,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure anew, whatever is remembered")] = False,
) -> None:
    """Search the schedule that is fastest on this device, and print what was found.

    Tile shape, split-K, order, executors and more are ranked by the cost model; the best
    few are measured. Results are remembered: a second run measures nothing.
    """
    if output is not None:
        check_output(output, file)
    if is_artefact(file):
        taken = {"--tensor": tensor, "--formats": formats, "--dtype": dtype}
        _refuse(file, {**taken, "--prune": prune, "--quantize": quantize})
        result = stoicc.autotune(stoicc.load(file), _batches(batch), budget_s=budget, fresh=fresh)
    else:
        weight = _compressed(read_weight(file, tensor, dtype), prune, quantize, group_size, formats)
        chosen, name = _formats(formats), _name(file, tensor)
        result = stoicc.autotune(weight, _batches(batch), budget_s=budget, formats=chosen, name=name, fresh=fresh)
    typer.echo(result)
    if output is not None:
        result.kernel.save(output)
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


def _refuse(file: Path, options: dict[str, object]) -> None:
    """The tiles of an artefact are cut and encoded already: options that change them come too late."""
    if given := [option for option, value in options.items() if value is not None]:
        raise InputError(
            f"artefact {file}: expected no {', '.join(given)} with tiles that are cut already, found it given; "
            "compile the weight itself"
        )


def _compressed(
    weight: Tensor, prune: str | None, quantize: int | None, group_size: int, formats: str | None
) -> Tensor | stoicc.ops.CompressedWeight:
    """The weight after --prune and --quantize."""
    compressed: Tensor | stoicc.ops.CompressedWeight = weight
    if prune is not None:
        compressed = stoicc.ops.nm_magnitude(compressed, *_pattern(prune))
    if quantize is not None:
        known = (find_format(name) for name in stoicc.formats())
        held = any(fmt.for_codes(quantize, group_size, False) is not None for fmt in known)
        if formats is None and not held:
            raise InputError(
                f"--quantize: expected bits of a format (2 to 4 or 8 with the built-in ones), found {quantize}; "
                "use --quantize 4, or --formats dense to store values of 2 to 8 bits as floats"
            )
        compressed = stoicc.ops.group_absmax(compressed, quantize, group_size)
    return compressed


def _read_text(file: Path) -> str:
    """The text of an IR file, which is UTF-8 on every machine."""
    if not os.path.exists(file):
        raise InputError(f"opt: expected a file of tile IR, found nothing at {file}")
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"opt: expected a file of tile IR, found at {file} {brief(str(error))}") from None


def _formats(text: str | None) -> list[str] | None:
    """Formats of a list; a ',' between < and > belongs to a format's options."""
    return None if text is None else [part.strip() for part in split_list(text, ",;")]


def _tile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        rows, columns = (int(part) for part in text.split("x"))
    except ValueError:
        raise InputError(f"--tile: expected BMxBK such as 64x64, found {text!r}") from None
    return rows, columns


def _batches(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--batch: expected batch sizes such as 1,16,64, found {text!r}") from None


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
