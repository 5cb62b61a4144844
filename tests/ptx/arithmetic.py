"""What arithmetic instructions compute: one function a name, over arrays of one value a thread.

Single-precision operations round as IEEE 754 says. A fused multiply-add rounds once from double precision; in the rare
case that this rounds twice, it is off by a half of the last place of a half. Approximations (`ex2`, `rcp`, `div.full`)
are computed exactly, and a GPU's differ from them in the last place or two.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.program import EmulationError
from tests.ptx.registers import KINDS

Array = NDArray[Any]

# ---- 16-bit floats --------------------------------------------------------------------------


def bf16_to_f32(bits: Array) -> Array:
    """uint16 patterns -> float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """float32 -> uint16 patterns, to nearest even; a NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_floats(words: Array, kind: str) -> Array:
    """uint16 or uint32 patterns `[...]` -> float64, for uint32 `[..., 2]` with the lower half first."""
    if words.dtype == np.uint32:
        words = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return (bf16_to_f32(words) if kind == "bf16" else words.view(np.float16)).astype(np.float64)


def from_floats(values: Array, kind: str) -> Array:
    """float64 -> uint16 patterns."""
    with np.errstate(over="ignore"):
        return f32_to_bf16(values.astype(np.float32)) if kind == "bf16" else values.astype(np.float16).view(np.uint16)


def _pairs(operation: Callable[..., Array], kind: str, *words: Array) -> Array:
    """An operation on pairs of 16-bit floats."""
    halves = from_floats(operation(*(to_floats(np.atleast_1d(word), kind) for word in words)), kind)
    return np.ascontiguousarray(halves).view(np.uint32)[..., 0]


# ---- functions ------------------------------------------------------------------------------


def _flush(values: Array) -> Array:
    """Subnormal numbers to zero of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _divide(a: Array, b: Array) -> Array:
    """Integers towards zero, floats as they are."""
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return (np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64)) * quotient).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _divide(a, b) * b).astype(a.dtype)


def _shift_left(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, count: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    kept = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return kept if a.dtype.kind == "i" else np.where(count < bits, kept, a.dtype.type(0))


def bit_field(a: Array, position: Array, length: Array) -> Array:
    """`bfe`: `length` bits from `position` on, the sign extended where the type has one."""
    assert 0 < length[0] <= 32 - position[0]
    up = np.uint32(32 - int(position[0]) - int(length[0]))
    return (a << up.astype(a.dtype)) >> np.array(32 - int(length[0]), a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """`prmt`: four bytes of the eight in a (0-3) and b (4-7); bit 3 of a nibble would repeat the sign."""
    if (selector & np.uint32(0x8888)).any():
        raise EmulationError("prmt: a selector that repeats the sign is not emulated")
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(both, selector).shape, np.uint64)
    for byte in range(4):
        place = ((selector >> np.uint32(4 * byte)) & np.uint32(7)).astype(np.uint64)
        out |= (both >> (np.uint64(8) * place) & np.uint64(0xFF)) << np.uint64(8 * byte)
    return out.astype(np.uint32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """`lop3`: bit i of the table says what the function of (a, b, c) = bits 2, 1, 0 of i is."""
    out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for case in range(8):
        if table >> case & 1:
            out |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return out


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
}
"""A comparison with NaN is false, and true for those that end in u; they end so for floats alone."""

SIMPLE: dict[str, Callable[..., Array]] = {
    "mov": lambda a: a, "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": _remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative,
    "abs": np.abs, "min": np.minimum, "max": np.maximum, "shl": _shift_left, "shr": _shift_right,
    "bfe": bit_field, "prmt": permute_bytes, "ex2": np.exp2, "rcp": np.reciprocal,
}  # fmt: skip
"""Functions whose operands and result have the instruction's type."""

FREE_MODIFIERS = {"lo", "rn", "ftz", "approx", "full", "sync"}
"""What does not change which function is meant."""


def function_of(opcode: tuple[str, ...]) -> Callable[..., Array]:
    """The function of an arithmetic instruction, or EmulationError."""
    name, *modifiers, kind = opcode
    wide = "wide" in modifiers
    unknown = set(modifiers) - FREE_MODIFIERS - {"wide"}
    if unknown or (name not in SIMPLE and name not in ("mad", "fma")):
        raise EmulationError(f"instruction {'.'.join(opcode)}: not emulated")
    if kind in ("f16x2", "bf16x2"):
        inner = (lambda a, b, c: a * b + c) if name == "fma" else SIMPLE[name]
        return lambda *words: _pairs(inner, kind[:-2], *words)
    if kind == "bf16":
        single = (lambda a, b, c: a * b + c) if name == "fma" else SIMPLE[name]
        return lambda *halves: from_floats(single(*(to_floats(half, kind) for half in halves)), kind)
    if name == "fma":
        operation: Callable[..., Array] = _fused
    elif name == "mad":
        operation = _wide_mad if wide else lambda a, b, c: a * b + c
    elif wide:
        operation = _wide_mul
    else:
        operation = SIMPLE[name]
    if "ftz" in modifiers:
        return lambda *values: _flush(operation(*map(_flush, values)))
    return operation


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _wide_mul(a: Array, b: Array) -> Array:
    double = np.int64 if a.dtype.kind == "i" else np.uint64
    return a.astype(double) * b.astype(double)


def _wide_mad(a: Array, b: Array, c: Array) -> Array:
    return _wide_mul(a, b) + c.view(np.int64 if a.dtype.kind == "i" else np.uint64)


# ---- conversions ----------------------------------------------------------------------------


def convert(values: Array, target: str, source: str) -> Array:
    """`cvt`: between widths of integers, and between floats, to nearest even."""
    if source == "bf16":
        values = bf16_to_f32(values)
    if target == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    with np.errstate(over="ignore"):
        return values.astype(KINDS[target])


def convert_pair(high: Array, low: Array, kind: str) -> Array:
    """`cvt.rn.<kind>x2.f32`: two floats to one register, the first operand above."""
    upper, lower = (from_floats(part.astype(np.float64), kind).astype(np.uint32) for part in (high, low))
    return upper << np.uint32(16) | lower
