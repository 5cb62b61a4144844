"""Kept weights to rows of a matrix and back: n of every m along a row, each with a byte that says where it stands.

`places` u8 `[M, kept]`: the low seven bits are the column within the group, the high one says that the weight is also
kept by the second prune, along the columns. C moves them on a CPU (twice to six times as fast as torch's scatter
and gather, and without their int64 indices), torch elsewhere and where there is no compiler.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stoicc.codegen.cpu.build import instruction_set, load, missing_compiler

COLUMN, TWICE = 0x7F, 0x80
"""Bits of a place: the column within its group; kept by the second prune too."""
_PER_THREAD = 1 << 15
"""Weights below which another thread costs more than it brings."""

_SOURCE = """\
/* Kept weights to rows and back; n of every m, places as in stoicc/nn/kept.py. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#define MOVES(T) \\
INLINE void spread_row_##T(const T *kept, const uint8_t *place, T *row, int64_t groups, int n, int m, int need) \\
{ \\
    memset(row, 0, groups * m * sizeof *row); \\
    for (int64_t g = 0; g < groups; g++, row += m) \\
        for (int i = 0; i < n; i++, kept++, place++) \\
            row[*place & 127] = (*place & need) == need ? *kept : 0; \\
} \\
INLINE void collect_row_##T(T *kept, const uint8_t *place, const T *row, int64_t groups, int n, int m) \\
{ \\
    for (int64_t g = 0; g < groups; g++, row += m) \\
        for (int i = 0; i < n; i++) \\
            *kept++ = row[*place++ & 127]; \\
} \\
void spread_##T(const T *kept, const uint8_t *places, T *rows, int64_t count, int64_t groups, int n, int m, \\
                int need, int threads) \\
{ \\
    _Pragma("omp parallel for num_threads(threads)") \\
    for (int64_t r = 0; r < count; r++) { \\
        const int64_t k = r * groups * n, c = r * groups * m; \\
        if (n == 2 && m == 4) \\
            spread_row_##T(kept + k, places + k, rows + c, groups, 2, 4, need); \\
        else \\
            spread_row_##T(kept + k, places + k, rows + c, groups, n, m, need); \\
    } \\
} \\
void collect_##T(T *kept, const uint8_t *places, const T *rows, int64_t count, int64_t groups, int n, int m, \\
                 int threads) \\
{ \\
    _Pragma("omp parallel for num_threads(threads)") \\
    for (int64_t r = 0; r < count; r++) { \\
        const int64_t k = r * groups * n, c = r * groups * m; \\
        if (n == 2 && m == 4) \\
            collect_row_##T(kept + k, places + k, rows + c, groups, 2, 4); \\
        else \\
            collect_row_##T(kept + k, places + k, rows + c, groups, n, m); \\
    } \\
}

MOVES(uint16_t)
MOVES(uint32_t)
MOVES(uint64_t)
"""
_WORDS = {2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def spread(kept: Tensor, places: Tensor, n: int, m: int, twice: bool = False, below: Tensor | None = None) -> Tensor:
    """Rows `[M, K]` with the kept weights `[M, K n / m]` at their places and zeros between.

    Args:
        twice: only the weights that the second prune keeps too.
        below: more rows `[r, K]`, which follow as they are.
    """
    rows, groups = kept.shape[0], kept.shape[1] // n
    library = _library(kept)
    if library is None:
        values = kept.where(places >= TWICE, 0) if twice else kept
        out = kept.new_zeros(rows, groups * m).scatter_(1, _columns(places, n, m), values)
        return out if below is None else torch.cat((out, below.to(out.dtype)))
    kept, places = kept.contiguous(), places.contiguous()
    out = kept.new_empty(rows + (0 if below is None else below.shape[0]), groups * m)
    if below is not None:
        out[rows:] = below
    run = getattr(library, f"spread_{_WORDS[kept.itemsize]}")
    need = TWICE if twice else 0
    run(kept.data_ptr(), places.data_ptr(), out.data_ptr(), rows, groups, n, m, need, _threads(out))
    return out


def collect(matrix: Tensor, places: Tensor, n: int, m: int) -> Tensor:
    """The entries of rows `[M, K]` at the places of the kept weights: `[M, K n / m]`."""
    rows, groups = matrix.shape[0], matrix.shape[1] // m
    library = _library(matrix)
    if library is None:
        return matrix.gather(1, _columns(places, n, m))
    matrix, places = matrix.contiguous(), places.contiguous()
    out = matrix.new_empty(rows, groups * n)
    run = getattr(library, f"collect_{_WORDS[matrix.itemsize]}")
    run(out.data_ptr(), places.data_ptr(), matrix.data_ptr(), rows, groups, n, m, _threads(matrix))
    return out


def _columns(places: Tensor, n: int, m: int) -> Tensor:
    """Columns of the kept weights, int64 as torch's scatter wants them."""
    first = torch.arange(0, places.shape[1] // n * m, m, device=places.device).repeat_interleave(n)
    return (places & COLUMN).long() + first


def _threads(matrix: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), matrix.numel() // _PER_THREAD))


def _library(tensor: Tensor) -> ctypes.CDLL | None:
    """The C functions, where they can read a tensor: on a CPU with a compiler, and nobody tracing."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or type(tensor.data) is not Tensor:
        return None
    return _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    if missing_compiler():
        return None
    library = load(_SOURCE, "kept", instruction_set())
    for word in _WORDS.values():
        shape: list[Any] = [_LONG, _LONG, _INT, _INT]
        getattr(library, f"spread_{word}").argtypes = [_POINTER] * 3 + [*shape, _INT, _INT]
        getattr(library, f"collect_{word}").argtypes = [_POINTER] * 3 + [*shape, _INT]
    return library
