"""`wgmma.mma_async`: products of warpgroups, on their way until a wait.

Written from PTX ISA ("Asynchronous warpgroup level matrix instructions"): a product reads its operands some time
between its start and the wait that ends it. So what stands in shared memory is read at both, and has to be there,
published and the same; registers of operands and sums are busy in between. Only a further product may add to the same
sums. The left operand, 64 rows, stands in registers or, as the right one always does, in shared memory, K-major.
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
    """One instruction: names of registers, and what is written in the text.

    Attributes:
        left: four registers, or the descriptor of 64 rows in shared memory.
        adds: a predicate, whether sums are added to, or None: they are.
    """

    kind: str
    columns: int
    depth: int
    sums: tuple[str, ...]
    left: tuple[str, ...] | str
    right: str
    adds: str | None = None
    metadata: str | None = None
    selector: int = 0

    @property
    def operands(self) -> tuple[str, ...]:
        """Registers that the product reads while it is on its way."""
        return (*(self.left if isinstance(self.left, tuple) else ()), *([self.metadata] if self.metadata else []))


def parse(instruction: Instruction) -> Product:
    """The product that an instruction starts, or EmulationError."""
    sparse, operands = instruction.opcode[2] == "sp", instruction.operands
    tail = instruction.opcode[3 if sparse else 2 :]
    depth, kind = (32 if sparse else 16), tail[-1]
    shape = re.fullmatch(rf"m64n(\d+)k{depth}", tail[2]) if len(tail) == 6 else None
    known = shape and tail[:2] == ("sync", "aligned") and tail[3:] == ("f32", kind, kind) and kind in ("f16", "bf16")
    adds, *numbers = operands[5:] if sparse else operands[3:]
    in_registers = isinstance(operands[1], tuple)
    plain = numbers == (["1", "1", "0"] if in_registers else ["1", "1", "0", "0"])
    if not known or not plain or not (adds == "1" or str(adds).startswith("%p")) or (sparse and not in_registers):
        raise EmulationError(f"instruction {'.'.join(instruction.opcode)}: not emulated")
    assert shape is not None
    assert isinstance(operands[0], tuple)
    predicate = None if adds == "1" else str(adds)
    product = Product(kind, int(shape[1]), depth, operands[0], operands[1], str(operands[2]), predicate)
    if len(product.sums) != product.columns // 2 or (in_registers and len(product.left) != 4):
        raise EmulationError(f"instruction {'.'.join(instruction.opcode)}: expected as many registers as its shape has")
    if not sparse:
        return product
    return replace(product, metadata=str(operands[3]), selector=int(str(operands[4]), 0))


@dataclass(frozen=True)
class Block:
    """An operand in shared memory: where each 16 bytes stand, `[warpgroups, rows, depth / 8]`, and its values."""

    addresses: Array
    values: Array


@dataclass(frozen=True)
class Started:
    """A product on its way.

    Attributes:
        left: `[warps, 16, depth]`.
        right: `[warpgroups, columns, depth]`.
        adds: whether sums are added to.
        blocks: what of it stands in shared memory.
    """

    product: Product
    left: Array
    right: Array
    adds: bool
    blocks: tuple[Block, ...]


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
        right = _block(shared, reader(product.right, "b64")(registers), product.columns, product)
        blocks: tuple[Block, ...] = (right,)
        if isinstance(product.left, str):
            rows = _block(shared, reader(product.left, "b64")(registers), 64, product)
            left, blocks = rows.values.reshape(-1, 16, product.depth), (right, rows)
        else:
            left = _in_registers(product, registers)
        adds = np.array([True]) if product.adds is None else reader(product.adds, "pred")(registers)
        if adds.any() != adds.all():
            raise EmulationError("wgmma: threads do not agree whether sums are added to")
        self._open.append(Started(product, left, right.values, bool(adds.all()), blocks))
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
    for block in started.blocks:
        if not (_values(shared, block.addresses, product.kind) == block.values).all():
            raise EmulationError("wgmma: its operand in shared memory has changed while it was on its way")
    warps = started.left.shape[0]
    result = started.left @ np.repeat(started.right, 4, 0).swapaxes(1, 2)  # [warps, 16, columns]
    for number, name in enumerate(product.sums):
        tile, register = divmod(number, 4)
        total = result[:, C_ROWS[:, register], 8 * tile + C_COLUMNS[:, register]]
        if started.adds:
            total = total + registers.get(name, "f32").reshape(warps, 32).astype(np.float64)
        registers.put(name, total.astype(np.float32).reshape(-1), None)


def _in_registers(product: Product, registers: Registers) -> Array:
    words = [reader(name, "b32")(registers) for name in product.left]
    if product.metadata is None:
        return dense_operand(words, product.kind)
    metadata = reader(product.metadata, "b32")(registers)
    return sparse_operand(words, metadata, product.selector, product.kind)


def _block(shared: SharedMemory, descriptors: Array, rows: int, product: Product) -> Block:
    """Rows of an operand K-major, as a matrix descriptor says: swizzled by 128, 64 or 32 bytes, which a row has."""
    words = descriptors.reshape(-1, 128)
    if (words != words[:, :1]).any():
        raise EmulationError("wgmma: threads of a warpgroup have different descriptors")
    found = []
    for word in map(int, words[:, 0]):
        begin, stride, swizzle = (word & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4, word >> 62
        width = {1: 128, 2: 64, 3: 32}.get(swizzle, 0)
        if not width or word >> 49 & 7 or (begin % width) + 2 * product.depth > width:
            raise EmulationError(f"wgmma: descriptor {word:#x} is not one of swizzled rows")
        line = begin + np.arange(rows) // 8 * stride + np.arange(rows) % 8 * width
        address = line[:, None] + 16 * np.arange(product.depth // 8)
        found.append(address ^ (address >> 7 & width // 16 - 1) << 4)
    addresses = np.stack(found).astype(np.int64)
    return Block(addresses, _values(shared, addresses, product.kind))


def _values(shared: SharedMemory, addresses: Array, kind: str) -> Array:
    """float64 `[warpgroups, rows, depth]`; two warps of each warpgroup read it, so that races with any show."""
    blocks = []
    for group, places in enumerate(addresses):
        for warp in (4 * group, 4 * group + 1):
            data = shared.read_by_descriptor(places.ravel(), 16, np.full(places.size, warp))
        words = to_floats(np.ascontiguousarray(data).view(np.uint32).ravel(), kind)
        blocks.append(words.reshape(places.shape[0], -1))
    return np.stack(blocks)
