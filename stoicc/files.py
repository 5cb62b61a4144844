"""What the command line reads and writes: files of weights, artefacts, and places to write to."""

import difflib
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stoicc.io import IR_KEY, VERSION_KEY
from stoicc.ir.dtypes import DTYPE_NAMES, TORCH_DTYPES, WEIGHT_DTYPES
from stoicc.ir.errors import InputError, StoiccError, brief


def is_artefact(file: Path) -> bool:
    """Whether a file, whatever its suffix, says that `Kernel.save` wrote it; its content is not verified."""
    if not os.path.isfile(file):
        return False
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return IR_KEY in metadata or VERSION_KEY in metadata


def read_weight(file: Path, tensor: str | None = None, dtype: str | None = None) -> Tensor:
    """The matrix of a .npy, a scipy .npz, or a named tensor of a .safetensors file.

    Args:
        tensor: which one of a .safetensors file; may be left out where it has one matrix only.
        dtype: "f32", "f16" or "bf16" to convert to, which rounds; default: the file's own.

    Raises:
        InputError: no such file or tensor, a broken file, or a dtype that weights do not have.
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise InputError(f"--dtype: expected {', '.join(WEIGHT_DTYPES)}, found {dtype!r}")
    if not os.path.exists(file):
        raise InputError(f"weight file: expected a file, found nothing at {file}")
    if file.suffix not in (".npy", ".npz", ".safetensors"):
        raise InputError(f"weight file {file}: expected .safetensors, .npy or .npz, found {file.suffix or 'no suffix'}")
    try:
        weight = _from_safetensors(file, tensor) if file.suffix == ".safetensors" else _from_numpy(file)
    except StoiccError:
        raise
    except Exception as error:  # a broken file meets numpy, zipfile, zlib and more, each with errors of its own
        found = brief(str(error)) or type(error).__name__
        raise InputError(f"weight file {file}: expected a readable {file.suffix} file, found {found}") from None
    return _converted(weight, file, dtype)


def check_output(output: Path, source: Path) -> None:
    """InputError where an artefact cannot be written: known before anything is compiled."""
    if os.path.isdir(output):
        raise InputError(f"--output {output}: expected a file to write, found a folder; name a file in it")
    if not os.path.isdir(output.parent):
        raise InputError(f"--output {output}: expected a folder {output.parent} to write to, found none; create it")
    if os.path.exists(output) and os.path.exists(source) and output.samefile(source):
        raise InputError(f"--output {output}: expected another file, found the one that is read; name a new file")


def _from_numpy(file: Path) -> Tensor:
    # opened here: numpy leaves a file open that turns out to be broken
    with file.open("rb") as opened:
        values: NDArray[Any] = np.load(opened) if file.suffix == ".npy" else scipy.sparse.load_npz(opened).toarray()
    # torch has no foreign byte orders
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))


def _from_safetensors(file: Path, tensor: str | None) -> Tensor:
    with safe_open(file, framework="pt", device="cpu") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        if not matrices:
            raise InputError(f"weight file {file}: expected a matrix, found none among its tensors ({len(shapes)})")
        if tensor is None and len(matrices) == 1:
            tensor = matrices[0]
        if tensor not in matrices:
            near = difflib.get_close_matches(tensor or "", matrices, n=3) or matrices[:5]
            found = "none given" if tensor is None else brief(repr(tensor))
            shape = f" of shape {shapes[tensor]}" if tensor in shapes else ""
            of = "the one matrix" if len(matrices) == 1 else f"one of the {len(matrices)} matrices"
            raise InputError(
                f"weight file {file}: expected --tensor to name {of}, found {found}{shape}; "
                f"for example {', '.join(near)}"
            )
        values: Tensor = opened.get_tensor(tensor)
        return values


def _converted(weight: Tensor, file: Path, dtype: str | None) -> Tensor:
    """The weight in the dtype asked for; without one it must have a dtype of weights already."""
    own = DTYPE_NAMES.get(weight.dtype, str(weight.dtype).removeprefix("torch."))
    if weight.is_complex():
        raise InputError(f"weight file {file}: expected real numbers, found {own}")
    if dtype is None:
        if own not in WEIGHT_DTYPES:
            raise InputError(
                f"weight file {file}: expected dtype {', '.join(WEIGHT_DTYPES)}, found {own}; "
                "convert it with --dtype f32, which rounds"
            )
        return weight
    converted = weight.to(TORCH_DTYPES[dtype])
    infinite = converted.isinf()
    if bool(infinite.any()) and bool(weight[infinite].double().isfinite().any()):
        raise InputError(
            f"--dtype {dtype}: expected values in its range, found larger ones in {file}; "
            "use a wider dtype, or scale the weight"
        )
    return converted
