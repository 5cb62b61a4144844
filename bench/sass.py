"""What GPUs execute, read off compiled kernels on any machine: `python -m bench.sass`.

    python -m bench.sass [--quick] [--output FILE]

Compiles each format for sm_80 and sm_90, in both dialects of the Triton backend, and prints for one tile: registers,
spills, widths of loads, instructions of each kind, warp instructions for 64x64 weights, bytes of weights in flight on
an SM, and which resource of an A100 and an H200 the tile would take longest on. Nothing here is a measurement: times
are counts over the constants of `passes/cost_gpu.py`, and the tensor cores' are those of their dense peak, of which
`mma.sync` reaches less on Hopper. A last table has the products of warpgroups (`wgmma`) that an H200 can be asked to
multiply large batches by. `--quick` leaves out fp16, all batch blocks but 16, and most of that table. `--output`
writes the rows as JSON; `bench/results/sass.json` is the record.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton

import stoicc.formats  # noqa: F401  (registers the formats)
from bench.gpu_weights import random_weight
from stoicc.codegen.gluon.compile import compile_for
from stoicc.codegen.gluon.launch import HAS_WGMMA, GluonConfig, loops_of
from stoicc.codegen.triton.compile_check import Machine, check_class, ptxas_notes
from stoicc.codegen.triton.launch import LaunchConfig
from stoicc.ir.dtypes import TORCH_DTYPES
from stoicc.ir.types import Module
from stoicc.passes.cost_gpu import GPUS, Gpu, KernelCode, occupancy
from stoicc.passes.costs import segment_cost

FORMATS = ("dense", "nv24", "int8<group_size=64>", "int4<group_size=64>", "int4_nv24<group_size=64>")
TILE = {"gluon": (128, 64), "portable": (128, 128), "wgmma": (128, 64)}
"""The tile that each dialect is best at; `wgmma` is the Gluon dialect where a schedule asks for it."""
DIALECTS = ("gluon", "portable")
ON = {"sm_80": "A100", "sm_90": "H200"}
BATCHES = (8, 16, 64, 128)
LARGE = 4096
"""The batch of the table of warpgroups."""

KINDS = (
    "HMMA",
    "HMMA.SP",
    "HGMMA",
    "LDSM",
    "LDS",
    "LDGSTS",
    "LDG",
    "LOP3",
    "SHF",
    "PRMT",
    "HFMA2",
    "HADD2",
    "FFMA",
    "BAR",
)
"""Opcodes that the table names; the rest of a loop is addresses, moves and branches."""

MMA_FLOPS = 2 * 16 * 8 * 16
"""Operations of an HMMA (m16n8k16); an HMMA.SP takes its time for twice the columns."""


@dataclass(frozen=True)
class Row:
    """One loop of one kernel: a format as a dialect multiplies it.

    Attributes:
        instructions: that all warps issue for 64x64 weights.
        opcodes, loads: of one warp and one tile; loads by width in bits, the descriptor's or column's among them.
        payload: bytes of 64x64 weights.
        in_flight: bytes of weights on their way to an SM at a time.
        seconds: for 64x64 weights on the GPU `on`, by resource.
        block_n: rows of the batch that a program multiplies by.
        serialized: ptxas has every `wgmma` end before the next begins.
    """

    dialect: str
    target: str
    dtype: str
    batch: int
    tile: tuple[int, int]
    format: str
    registers: int
    spills: int
    spills_in_loop: int
    instructions: float
    opcodes: dict[str, int]
    loads: dict[int, int]
    payload: float
    in_flight: float
    seconds: dict[str, float]
    block_n: int
    serialized: bool = False

    @property
    def bound_by(self) -> str:
        """The resource that takes longest."""
        return max(self.seconds, key=lambda resource: self.seconds[resource])


def rows_of(
    dialect: str, target: str, dtype: str, batch: int, formats: tuple[str, ...], tile: tuple[int, int] | None = None
) -> Iterator[Row]:
    """A row for each format of one kernel that multiplies tiles of all of them."""
    tile = tile or TILE[dialect]
    module = class_of(formats, tile, dtype)
    built = compiled(dialect, module, target, dtype, batch)
    machine = built.machine
    gpu, area = GPUS[ON[target]], tile[0] * tile[1] / (64 * 64)
    code = KernelCode(machine.registers, machine.shared, machine.warps, built.block_n, ())
    assert module.schedule is not None
    for csr, loop in zip(module.schedule.csrs, machine.loops, strict=True):
        segment = module.tiles.segments[csr.segment]
        payload = segment_cost(module.tiles, segment)
        instructions = loop.instructions * machine.warps / area
        read = payload / area * min(1.0, built.block_n / batch)
        mma = products_of(loop.opcodes, machine.warps, built.block_n) / area
        yield Row(
            dialect, target, dtype, batch, tile, segment.format, machine.registers, machine.spills, loop.spills,
            instructions, loop.opcodes, loop.loads, payload / area, built.ahead * payload * occupancy(gpu, code),
            seconds_of(gpu, dtype, read, instructions, mma), built.block_n, built.serialized,
        )  # fmt: skip


def class_of(formats: tuple[str, ...], tile: tuple[int, int], dtype: str) -> Module:
    """A module of the class: a tile row with every format, K and M multiples of 16."""
    shares = [(text, 1 / len(formats)) for text in formats]
    return random_weight((tile[0] * 4, tile[1] * 64), shares, dtype, torch.device("cpu"), tile=tile).module


@dataclass(frozen=True)
class Built:
    """A tiles kernel: its machine code, tiles on their way while it multiplies one, and its block of the batch."""

    machine: Machine
    ahead: float
    block_n: int
    serialized: bool = False


def compiled(dialect: str, module: Module, target: str, dtype: str, batch: int) -> Built:
    """The tiles kernel of a dialect as a launch would have it."""
    x_dtype = TORCH_DTYPES[dtype]
    if dialect == "portable":
        launch = LaunchConfig.choose(batch, x_dtype, module.tiles.tile)
        machine = check_class(module, target, x_dtype, launch)[0]
        return Built(machine, (launch.num_stages - 2) / 2, launch.block_n)
    asked = {"wgmma": 1} if dialect == "wgmma" else {}
    config = GluonConfig.choose(batch, module, loops_of(module), int(target[3:]), asked)
    kernel = compile_for(module, x_dtype, batch, target, config).kernels[0]
    if not config.wgmma:
        return Built(kernel.machine(), config.stages - 1, config.block_n)
    serialized = "C7515" in ptxas_notes(kernel.ptx, target)
    return Built(kernel.machine(), config.stages - 2, config.block_n, serialized)


def seconds_of(gpu: Gpu, dtype: str, payload: float, instructions: float, mma: float) -> dict[str, float]:
    """What 64x64 weights take of each resource, as if it were the only one; blocks of a batch share a read of them."""
    return {
        "bytes": payload / gpu.bandwidth,
        "issue": instructions / gpu.instructions,
        "tensor cores": mma * MMA_FLOPS / gpu.flops[dtype],
    }


def products_of(opcodes: dict[str, int], warps: int, block_n: int) -> float:
    """Tensor-core products of a tile, in those of an HMMA; an HGMMA has 64 rows and 16 columns for the whole block."""
    warpgroup = opcodes.get("HGMMA", 0) * (warps / 4) * 4 * (block_n / 8)
    return (opcodes.get("HMMA", 0) + opcodes.get("HMMA.SP", 0)) * warps + warpgroup


# ---- text -----------------------------------------------------------------------------------


def header() -> str:
    return (
        f"{'format':26s} {'dialect':8s} {'tile':>7s} {'regs':>4s} {'spill':>5s} {'instr':>5s} {'budget':>6s} "
        f"{'KB/SM':>6s} {'bound by':12s} {'of bytes':>8s}  in the loop of a warp"
    )


def line(row: Row) -> str:
    """A row; the budget is what the bytes' time would let issue, `of bytes` the longest time over that of the bytes."""
    gpu = GPUS[ON[row.target]]
    kinds = " ".join(f"{kind} {row.opcodes[kind]}" for kind in KINDS if row.opcodes.get(kind))
    loads = " ".join(f"{count}x{bits}b" for bits, count in row.loads.items())
    longest = row.seconds[row.bound_by] / row.seconds["bytes"]
    return (
        f"{row.format:26s} {row.dialect:8s} {row.tile[0]:>3d}x{row.tile[1]:<3d} {row.registers:4d} "
        f"{row.spills_in_loop:5d} {row.instructions:5.0f} {row.seconds['bytes'] * gpu.instructions:6.0f} "
        f"{row.in_flight / 1024:6.1f} {row.bound_by:12s} {longest:8.2f}  {kinds}; loads {loads}"
        f"{'; SERIALIZED' if row.serialized else ''}"
    )


