"""Runs a kernel's PTX on a CPU: one program after another, all of its threads in step.

Enough of PTX for what the Gluon dialect emits on triton 3.6 and 3.9; anything else is an `EmulationError`, and so is
what a correct kernel never does: an address out of bounds, a barrier that not all threads reach, a register read
before it is written, and races (`memory.py` has them), between warps and between programs, in whatever order they
run: what two have touched is told apart by barriers, not by what came out.

What it cannot see goes first in `make gpu-check`: how a tensor core rounds and what it does with subnormal operands,
and the last places of approximate functions.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.ptx import tensor_core, warpgroup
from tests.ptx.arithmetic import COMPARISONS, convert, convert_pair, function_of, logic3
from tests.ptx.memory import Addresses, GlobalMemory, SharedMemory
from tests.ptx.program import EmulationError, Instruction, Operand, Program
from tests.ptx.registers import KINDS, Array, Registers, immediate, loaded_type, narrowed, reader, stored

MOST_STEPS = 2_000_000
"""Instructions that a program may run: a loop that never ends is an error."""

TOGETHER = ("bar", "mma", "ldmatrix", "stmatrix", "cp", "shfl", "wgmma", "fence")
"""Instructions that all threads of a program run in step, here."""


@dataclass
class State:
    """One program as it runs."""

    registers: Registers
    shared: SharedMemory
    memory: GlobalMemory
    parameters: Mapping[str, int]
    warps: Addresses
    active: Array | None = None
    products: warpgroup.Products = field(default_factory=warpgroup.Products)

    def put(self, name: Operand, value: Array) -> None:
        assert isinstance(name, str)
        self.registers.put(name, value, self.active)

    @property
    def mask(self) -> Array:
        return np.ones(self.registers.threads, bool) if self.active is None else self.active


Step = Callable[[State], None]


class Kernel:
    """A program, its instructions made ready to run."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._steps = tuple(_step(instruction) for instruction in program.instructions)

    def run(self, grid: int, arguments: Sequence[int], memory: GlobalMemory, shared_bytes: int) -> None:
        """Run all programs of a one-dimensional grid, in order.

        Args:
            arguments: of the kernel, in order; parameters beyond them (Triton's own scratch) are null.
            shared_bytes: dynamic shared memory of a program.
        """
        given = [*arguments, *([0] * (len(self.program.parameters) - len(arguments)))]
        parameters = dict(zip(self.program.parameters, given, strict=True))
        memory.begin_launch()
        for index in range(grid):
            memory.program = index
            self._run_one(index, grid, parameters, memory, shared_bytes)

    def _run_one(
        self, index: int, grid: int, parameters: Mapping[str, int], memory: GlobalMemory, shared_bytes: int
    ) -> None:
        threads = self.program.threads
        numbers = {"%tid.x": np.arange(threads), "%ctaid.x": index, "%nctaid.x": grid, "%ntid.x": threads}
        numbers |= dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z", "global_smem"), 0)
        special = {name: np.broadcast_to(np.asarray(value, np.uint32), threads) for name, value in numbers.items()}
        state = State(
            Registers(threads, special), SharedMemory(shared_bytes), memory, parameters, np.arange(threads) // 32
        )
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            self._run_threads(state, f"{self.program.name}, program {index}")
        state.shared.finish()
        state.products.finish()

    def _run_threads(self, state: State, where: str) -> None:
        """Threads that have branched differently run apart, the one furthest behind first, until they meet."""
        at, steps, end = 0, 0, len(self._steps)
        apart: Array | None = None  # where each thread is; None while all are at `at`
        while at < end:
            steps += 1
            if steps > MOST_STEPS:
                raise EmulationError(f"{where}: more than {MOST_STEPS} steps")
            present = None if apart is None else apart == at
            instruction = self.program.instructions[at]
            try:
                following = self._advance(state, instruction, at, present)
            except EmulationError as error:
                raise EmulationError(f"{where}, {instruction.text!r}: {error}") from None
            if apart is None and isinstance(following, int):
                at = following
                continue
            apart = np.full(state.registers.threads, at) if apart is None else apart
            apart = np.where(apart == at, following, apart)
            at = int(apart.min())
            if (apart == at).all():
                apart = None

    def _advance(self, state: State, instruction: Instruction, at: int, present: Array | None) -> int | Array:
        """Run one instruction on the threads that are there; the index of the next, one a thread where they part."""
        state.active = present
        if instruction.guard is not None:
            guard = state.registers.get(instruction.guard, "pred")
            guard = ~guard if instruction.negated else guard
            state.active = guard if present is None else guard & present
        name = instruction.opcode[0]
        if name not in ("bra", "ret"):
            if present is not None and name in TOGETHER:
                raise EmulationError("threads of a program are apart where they have to be together")
            self._steps[at](state)
            return at + 1
        target = len(self._steps) if name == "ret" else self.program.labels[str(instruction.operands[0])]
        taken = state.mask
        if taken.all():
            return target
        return np.where(taken, target, at + 1) if taken.any() else at + 1


