"""Registers of one program's threads, and how an instruction reads and writes them.

A register is an array of one value a thread, of an unsigned type as wide as its instructions say. Reading one that
nothing wrote is an error, and so is reading it at another width.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.program import EmulationError, Operand

Array = NDArray[Any]
Reader = Callable[["Registers"], Array]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
KINDS: dict[str, Any] = {
    "f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    **{f"{letter}{bits}": UNSIGNED[bits] for letter in "ub" for bits in (8, 16, 32, 64)},
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip
"""PTX types as NumPy's; bf16 and pairs of 16-bit floats stay bits."""


class Registers:
    """Values by name; `special` are read-only (`%tid.x`, `global_smem`).

    Attributes:
        busy: registers of products on their way, which nothing may touch.
        fresh: registers written since the last `wgmma.fence`.
    """

    def __init__(self, threads: int, special: dict[str, Array]) -> None:
        self.threads = threads
        self._values: dict[str, Array] = dict(special)
        self.busy: set[str] = set()
        self.fresh: set[str] = set()

    def get(self, name: str, kind: str) -> Array:
        """The register as an array of this PTX type."""
        value = self.any_width(name)
        dtype = np.dtype(KINDS[kind])
        if value.dtype == dtype:
            return value
        if value.dtype.itemsize != dtype.itemsize or (value.dtype == np.bool_) != (dtype == np.bool_):
            raise EmulationError(f"register {name}: expected {kind}, found {value.dtype}")
        return value.view(dtype)

    def any_width(self, name: str) -> Array:
        """The register as it was written: an address of 32 bits in shared memory, of 64 in global memory."""
        if name not in self._values:
            raise EmulationError(f"register {name}: read before it was written")
        if name in self.busy:
            raise EmulationError(f"register {name}: read while a product is on its way")
        return self._values[name]

    def put(self, name: str, value: Array, active: Array | None) -> None:
        """Write; where threads are not active, what stood there stays."""
        if name == "_":
            return
        if name in self.busy:
            raise EmulationError(f"register {name}: written while a product is on its way")
        self.fresh.add(name)
        value = np.ascontiguousarray(np.broadcast_to(value, (self.threads,)))
        bits = value if value.dtype == np.bool_ else value.view(UNSIGNED[8 * value.dtype.itemsize])
        if active is not None:
            held = self._values.get(name, np.zeros_like(bits))
            bits = np.where(active, bits, held)
        self._values[name] = bits


def loaded_type(name: str, bits: int) -> Any:
    """What a load of this many bits leaves in a register, wide as its name says; what is loaded is the lower ones."""
    wide = {"%rs": 16, "%r": 32, "%rd": 64}.get(re.sub(r"\d+$", "", name), bits)
    return UNSIGNED[max(bits, wide)]


def stored(operand: Operand, bits: int) -> Reader:
    """What a store writes: the lower bits of a register that may be wider."""
    assert isinstance(operand, str)
    if immediate(operand, f"b{bits}") is not None:
        return reader(operand, f"b{bits}")
    return lambda registers: registers.any_width(operand).astype(UNSIGNED[bits])


def narrowed(operand: Operand, kind: str) -> Reader:
    """What `cvt` reads: of a register that is wider than an integer type, the lower bits."""
    assert isinstance(operand, str)
    integer = re.fullmatch(r"[sub](\d+)", kind)
    if integer is None or immediate(operand, kind) is not None:
        return reader(operand, kind)
    bits = int(integer[1])

    def read(registers: "Registers") -> Array:
        value = registers.any_width(operand)
        if value.dtype.itemsize * 8 <= bits:
            return registers.get(operand, kind)
        return value.astype(UNSIGNED[bits]).view(KINDS[kind])

    return read


def reader(operand: Operand, kind: str) -> Reader:
    """A function that gives an operand's value as this PTX type."""
    assert isinstance(operand, str)
    if (number := immediate(operand, kind)) is not None:
        value = number
        return lambda registers: value
    return lambda registers: registers.get(operand, kind)


def immediate(text: str, kind: str) -> Array | None:
    """A number written in the text; None where it is a register."""
    dtype = np.dtype(KINDS[kind])
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", text):
        return np.array([int(match[1], 16)], np.uint32).view(dtype)
    if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", text):
        return np.array([int(match[1], 16)], np.uint64).view(dtype)
    if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        bits = 8 * dtype.itemsize
        return np.array([int(text.rstrip("U"), 0) & ((1 << bits) - 1)], UNSIGNED[bits]).view(dtype)
    return None