def tables(quick: bool) -> Iterator[str | Row]:
    """Lines and rows as they come: a table for each target, dtype and batch block."""
    dtypes, batches = (("bf16",), (16,)) if quick else (("bf16", "f16"), BATCHES)
    for target, dtype, batch in product(ON, dtypes, batches):
        yield f"\n{target} ({ON[target]}), {dtype}, batch block {batch}; counts for 64x64 weights"
        yield header()
        for dialect in DIALECTS:
            for text in FORMATS:
                yield from rows_of(dialect, target, dtype, batch, (text,))
        yield "all of them in one kernel"
        for dialect in DIALECTS:
            yield from rows_of(dialect, target, dtype, batch, FORMATS)
    if HAS_WGMMA:
        yield from warpgroups(quick)


def warpgroups(quick: bool) -> Iterator[str | Row]:
    """The table of `wgmma`: blocks of the batch as a launch has them, 256 rows or 128 where sums are scaled."""
    for dtype in ("bf16",) if quick else ("bf16", "f16"):
        yield f"\nsm_90 (H200), {dtype}, batch {LARGE}, by wgmma, never on silicon; counts for 64x64 weights"
        yield header()
        for text in FORMATS[:2] if quick else FORMATS:
            yield from rows_of("wgmma", "sm_90", dtype, LARGE, (text,))
        yield "all of them in one kernel"
        yield from rows_of("wgmma", "sm_90", dtype, LARGE, FORMATS)


def record(rows: list[Row], path: Path) -> None:
    """Rows as JSON, in the order of the tables, with the versions that compiled them."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    path.write_text(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="bf16 and batch block 16 alone")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    given = parser.parse_args(arguments)
    rows = []
    for found in tables(given.quick):
        print(line(found) if isinstance(found, Row) else found, flush=True)
        rows += [found] if isinstance(found, Row) else []
    if given.output is not None:
        record(rows, given.output)
    print("\nNo GPU ran: registers and instructions are read off machine code, times are predicted from them.")


if __name__ == "__main__":
    main()
