"""What a user may give as a weight or a tile map, made into tensors with one clear complaint."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from stoicc.ir.dtypes import DTYPE_NAMES, WEIGHT_DTYPES
from stoicc.ir.errors import FormatError, InputError
from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
FormatLike: TypeAlias = str | TileFormat
TileMap: TypeAlias = Sequence[Sequence[FormatLike]] | np.ndarray


def on_cpu(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run a function where a default device, or autograd, of the caller's cannot reach its tensors."""

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch.device("cpu"), torch.no_grad():
            return function(*args, **kwargs)

    return run


def as_matrix(weight: object) -> Tensor:
    """A weight as a contiguous `[M, K]` tensor on the CPU, without a copy where it is one already."""
    if isinstance(weight, (scipy.sparse.spmatrix, scipy.sparse.sparray)):
        weight = weight.toarray()
    if isinstance(weight, np.ndarray):
        weight = _from_numpy(weight)
    if not isinstance(weight, Tensor):
        raise InputError(
            f"weight: expected a torch tensor, numpy array, scipy sparse matrix or operator's result, "
            f"found {type(weight).__name__}"
        )
    if weight.is_meta:
        raise InputError("weight: expected values, found a tensor on the meta device; load the weight first")
    weight = weight.detach()
    if weight.layout is not torch.strided:
        weight = weight.to_dense()
    if weight.ndim != 2:
        raise InputError(f"weight: expected a matrix [out, in], found {weight.ndim}-D of shape {list(weight.shape)}")
    if 0 in weight.shape:
        raise InputError(f"weight: expected at least one row and column, found shape {list(weight.shape)}")
    if DTYPE_NAMES.get(weight.dtype) not in WEIGHT_DTYPES:
        raise InputError(
            f"weight: expected dtype {', '.join(WEIGHT_DTYPES)}, found {weight.dtype}; convert it with .to"
        )
    return weight.cpu().contiguous()


def _from_numpy(weight: NDArray[Any]) -> Tensor:
    if np.ma.isMaskedArray(weight):
        raise InputError("weight: expected plain values, found a masked array; fill it first")
    if weight.dtype.name not in ("float16", "float32"):
        raise InputError(
            f"weight: expected dtype {', '.join(WEIGHT_DTYPES)}, found {weight.dtype}; convert it with .astype"
        )
    native = np.ascontiguousarray(weight, dtype=weight.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count (inference mode)."""
    return 0 if tensor.is_inference() else tensor._version


def as_formats(formats: Sequence[FormatLike]) -> tuple[TileFormat, ...]:
    """Formats from texts and objects, each known to the registry under the text that it prints as."""
    if isinstance(formats, (str, TileFormat)):
        raise InputError(f"formats: expected a list, found {formats!r:.60}; write [...] around it")
    return tuple(dict.fromkeys(as_format(entry) for entry in formats))


def as_format(entry: object) -> TileFormat:
    """One format; FormatError where its text would be read back as another."""
    if not isinstance(entry, (str, TileFormat)):
        raise InputError(f"formats: expected texts or TileFormat instances, found {entry!r:.60}")
    fmt = find_format(entry)
    known = find_format(str(fmt))
    if known != fmt or type(known) is not type(fmt):
        raise FormatError(
            f"format {fmt}: expected the registered class of that name, found another with equal text; "
            "give it a name of its own and register it"
        )
    return fmt


def non_finite(values: Tensor) -> tuple[int, int, str] | None:
    """(row, column, "nan" or "inf") of the first value of a matrix that is not finite, if any."""
    low, high = values.aminmax()
    if bool(low.isfinite()) and bool(high.isfinite()):
        return None
    row, column = (~values.isfinite()).nonzero()[0].tolist()
    return row, column, str(values[row, column].item())


def as_tile_map(tile_map: TileMap, grid: tuple[int, int]) -> tuple[tuple[TileFormat, ...], Tensor]:
    """Formats in use, and their index for each tile `[tile rows, tile columns]` (int64)."""
    named = np.asarray(tile_map, dtype=object)
    if named.shape != grid:
        raise InputError(
            f"tile_map: expected one format for each tile of the grid {grid}, found shape {named.shape}; "
            "a row of the map is a row of tiles"
        )
    keys = [entry if isinstance(entry, str) else id(entry) for entry in named.flat]
    entries = dict(zip(keys, named.flat, strict=True))
    of_key = {key: as_format(entry) for key, entry in entries.items()}
    formats = tuple(dict.fromkeys(of_key.values()))
    number = {key: formats.index(fmt) for key, fmt in of_key.items()}
    return formats, torch.tensor([number[key] for key in keys]).view(grid)
