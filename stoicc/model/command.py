"""`stoicc compress` and `stoicc report`: whole models from a shell."""

from pathlib import Path
from typing import Annotated

import typer

from stoicc.ir.errors import InputError
from stoicc.model.compress import compress
from stoicc.model.recipe import Recipe
from stoicc.model.reporting import report, report_folder
from stoicc.model.saving import check_new, save_model
from stoicc.model.sources import read_calibration, read_model


def compress_command(
    model: Annotated[str, typer.Argument(help="file.py:function that returns it, or a folder of transformers")],
    recipe: Annotated[str, typer.Option(help="a YAML file, or YAML: '[{nm_magnitude: {n: 2, m: 4}}, group_absmax]'")],
    output: Annotated[Path, typer.Option("-o", "--output", help="a new folder for the compressed model")],
    calibration: Annotated[
        str | None, typer.Option(help="file.py:function that returns batches; for a folder also a text file")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="a folder that keeps finished layers of a run")] = None,
    independent: Annotated[
        bool, typer.Option("--independent", help="calibrate each layer on what dense layers before it produce")
    ] = False,
) -> None:
    """Compress the linear layers of a model by a recipe, print a table, and write the result.

    `stoicc.load_model(model, folder)` puts it into a model again.
    """
    chosen = Recipe.of(Path(recipe) if _is_file(recipe) else recipe)
    check_new(output)
    module = read_model(model)
    batches = None if calibration is None else read_calibration(calibration, module, model)
    compress(module, chosen, batches, sequential=not independent, resume=resume)
    typer.echo(report(module))
    save_model(module, output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    typer.echo(f"wrote {output} ({size:,d} bytes)")


def report_command(
    folder: Annotated[Path, typer.Argument(help="what `stoicc compress` wrote")],
) -> None:
    """Print the table of a compressed model: a row for each layer."""
    typer.echo(report_folder(folder))


def _is_file(recipe: str) -> bool:
    """A path to a file, and no YAML; a path that is none says so."""
    try:
        exists = Path(recipe).is_file()
    except (OSError, ValueError):  # too long for a path
        return False
    if not exists and recipe.endswith((".yaml", ".yml")):
        raise InputError(f"--recipe: expected a file or YAML, found nothing at {recipe}")
    return exists
