"""`wgmma.mma_async` with weights in registers: products of warpgroups, on their way until a wait.

Written from PTX ISA ("Asynchronous warpgroup level matrix instructions"): a product reads its operands some time
between its start and the wait that ends it. So x is read from shared memory at both, and has to be there, published and
the same; registers of operands and sums are busy in between. Only a further product may add to the same sums.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.arithmetic import to_floats
from tests.ptx.memory import SharedMemory
from tests.ptx.program import EmulationError, Instruction
from tests.ptx.registers import Registers, reader
from tests.ptx.tensor_core import C_COLUMNS, C_ROWS, dense_operand, sparse_operand

Array = NDArray[Any]


@dataclass(frozen=True)
class Product:
    """One instruction: names of registers, and what is written in the text."""

    kind: str
    columns: int
    depth: int
    sums: tuple[str, ...]
    weights: tuple[str, ...]
    descriptor: str
    metadata: str | None = None
    selector: int = 0

    @property
    def operands(self) -> tuple[str, ...]:
        return (*self.weights, *([self.metadata] if self.metadata is not None else []))


def parse(instruction: Instruction) -> Product:
    """The product that an instruction starts, or EmulationError."""
    sparse, operands = instruction.opcode[2] == "sp", instruction.operands
    tail = instruction.opcode[3 if sparse else 2 :]
    depth, kind = (32 if sparse else 16), tail[-1]
    shape = re.fullmatch(rf"m64n(\d+)k{depth}", tail[2]) if len(tail) == 6 else None
    known = shape and tail[:2] == ("sync", "aligned") and tail[3:] == ("f32", kind, kind) and kind in ("f16", "bf16")
    numbers = operands[5:] if sparse else operands[3:]
    if not known or not isinstance(operands[1], tuple) or numbers != ("1", "1", "1", "0"):
        raise EmulationError(f"instruction {'.'.join(instruction.opcode)}: not emulated")
    assert shape is not None
    assert isinstance(operands[0], tuple)
    product = Product(kind, int(shape[1]), depth, operands[0], operands[1], str(operands[2]))
    if len(product.sums) != product.columns // 2 or len(product.weights) != 4:
        raise EmulationError(f"instruction {'.'.join(instruction.opcode)}: expected as many registers as its shape has")
    if not sparse:
        return product
    metadata, selector = str(operands[3]), int(str(operands[4]), 0)
    return replace(product, metadata=metadata, selector=selector)


@dataclass
class Started:
    """A product on its way: its weights `[warps, 16, depth]` and its block of x `[warpgroups, columns, depth]`."""

    product: Product
    weights: Array
    x: Array
    addresses: Array


@dataclass
class Products:
    """Products of one program; those of a group end together."""

    _open: list[Started] = field(default_factory=list)
    _groups: list[list[Started]] = field(default_factory=list)

    def start(self, product: Product, registers: Registers, shared: SharedMemory) -> None:
        """Start adding to sums; operands have to be ready, and fenced from what wrote them."""
        unfenced = registers.fresh & {*product.sums, *product.operands}
        if unfenced:
            raise EmulationError(f"register {min(unfenced)}: no wgmma.fence since it was written")
        before = [started.product for group in [*self._groups, self._open] for started in group]
        taken = {name for other in before for name in other.sums if other.sums != product.sums}
        taken |= {name for other in before for name in other.operands} & set(product.sums)
        if taken & {*product.sums, *product.operands}:
            raise EmulationError("wgmma: sums or operands overlap those of a product on its way")
        registers.busy -= {*product.sums, *product.operands}
        words = [reader(name, "b32")(registers) for name in product.weights]
        if product.metadata is None:
            weights = dense_operand(words, product.kind)
        else:
            metadata = reader(product.metadata, "b32")(registers)
            weights = sparse_operand(words, metadata, product.selector, product.kind)
        addresses = _addresses(reader(product.descriptor, "b64")(registers), product)
        self._open.append(Started(product, weights, _block(shared, addresses, product.kind), addresses))
        self._claim(registers)

    def commit(self) -> None:
        """Close a group of products."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, newest: int, registers: Registers, shared: SharedMemory) -> None:
        """All groups but the `newest` end."""
        registers.busy.clear()
        fresh = set(registers.fresh)
        while len(self._groups) > newest:
            for started in self._groups.pop(0):
                _end(started, registers, shared)
        registers.fresh = fresh  # what a product writes, another may read without a fence
        self._claim(registers)

    def finish(self) -> None:
        """A program ends: nothing may be on its way."""
        if self._open or any(self._groups):
            raise EmulationError("wgmma: the program ends while products are on their way")

    def _claim(self, registers: Registers) -> None:
        for group in [*self._groups, self._open]:
            for started in group:
                registers.busy |= {*started.product.sums, *started.product.operands}


def _end(started: Started, registers: Registers, shared: SharedMemory) -> None:
    product = started.product
    if not (_block(shared, started.addresses, product.kind) == started.x).all():
        raise EmulationError("wgmma: its block of x has changed while it was on its way")
    warps = started.weights.shape[0]
    result = started.weights @ np.repeat(started.x, 4, 0).swapaxes(1, 2)  # [warps, 16, columns]
    for number, name in enumerate(product.sums):
        tile, register = divmod(number, 4)
        columns = 8 * tile + C_COLUMNS[:, register]
        held = registers.get(name, "f32").reshape(warps, 32).astype(np.float64)
        total = held + result[:, C_ROWS[:, register], columns]
        registers.put(name, total.astype(np.float32).reshape(-1), None)


def _addresses(descriptors: Array, product: Product) -> Array:
    """Where each 16 bytes of x stand, `[warpgroups, columns, depth / 8]`: K-major, swizzled by 128 bytes."""
    words = descriptors.reshape(-1, 128)
    if (words != words[:, :1]).any():
        raise EmulationError("wgmma: threads of a warpgroup have different descriptors")
    found = []
    for word in map(int, words[:, 0]):
        begin, stride, swizzle = (word & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, word >> 62
        if swizzle != 1 or word >> 49 & 7 or (begin % 128) + 2 * product.depth > 128:
            raise EmulationError(f"wgmma: descriptor {word:#x} is not one of rows of 128 bytes, swizzled by 128")
        rows = np.arange(product.columns)
        line = begin + rows // 8 * stride + rows % 8 * 128
        address = line[:, None] + 16 * np.arange(product.depth // 8)
        found.append(address ^ (address >> 7 & 7) << 4)
    return np.stack(found).astype(np.int64)


def _block(shared: SharedMemory, addresses: Array, kind: str) -> Array:
    """x in float64 `[warpgroups, columns, depth]`; two warps of each warpgroup read it, so that races with any show."""
    blocks = []
    for group, places in enumerate(addresses):
        for warp in (4 * group, 4 * group + 1):
            data = shared.read_by_descriptor(places.ravel(), 16, np.full(places.size, warp))
        words = to_floats(np.ascontiguousarray(data).view(np.uint32).ravel(), kind)
        blocks.append(words.reshape(places.shape[0], -1))
    return np.stack(blocks)