# ---- instructions ---------------------------------------------------------------------------


def _step(instruction: Instruction) -> Step:
    """What an instruction does to a program's state."""
    make = _MAKERS.get(instruction.opcode[0], _arithmetic)
    return make(instruction)


def _arithmetic(instruction: Instruction) -> Step:
    opcode, (target, *sources) = instruction.opcode, instruction.operands
    kind = opcode[-1]
    if kind == "pred":
        opcode = (*opcode[:-1], "pred")
    function = function_of(opcode)
    kinds = [kind] * len(sources)
    if "wide" in opcode and opcode[0] == "mad":
        kinds[2] = {"s32": "s64", "u32": "u64"}[kind]
    elif opcode[0] in ("shl", "shr"):
        kinds[1] = "u32"
    elif opcode[0] == "bfe":
        kinds[1:] = ["u32", "u32"]
    readers = [reader(source, k) for source, k in zip(sources, kinds, strict=True)]
    return lambda state: state.put(target, function(*(read(state.registers) for read in readers)))


def _move(instruction: Instruction) -> Step:
    """`mov`, which also cuts a register in two and puts it together."""
    (target, source), kind = instruction.operands, instruction.opcode[-1]
    if isinstance(target, tuple):
        half = {"b32": "b16", "b64": "b32"}[kind]
        whole, parts = reader(source, kind), target

        def cut(state: State) -> None:
            value = whole(state.registers)
            bits = value.dtype.itemsize * 4
            for number, part in enumerate(parts):
                piece = value >> value.dtype.type(bits * number)
                state.put(part, convert(piece, half, kind))

        return cut
    if isinstance(source, tuple):
        bits = {"b32": 16, "b64": 32}[kind]
        low, high = (reader(part, f"b{bits}") for part in source)
        dtype = np.dtype(f"u{bits // 4}")

        def join(state: State) -> None:
            upper = high(state.registers).astype(dtype) << dtype.type(bits)
            state.put(target, low(state.registers).astype(dtype) | upper)

        return join
    read = reader(source, kind)
    return lambda state: state.put(target, read(state.registers))


def _compare(instruction: Instruction) -> Step:
    _, comparison, kind = instruction.opcode
    target, *sources = instruction.operands
    compare = COMPARISONS[comparison]
    a, b = (reader(source, kind) for source in sources)
    return lambda state: state.put(target, compare(a(state.registers), b(state.registers)))


def _select(instruction: Instruction) -> Step:
    target, first, second, predicate = instruction.operands
    a, b = (reader(source, instruction.opcode[-1]) for source in (first, second))
    choose = reader(predicate, "pred")
    return lambda state: state.put(target, np.where(choose(state.registers), a(state.registers), b(state.registers)))


def _logic(instruction: Instruction) -> Step:
    target, *sources, table = instruction.operands
    readers = [reader(source, "b32") for source in sources]
    number = int(str(table), 0)

    def logic(state: State) -> None:
        a, b, c = (read(state.registers) for read in readers)
        state.put(target, logic3(a, b, c, number))

    return logic


def _convert(instruction: Instruction) -> Step:
    target, *sources = instruction.operands
    into, source = instruction.opcode[-2:]
    readers = [narrowed(operand, source) for operand in sources]
    if into.endswith("x2"):

        def pair(state: State) -> None:
            high, low = (read(state.registers) for read in readers)
            state.put(target, convert_pair(high, low, into.removesuffix("x2")))

        return pair
    return lambda state: state.put(target, convert(readers[0](state.registers), into, source))


