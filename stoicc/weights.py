"""What a user may give as a weight or a tile map, made into tensors with one clear complaint."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from stoicc.ir.dtypes import DTYPE_NAMES, WEIGHT_DTYPES
from stoicc.ir.errors import InputError
from stoicc.ir.format import TileFormat
from stoicc.ir.registry import find_format

FormatLike: TypeAlias = str | TileFormat
TileMap: TypeAlias = Sequence[Sequence[FormatLike]] | np.ndarray


def as_matrix(weight: object) -> Tensor:
    """A weight as a contiguous `[M, K]` tensor on the CPU, without a copy where it is one already."""
    if isinstance(weight, (scipy.sparse.spmatrix, scipy.sparse.sparray)):
        weight = weight.toarray()
    if isinstance(weight, np.ndarray):
        if weight.dtype.name not in ("float16", "float32"):
            raise InputError(
                f"weight: expected dtype {', '.join(WEIGHT_DTYPES)}, found {weight.dtype}; convert it with .astype"
            )
        weight = torch.from_numpy(np.ascontiguousarray(weight))
    if not isinstance(weight, Tensor):
        raise InputError(
            f"weight: expected a torch tensor, numpy array, scipy sparse matrix or operator's result, "
            f"found {type(weight).__name__}"
        )
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
    texts = np.array([str(entry) for entry in named.flat])
    unique, inverse = np.unique(texts, return_inverse=True)
    objects = {str(entry): entry for entry in named.flat}
    formats = tuple(find_format(objects[text]) for text in unique)
    return formats, torch.from_numpy(inverse.reshape(grid).astype(np.int64))
