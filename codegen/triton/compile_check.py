"""Compile a kernel class for a GPU that is not there, and read its machine code.

`triton.compile` needs no device. The disassembler that Triton ships gives registers, spills, the
width of loads and the instructions of each loop: what bounds a decode-sized kernel on a fast GPU,
and what tests and cost models can hold to numbers anywhere.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stoicc.codegen.triton import build
from stoicc.codegen.triton.emit import Emitted, emit_decode, emit_tiles
from stoicc.codegen.triton.launch import TRITON_DOTS, LaunchConfig, dot_dtype, dot_precision
from stoicc.codegen.triton.transposed import emit_transposed, index_names
from stoicc.ir.dtypes import DTYPE_NAMES, output_dtype
from stoicc.ir.errors import CodegenError
from stoicc.ir.format import PlaneKind
from stoicc.ir.types import Module

POINTERS = {
    "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "u8": "*u8", "i8": "*i8", "i16": "*i16", "i32": "*i32",
    "i64": "*i64",
}  # fmt: skip
"""Triton's name of a pointer to each dtype."""

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Loop:
    """One loop of the machine code.

    Attributes:
        opcodes: instructions by opcode, without modifiers but for HMMA.SP, the sparse tensor cores.
        loads: global loads (cp.async too) by width in bits.
    """

    instructions: int
    opcodes: dict[str, int]
    spills: int
    loads: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """The machine code of one kernel on one target.

    Attributes:
        registers: per thread.
        spills: instructions that move a register to or from local memory.
        spills_in_loops: those of them inside a loop.
        shared: bytes of shared memory.
        loads: global loads (cp.async too) by width in bits, in the whole kernel.
        loops: from the machine code's backward branches, in order; empty on targets without SASS.
        warps: warps of a program.
    """

    kernel: str
    target: str
    registers: int
    spills: int
    spills_in_loops: int
    shared: int
    warps: int
    instructions: int
    loads: dict[int, int] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()

    @property
    def warp_instructions(self) -> tuple[int, ...]:
        """Instructions that all warps issue in one turn of each loop: per tile, for the format loops."""
        return tuple(loop.instructions * self.warps for loop in self.loops)


def parse_target(text: str) -> GPUTarget:
    """`sm_90` or `gfx942` as Triton names it."""
    if match := re.fullmatch(r"sm_(\d+)", text):
        return GPUTarget("cuda", int(match[1]), 32)
    if re.fullmatch(r"gfx\w+", text):
        return GPUTarget("hip", text, 64 if text.startswith("gfx9") else 32)
    raise CodegenError(f"target {text!r}: expected sm_<number> or gfx<name>, found neither; name a GPU architecture")


def check_class(
    module: Module, target: str, x_dtype: torch.dtype, config: LaunchConfig, kind: str = "tiles"
) -> tuple[Machine, ...]:
    """Compile every kernel of one of a module's executors and read what came out.

    Args:
        module: scheduled; nothing of it is read but its class, so pools are not needed.
        target: `sm_80`, `sm_90`, `sm_100`, `gfx942`, ...
        x_dtype: input dtype.
        config: launch constants.
        kind: the executor, "tiles", "dense-once" or "transposed".
    """
    if kind == "tiles":
        emitted = emit_tiles(module)
        names = ["tiles_kernel", "reduce_kernel"] if emitted.split else ["tiles_kernel"]
    elif kind == "transposed":
        emitted, names = emit_transposed(module), ["transposed_kernel"]
    else:
        emitted = emit_decode(module)
        names = [f"decode_{loop.prefix}_kernel" for loop in emitted.loops]
    kernels = build.load(emitted.name, emitted.source)
    return tuple(_check(getattr(kernels, name), name, module, emitted, target, x_dtype, config) for name in names)


def _check(
    kernel: Any, name: str, module: Module, emitted: Emitted, target: str, x_dtype: torch.dtype, config: LaunchConfig
) -> Machine:
    types = argument_types(module, emitted, x_dtype)
    dot = TRITON_DOTS[dot_dtype(x_dtype, "input_scale" in emitted.prologue)]
    names = kernel.arg_names
    launched = {"BN": config.block_n, "DOT": dot, "PRECISION": dot_precision(x_dtype)}
    constants = {name: value for name, value in launched.items() if name in names}
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or _is_aligned(n, module)]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=parse_target(target), options=config.options())
    if "cubin" in compiled.asm:
        return read_cubin(name, target, compiled.asm["cubin"], compiled.metadata.shared, config.num_warps)
    return _read_amdgcn(name, target, compiled, config.num_warps)


def argument_types(module: Module, emitted: Emitted, x_dtype: torch.dtype) -> dict[str, str]:
    """Triton's type of every argument that an emitted kernel may have."""
    program = module.tiles
    x = DTYPE_NAMES[x_dtype]
    dtypes = {"x": x, "y": DTYPE_NAMES[output_dtype(program.dtype, x_dtype)], "parts": "f32"}
    dtypes |= {
        "h": x,
        "order": "i32",
        "items": "i32",
        "row_slots": "i32",
        "panel": x,
        "rows": "i32",
        "low_rank_product": "f32",
    }
    for name in ("bias", "row_permutation", "column_permutation", "input_scale", "output_scale"):
        if (pool := getattr(program.beside, name)) is not None:
            dtypes[name] = pool.dtype
    if program.beside.low_rank is not None:
        dtypes["low_rank_left"] = program.beside.low_rank[0].dtype
    for loop in emitted.loops:
        dtypes |= dict.fromkeys((loop.columns, *index_names(loop)), "i32")
        for use in loop.planes:
            dtypes[use.name] = use.plane.dtype
            if use.slots is not None:
                dtypes[use.slots] = "i64" if use.plane.kind is PlaneKind.RAGGED else "i32"
    numbers = dict.fromkeys(("M", "K", "N", "RANK", "first", "top"), "i32")
    return {name: POINTERS[dtype] for name, dtype in dtypes.items()} | numbers