def _nothing(instruction: Instruction) -> Step:
    return lambda state: None


def _barrier(instruction: Instruction) -> Step:
    """`bar.sync` of a whole program; threads of a warp are in step anyway."""
    return _nothing(instruction) if instruction.opcode[1] == "warp" else lambda state: state.shared.barrier()


def _fence(instruction: Instruction) -> Step:
    if instruction.opcode[1:] != ("proxy", "async", "shared::cta"):
        raise EmulationError(f"instruction {instruction.text!r}: not emulated")
    return lambda state: state.shared.publish()


def _group_of_products(instruction: Instruction) -> Step:
    """`wgmma`: products of warpgroups, their fence, groups and waits."""
    what = instruction.opcode[1]
    if what == "fence":
        return lambda state: state.registers.fresh.clear()
    if what == "commit_group":
        return lambda state: state.products.commit()
    if what == "wait_group":
        newest = int(str(instruction.operands[0]))
        return lambda state: state.products.wait(newest, state.registers, state.shared)
    product = warpgroup.parse(instruction)
    return lambda state: state.products.start(product, state.registers, state.shared)


def _shuffle(instruction: Instruction) -> Step:
    """`shfl.sync.idx` among all 32 lanes of a warp."""
    target, value, lane, *_ = instruction.operands
    if instruction.opcode[2] != "idx" or instruction.operands[3:] != ("31", "-1"):
        raise EmulationError(f"instruction {instruction.text!r}: not emulated")
    read, place = reader(value, "b32"), reader(lane, "u32")

    def shuffle(state: State) -> None:
        threads = np.arange(state.registers.threads)
        given = np.broadcast_to(read(state.registers), threads.shape)
        state.put(target, given[threads // 32 * 32 + (place(state.registers) & np.uint32(31))])

    return shuffle


# ---- memory ---------------------------------------------------------------------------------


def _address(operand: Operand) -> Callable[[State], Addresses]:
    match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", str(operand))
    if match is None:
        raise EmulationError(f"address {operand!r}: cannot be read")
    base, offset = match[1], int(match[2] or "0", 0)
    if (number := immediate(base, "u64")) is not None:
        fixed = number.astype(np.int64) + offset
        return lambda state: np.broadcast_to(fixed, state.registers.threads)

    def read(state: State) -> Addresses:
        value = state.registers.any_width(base)
        return value.astype(np.int64) + offset

    return read


def _vector(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _load(instruction: Instruction) -> Step:
    space, kind = instruction.opcode[1], instruction.opcode[-1]
    targets = _vector(instruction.operands[0])
    if space == "param":
        name = re.fullmatch(r"\[(\w+)\]", str(instruction.operands[1]))
        assert name is not None
        given, held = KINDS[kind], loaded_type(targets[0], int(kind[1:]))  # a wider register takes the sign along
        return lambda state: state.put(targets[0], np.array([state.parameters[name[1]]]).astype(given).astype(held))
    address, size = _address(instruction.operands[1]), int(kind[1:]) // 8
    dtype = np.dtype(f"u{size}")

    def load(state: State) -> None:
        active = state.mask
        if not active.any():
            return
        places = address(state)[active]
        width = size * len(targets)
        if space == "global":
            data = state.memory.read(places, width)
        else:
            data = state.shared.read(places, width, state.warps[active])
        words = np.ascontiguousarray(data).view(dtype)
        for number, target in enumerate(targets):
            value = np.zeros(state.registers.threads, loaded_type(target, 8 * size))
            value[active] = words[:, number]
            state.put(target, value)

    return load


def _store(instruction: Instruction) -> Step:
    space, kind = instruction.opcode[1], instruction.opcode[-1]
    address = _address(instruction.operands[0])
    readers = [stored(source, int(kind[1:])) for source in _vector(instruction.operands[1])]

    def store(state: State) -> None:
        active = state.mask
        if not active.any():
            return
        threads = state.registers.threads
        words = np.stack([np.broadcast_to(read(state.registers), threads) for read in readers], 1)
        data = np.ascontiguousarray(words).view(np.uint8)[active]
        if space == "global":
            state.memory.write(address(state)[active], data)
        else:
            state.shared.write(address(state)[active], data, state.warps[active])

    return store


def _copy(instruction: Instruction) -> Step:
    """`cp.async`: copies, with zeros past the source's size; groups of copies; waits."""
    what = instruction.opcode[2]
    if what == "commit_group":
        return lambda state: state.shared.commit()
    if what == "wait_group":
        newest = int(str(instruction.operands[0]))
        return lambda state: state.shared.wait(newest)
    if what not in ("ca", "cg"):
        raise EmulationError(f"instruction {'.'.join(instruction.opcode)}: not emulated")
    into, source = (_address(operand) for operand in instruction.operands[:2])
    width = int(str(instruction.operands[2]), 0)
    size = reader(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def copy(state: State) -> None:
        active = state.mask
        if not active.any():
            return
        present = active.copy() if size is None else active & (size(state.registers) == width)
        if size is not None and (active & ~present & (size(state.registers) != 0)).any():
            raise EmulationError("cp.async: only whole copies and zeros are emulated")
        data = np.zeros((state.registers.threads, width), np.uint8)
        data[present] = state.memory.read(source(state)[present], width)
        state.shared.copy(into(state)[active], data[active], state.warps[active])

    return copy


# ---- matrices -------------------------------------------------------------------------------


def _mma(instruction: Instruction) -> Step:
    """`mma.sync...m16n8k16` and `mma.sp::ordered_metadata.sync...m16n8k32`, sums in fp32."""
    opcode, operands = instruction.opcode, instruction.operands
    shapes = {"sync": "m16n8k16", "sp::ordered_metadata": "m16n8k32"}
    kind = opcode[-2]
    if shapes.get(opcode[1]) not in opcode or opcode[-4:] != ("f32", kind, kind, "f32") or kind not in ("f16", "bf16"):
        raise EmulationError(f"instruction {'.'.join(opcode)}: not emulated")
    a, b = ([reader(part, "b32") for part in _vector(operand)] for operand in operands[1:3])
    c = [reader(part, "f32") for part in _vector(operands[3])]
    metadata = reader(operands[4], "b32") if opcode[1] != "sync" else None
    selector = int(str(operands[5]), 0) if metadata is not None else 0

    def multiply(state: State) -> None:
        threads = state.registers.threads
        left, right, sums = (
            [np.broadcast_to(read(state.registers), threads) for read in readers] for readers in (a, b, c)
        )
        if metadata is None:
            result = tensor_core.mma(left, right, sums, kind)
        else:
            result = tensor_core.mma_sparse(left, right, sums, metadata(state.registers), selector, kind)
        for number, target in enumerate(_vector(operands[0])):
            state.put(target, result[:, number])

    return multiply


def _matrices(instruction: Instruction) -> Step:
    """`ldmatrix` and `stmatrix` of 8x8 matrices: lane 8 i + r of a warp says where row r of matrix i is."""
    loads, transposed = instruction.opcode[0] == "ldmatrix", "trans" in instruction.opcode
    place, value = instruction.operands if not loads else instruction.operands[::-1]
    address, parts = _address(place), _vector(value)
    readers = [reader(part, "b32") for part in parts] if not loads else []

    def transfer(state: State) -> None:
        places = address(state).reshape(-1, 32)
        for number, part in enumerate(parts):
            rows = places[:, 8 * number : 8 * number + 8]
            warps = np.repeat(np.arange(rows.shape[0]), 8)
            if loads:
                data = state.shared.read(rows.ravel(), 16, warps).reshape(-1, 8, 16)
                state.put(part, tensor_core.from_matrices(data, transposed))
            else:
                data = tensor_core.to_matrices(readers[number](state.registers), transposed)
                state.shared.write(rows.ravel(), data.reshape(-1, 16), warps)

    return transfer


_MAKERS: dict[str, Callable[[Instruction], Step]] = {
    "mov": _move, "setp": _compare, "selp": _select, "lop3": _logic, "cvt": _convert, "bar": _barrier,
    "ld": _load, "st": _store, "cp": _copy, "mma": _mma, "ldmatrix": _matrices, "stmatrix": _matrices,
    "shfl": _shuffle, "wgmma": _group_of_products, "fence": _fence, "bra": _nothing, "ret": _nothing,
}  # fmt: skip
