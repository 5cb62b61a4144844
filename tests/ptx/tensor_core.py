"""Matrix instructions: fragments of a warp's 32 lanes as PTX ISA defines them, products in double precision.

Written from the ISA's figures, not from the compiler's own functions: agreement of the two is what the tests are for.
A tensor core sums in an order of its own and keeps a few bits less; subnormal operands are taken at full accuracy.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.arithmetic import to_floats
from tests.ptx.program import EmulationError

Array = NDArray[Any]

LANES = np.arange(32)
GROUP, THREAD = LANES // 4, LANES % 4

# For register r and half h: the row and column of a lane's element.
_R, _H = np.meshgrid(np.arange(4), np.arange(2), indexing="ij")
A_ROWS = GROUP[:, None, None] + 8 * (_R % 2)
A_COLUMNS = 2 * THREAD[:, None, None] + _H + 8 * (_R // 2)
B_COLUMNS = np.broadcast_to(GROUP[:, None, None], (32, 4, 2))
B_ROWS = 2 * THREAD[:, None, None] + _H + 8 * _R
_C = np.arange(4)
C_ROWS = GROUP[:, None] + 8 * (_C // 2)
C_COLUMNS = 2 * THREAD[:, None] + _C % 2


def mma(a: list[Array], b: list[Array], c: list[Array], kind: str) -> Array:
    """`mma.m16n8k16`: registers `[threads]` of uint32 and, for c, float32 -> sums float32 `[threads, 4]`."""
    return _product(dense_operand(a, kind), b, c, kind)


def dense_operand(a: list[Array], kind: str) -> Array:
    """A of each warp, `[warps, 16, 16]`."""
    left = np.zeros((len(a[0]) // 32, 16, 16))
    left[:, A_ROWS, A_COLUMNS] = _elements(a, kind)
    return left


def mma_sparse(a: list[Array], b: list[Array], c: list[Array], metadata: Array, selector: int, kind: str) -> Array:
    """`mma.sp::ordered_metadata.m16n8k32`: a holds the two kept of each four columns."""
    return _product(sparse_operand(a, metadata, selector, kind), b, c, kind)


def sparse_operand(a: list[Array], metadata: Array, selector: int, kind: str) -> Array:
    """A of each warp with its zeros, `[warps, 16, 32]`.

    Lane 4 g + 2 s + h has, for selector s, the metadata of row g (lower half) and row g + 8 (upper half) for columns
    16 h .. 16 h + 15: a nibble for each four, the first kept column in its lower two bits.
    """
    words = metadata.reshape(-1, 32)
    kept = _elements(a, kind)
    chunk = A_COLUMNS // 2  # which four columns a kept element is of
    holder = 4 * GROUP[:, None, None] + 2 * selector + chunk // 4
    halves = words[:, holder] >> np.where(A_ROWS >= 8, 16, 0).astype(np.uint32)
    nibbles = halves >> (4 * (chunk % 4)).astype(np.uint32) & np.uint32(15)
    first, second = nibbles & np.uint32(3), nibbles >> np.uint32(2)
    if (first >= second).any():
        raise EmulationError("mma.sp: positions of ordered metadata have to increase")
    columns = 4 * chunk + np.where(A_COLUMNS % 2 == 0, first, second).astype(np.int64)
    left = np.zeros((words.shape[0], 16, 32))
    left[np.arange(words.shape[0])[:, None, None, None], np.broadcast_to(A_ROWS, kept.shape), columns] = kept
    return left


def _elements(registers: list[Array], kind: str) -> Array:
    """`[warps, 32, registers, 2]` in float64."""
    words = np.stack(registers, -1)
    return to_floats(words, kind).reshape(-1, 32, len(registers), 2)


def _product(left: Array, b: list[Array], c: list[Array], kind: str) -> Array:
    warps, count = left.shape[0], len(b)
    right = np.zeros((warps, 8 * count, 8))
    right[:, B_ROWS[:, :count], B_COLUMNS[:, :count]] = _elements(b, kind)
    sums = np.zeros((warps, 16, 8))
    sums[:, C_ROWS, C_COLUMNS] = np.stack(c, -1).reshape(warps, 32, 4)
    total = left @ right + sums
    return total[:, C_ROWS, C_COLUMNS].astype(np.float32).reshape(-1, 4)


def from_matrices(rows: Array, transposed: bool) -> Array:
    """`ldmatrix`: 8x8 matrices of 16-bit elements as bytes `[warps, 8, 16]` -> a register, uint32 `[threads]`."""
    matrices = np.ascontiguousarray(rows).view(np.uint16)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    low, high = (matrices[:, GROUP, 2 * THREAD + half].astype(np.uint32) for half in (0, 1))
    return (low | high << np.uint32(16)).ravel()


def to_matrices(register: Array, transposed: bool) -> Array:
    """`stmatrix`, the inverse: bytes `[warps, 8, 16]`."""
    words = register.reshape(-1, 32)
    matrices = np.zeros((words.shape[0], 8, 8), np.uint16)
    matrices[:, GROUP, 2 * THREAD] = words & np.uint32(0xFFFF)
    matrices[:, GROUP, 2 * THREAD + 1] = words >> np.uint32(16)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    return np.ascontiguousarray(matrices).view(np.uint8)