def _is_aligned(name: str, module: Module) -> bool:
    """Whether Triton specialises this number as a multiple of 16 at launch."""
    extent = {"M": module.tiles.shape[0], "K": module.tiles.shape[1]}.get(name)
    return extent is not None and extent % 16 == 0


# ---- NVIDIA ---------------------------------------------------------------------------------


def read_cubin(name: str, target: str, cubin: bytes, shared: int, warps: int) -> Machine:
    """What a compiled kernel's machine code says, with its dynamic shared memory and the warps of a program."""
    text, usage = _disassemble(cubin)
    code = [(int(at, 16), opcode, rest) for at, opcode, rest in _SASS.findall(text)]
    loops = tuple(_loop(code, begin, end) for begin, end in _backward_branches(code))
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    spilled = [at for at, opcode, _ in code if _is_spill(opcode)]
    inside = {at for begin, end in _backward_branches(code) for at in spilled if begin <= at <= end}
    return Machine(
        kernel=name,
        target=target,
        registers=int(registers[1]),
        spills=len(spilled),
        spills_in_loops=len(inside),
        shared=shared,
        warps=warps,
        instructions=len(code),
        loads=_loads(code),
        loops=loops,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage of a cubin, by the cuobjdump that Triton ships."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    if not os.path.exists(tool):
        raise CodegenError(f"compile check: expected Triton's cuobjdump at {tool}, found none; install triton's wheel")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        outputs = [
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-sass", "-res-usage")
        ]
    return outputs[0].stdout, outputs[1].stdout + outputs[1].stderr


def ptxas_notes(ptx: str, target: str) -> str:
    """What Triton's own ptxas says while it compiles a kernel for an NVIDIA target: code C7515, for one, where it has
    every `wgmma` end before the next begins."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    capability = int(parse_target(target).arch)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source, tempfile.NamedTemporaryFile() as cubin:
        source.write(ptx)
        source.flush()
        command = [get_ptxas(capability).path, f"--gpu-name={sm_arch_from_capability(capability)}", "-v"]
        done = subprocess.run([*command, source.name, "-o", cubin.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _backward_branches(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) address of each loop; the idle branch to itself at a kernel's end is none."""
    loops = set()
    for at, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest.strip()) if opcode.startswith("BRA") else None
        if target is not None and int(target[1], 16) < at:
            loops.add((int(target[1], 16), at))
    return sorted(loops)


def _loop(code: list[tuple[int, str, str]], begin: int, end: int) -> Loop:
    inside = [(at, opcode, rest) for at, opcode, rest in code if begin <= at <= end]
    body = [opcode for _, opcode, _ in inside]
    opcodes = Counter("HMMA.SP" if opcode.startswith("HMMA.SP") else opcode.split(".")[0] for opcode in body)
    return Loop(len(body), dict(opcodes.most_common()), sum(map(_is_spill, body)), _loads(inside))


def _loads(code: list[tuple[int, str, str]]) -> dict[int, int]:
    """Global loads by width in bits."""
    return dict(sorted(Counter(_load_bits(op, rest) for _, op, rest in code if _is_load(op)).items()))


def _is_load(opcode: str) -> bool:
    return opcode.split(".")[0] in ("LDG", "LDGSTS")


def _is_spill(opcode: str) -> bool:
    return opcode.split(".")[0] in ("STL", "LDL")


def _load_bits(opcode: str, rest: str) -> int:
    """Width of a global load: a suffix of the opcode, or 32."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((bits for suffix, bits in widths.items() if suffix in opcode.split(".")), 32)


# ---- AMD ------------------------------------------------------------------------------------


def _read_amdgcn(name: str, target: str, compiled: Any, warps: int) -> Machine:
    """Registers and spills that the compiler reports; loops are not told apart."""
    text = compiled.asm["amdgcn"]

    def reported(key: str) -> int:
        return sum(int(count) for count in re.findall(rf"\.{key}:\s+(\d+)", text))

    spills = reported("vgpr_spill_count") + reported("sgpr_spill_count")
    widths = {"ubyte": 8, "ushort": 16, "short_d16": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    loads = Counter(widths.get(w, 32) for w in re.findall(r"\b(?:global|buffer)_load_(\w+?)(?:_hi)?\s", text))
    return Machine(
        kernel=name,
        target=target,
        registers=reported("vgpr_count"),
        spills=spills,
        spills_in_loops=spills,
        shared=compiled.metadata.shared,
        warps=warps,
        instructions=len(re.findall(r"^\s+[sv]_\w+|^\s+(?:ds|global|buffer|flat|scratch)_\w+", text, re.M)),
        loads=dict(sorted(loads.items())),
    )
