"""What a CPU kernel is made of: everything that the emitted text depends on, and nothing else.

A `KernelClass` holds formats, tile, dtypes and what is fused, but no sizes and no values: two
layers with the same class share one compiled file.
"""

import re
from dataclasses import dataclass

import torch

from stoicc.codegen.cpu.checks import IN_WORDS, check_units, tile_code
from stoicc.codegen.cpu.lanes import LANES, strips
from stoicc.codegen.cpu.layouts import (
    BLOCKED_ENTRIES,
    LEAST_OCTETS,
    VECTOR_COLUMNS,
    digit_bytes,
    octet_bytes,
    whole_blocks,
)
from stoicc.codegen.cpu.plane_types import PackedPlane, packed_planes
from stoicc.ir.dtypes import DTYPE_NAMES, output_dtype
from stoicc.ir.errors import CodegenError, FormatError
from stoicc.ir.format import NEVER, Tile, TileFormat, TileMac, TilePairs
from stoicc.ir.registry import find_format
from stoicc.ir.schedule import EPILOGUE, PROLOGUE, Schedule
from stoicc.ir.types import Beside, CodedFactor, Module, TileProgram


@dataclass(frozen=True)
class FormatPart:
    """One format of a kernel: its C name, its code, its planes, and the csr it walks.

    Attributes:
        csr: index in `schedule.csrs`.
        materialised: True where tiles are decoded to dense when the kernel is built.
    """

    name: str
    format: TileFormat
    code: TileMac
    planes: tuple[PackedPlane, ...]
    csr: int
    materialised: bool = False


@dataclass(frozen=True)
class KernelClass:
    """All that the text of a kernel depends on.

    Attributes:
        fused: (what stands beside the tiles, dtype of its pool or name of the activation).
        split: True where some tile row is cut in parts.
    """

    parts: tuple[FormatPart, ...]
    tile: Tile
    dtype: str
    x_dtype: str
    out_dtype: str
    fused: tuple[tuple[str, str], ...]
    split: bool
    isa: str

    @property
    def strips(self) -> int:
        """Strips of 16 rows of a tile."""
        return strips(self.tile[0])

    @property
    def columns(self) -> int:
        """Columns of a tile in packed x: BK rounded up to a multiple of 4."""
        return -(-self.tile[1] // 4) * 4

    @property
    def wide(self) -> int:
        """Most batch entries of one call of a format's function: what the registers hold."""
        return 4 if self.isa in ("avx2", "portable") else 8

    @property
    def digits(self) -> bool:
        """Whether some format multiplies x as digits, on integer units in vectors."""
        return any(map(self.takes_digits, self.parts))

    def takes_digits(self, part: FormatPart) -> bool:
        """Whether a part multiplies x as digits: pairs in vectors may serve it at any batch."""
        always_pairs = self.pairs and not self.tiled_pairs and self.dots_of(part).least_in_vectors == 1
        return self.floats and bool(part.code.digits) and not always_pairs

    @property
    def most_digits(self) -> int:
        """Batch entries up to which formats multiply x as digits.

        Beyond, all of them take octets, or codes are in fp32 for several entries at a time.
        """
        if self.isa in IN_WORDS:
            return 1
        octets = self.octets and all(part.code.octets for part in self.parts if self.takes_digits(part))
        return LEAST_OCTETS - 1 if octets else 1 << 30

    @property
    def floats(self) -> bool:
        """Whether some call multiplies x as floats, or would if x had no digits."""
        return not self.pairs or self.tiled_pairs or self.only_pairs > 1

    @property
    def pairs(self) -> bool:
        """Whether all formats multiply x as bf16 pairs, on matrix units or in vectors, at a larger batch.

        A scaled x would have to be rounded to bf16 once more, so it stays with floats.
        """
        able = self.isa in ("amx", "avx512bf16") and self.dtype == self.x_dtype == "bf16"
        able = able and self.has("input_scale") is None
        return able and bool(self.parts) and all(part.code.pairs for part in self.parts)

    @property
    def tiled_pairs(self) -> bool:
        """Whether pairs are multiplied on matrix units, which take x in blocks of 16 entries."""
        return self.pairs and self.isa == "amx"

    def picks(self, part: FormatPart) -> bool:
        """Whether a part's lanes pick their columns of x: two of each four, in vectors."""
        return self.pairs and not self.tiled_pairs and part.code.picks is not None

    def pairs_of(self, part: FormatPart) -> TilePairs:
        """How a part's tiles are unpacked to pairs: in vectors by few columns, which stay in registers."""
        code = part.code.picks if self.picks(part) else part.code.pairs
        assert code is not None
        if "{columns}" in code.source and not self.tiled_pairs:
            return code.in_units(VECTOR_COLUMNS)
        return code.in_units(code.columns, "BK" if code.columns == self.tile[1] else "")

    def walked(self, part: FormatPart) -> bool:
        """Whether a part's tiles are never unpacked for a large batch: what it leaves out would come back."""
        whole = self.has_dots(part) and self.dots_of(part).whole and self.pairs_of(part).least_blocked == NEVER
        return self.pairs and (self.pairs_of(part).picked > 0 or whole)

    def has_dots(self, part: FormatPart) -> bool:
        """Whether a part's tiles are unpacked in a way of their own where a batch of few meets them in vectors."""
        return self.pairs and not self.tiled_pairs and part.code.dots is not None

    def dots_of(self, part: FormatPart) -> TilePairs:
        """How a part's tiles are unpacked for a batch of few."""
        code = part.code.dots if self.has_dots(part) else None
        return code.in_units(code.columns) if code else self.pairs_of(part)

    def least_ahead(self, part: FormatPart) -> int:
        """Batch entries from which it pays to ask for what is read later; 0: always.

        Processors with bf16 products in vectors and no matrix units (Zen 4 and later) read ahead by themselves.
        """
        if self.isa != "avx512bf16":
            return 0
        bytes_ = part.format.cost(self.tile, self.dtype).bytes / (self.tile[0] * self.tile[1])
        return next(entries for entries in (2, 4, 8) if entries == 8 or entries >= 3.5 * bytes_)

    @property
    def least_pairs(self) -> int:
        """Batch entries from which pairs are faster than floats and digits.

        On matrix units for every format, which then needs no other form of x; in vectors for some format.
        """
        if self.pairs and not self.tiled_pairs:
            return min(self.dots_of(part).least_in_vectors for part in self.parts)
        return max((part.code.pairs.least for part in self.parts if part.code.pairs), default=2)

    @property
    def only_pairs(self) -> int:
        """Batch entries from which every format takes pairs."""
        if self.tiled_pairs:
            return self.least_pairs
        return max(self.least_pairs, *(self.dots_of(part).least_in_vectors for part in self.parts))

    @property
    def octets(self) -> bool:
        """Whether some format multiplies x as digits on integer matrix units."""
        able = self.isa == "amx" and self.tile[1] % 64 == 0
        return able and any(part.code.octets for part in self.parts)

    @property
    def most_octets(self) -> int:
        """Batch entries up to which they are faster than what else there is: pairs, or floats."""
        able = [part.code.octets.most for part in self.parts if part.code.octets]
        return min(able) if self.pairs else 1 << 30

    @property
    def blocked(self) -> str:
        """The form of x in which several tile rows are multiplied at a time at a large batch: pairs, floats or none.

        Codes are faster as octets, at any batch, than anything in fp32.
        """
        if self.pairs:
            return "" if all(map(self.walked, self.parts)) else "pairs"
        able = bool(self.parts) and all(part.code.floats for part in self.parts)
        return "floats" if able and not self.octets else ""

    @property
    def least_blocked(self) -> int:
        """Batch entries from which several tile rows are multiplied at a time (`blocked.py`)."""
        if self.tiled_pairs:
            return 96
        if self.pairs:
            least = (self.pairs_of(part).least_blocked for part in self.parts if not self.walked(part))
            return max([self.only_pairs, *least])
        return max(part.code.floats.least for part in self.parts if part.code.floats)

    @property
    def beside(self) -> int:
        """Strips that are multiplied together in fp32: what the registers hold for WIDE entries."""
        return 2 if self.wide == 8 else 1

    @property
    def tall(self) -> int:
        """Tile rows that are multiplied at a time: about 256 rows, whose sums fit the second-level cache."""
        return max(1, 256 // (self.strips * LANES))

    @property
    def deep(self) -> int:
        """Tile columns that are unpacked at a time, of which two strips fit the L1 cache with a block of x."""
        return max(1, (256 if self.pairs else 192) // self.tile[1])

    @property
    def blocked_bytes(self) -> int:
        """Scratch of a thread in the blocked loop nest: sums, and what is unpacked."""
        rows = self.strips * LANES
        unpacked = self.tile[1] * 2 if self.pairs else self.columns * 4
        return rows * (self.tall * BLOCKED_ENTRIES * 4 + self.deep * unpacked)

    @property
    def thirds(self) -> bool:
        """Whether R x is three bf16 numbers from `least_pairs` entries on, for matrix units; each has its sum."""
        return self.isa == "amx" and self.x_dtype == "bf16" and (self.has("low_rank") or "").startswith("bf16")

    def terms(self, batch: int) -> int:
        """Sums of the low-rank term of an entry."""
        return 3 if self.thirds and batch >= self.least_pairs else 1

    def scratch_bytes(self, batch: int, tile_columns: int, partials: int, threads: int) -> int:
        """Bytes of workspace of one call, after the low-rank term: the areas that `stoicc_run` cuts it in."""
        blocked = self.blocked_bytes * threads if self.blocked and batch >= self.least_blocked else 0
        paired, packed = self.pairs and batch >= self.least_pairs, 0
        entries = whole_blocks(batch) if paired and self.tiled_pairs else self.padded(batch)
        if paired:
            packed += entries * tile_columns * self.tile[1] * 2
        if not paired or batch < self.only_pairs:
            packed += entries * tile_columns * self.columns * 4
            if self.digits and batch <= self.most_digits:
                packed += -(-entries * tile_columns * digit_bytes(self.tile[1]) // 64) * 64
        if self.octets and LEAST_OCTETS <= batch <= self.most_octets:
            packed += octet_bytes(batch, self.tile[1], self.chunk) * tile_columns
        return packed + partials * entries * self.strips * LANES * 4 + blocked

    @property
    def chunk(self) -> int:
        """Batch entries whose sums are kept together: at most 64, and 32 KB of sums."""
        return max(8, min(64, 8192 // (self.strips * LANES) // 8 * 8))

    def padded(self, batch: int) -> int:
        """Batch entries in packed x: the last block is rounded up to a power of two."""
        tail = batch % self.wide
        return batch - tail + (1 << (tail - 1).bit_length() if tail else 0)

    def has(self, what: str) -> str | None:
        """The dtype (or activation) of something fused, or None."""
        return dict(self.fused).get(what)

    @property
    def label(self) -> str:
        """A readable name: the class in the kernel's file name."""
        formats = "_".join(part.name for part in self.parts) or "empty"
        fused = "".join(f"_{what if what != 'activation' else value}" for what, value in self.fused)
        split = "_split" if self.split else ""
        out = "" if self.out_dtype == self.x_dtype else f"_y_{self.out_dtype}"
        return f"{self.dtype}_{self.tile[0]}x{self.tile[1]}_{formats}_x_{self.x_dtype}{out}{fused}{split}_{self.isa}"


def classify(
    module: Module, x_dtype: torch.dtype, isa: str, on_missing: str = "error", out_dtype: torch.dtype | None = None
) -> KernelClass:
    """The kernel class of a scheduled module for inputs of a dtype; y is as `output_dtype` says unless given.

    Raises:
        CodegenError: no schedule, something beside the tiles that the schedule does not fuse, or
            a dtype that these kernels do not compute in.
        FormatError: a format without `tile_mac`, and on_missing is "error".
    """
    program, schedule = module.tiles, module.schedule
    if schedule is None:
        raise CodegenError(f"cpu kernel of {program.name}: expected a schedule, found none; run a pipeline first")
    if x_dtype == torch.float64:
        raise CodegenError(f"cpu kernel of {program.name}: expected x of 16 or 32 bits, found f64; use the reference")
    out = DTYPE_NAMES[output_dtype(program.dtype, x_dtype) if out_dtype is None else out_dtype]
    parts = _parts(program, schedule, on_missing, isa)
    split = schedule.max_parts > 1
    fused = _fused(program, schedule)
    return KernelClass(parts, program.tile, program.dtype, DTYPE_NAMES[x_dtype], out, fused, split, isa)


def _parts(program: TileProgram, schedule: Schedule, on_missing: str, isa: str) -> tuple[FormatPart, ...]:
    parts: list[FormatPart] = []
    formats = [program.segments[csr.segment].resolve() for csr in schedule.csrs]
    for index, fmt in enumerate(formats):
        if not fmt.planes(program.tile, program.dtype):
            continue  # nothing stored, nothing to add: empty tiles
        code, materialised = tile_code(fmt, program.tile, program.dtype, isa), False
        if code is None:
            fmt, materialised = _materialise(fmt, program, on_missing), True
            code = tile_code(fmt, program.tile, program.dtype, isa)
            assert code is not None
        check_units(fmt, code, program.tile, program.dtype, isa)
        name = _c_name(fmt, index, formats, [part.name for part in parts])
        planes = packed_planes(fmt, code, program.tile, program.dtype)
        parts.append(FormatPart(name, fmt, code, planes, index, materialised))
    return tuple(parts)


def _c_name(fmt: TileFormat, index: int, formats: list[TileFormat], taken: list[str]) -> str:
    """The format's name; with its options where another of that name is there; numbered at worst."""
    alone = sum(other.name == fmt.name for other in formats) == 1
    name = fmt.name if alone else re.sub(r"\W+", "_", str(fmt)).strip("_")
    name = c_name(name)
    while name in taken:
        name += f"_{index}"
    return name


def c_name(name: str) -> str:
    """A name without `__` and without `_` at its end, so that `member` can put both after it."""
    return re.sub("_+", "_", name).rstrip("_") or "format"


def member(part: str, plane: str, of: str = "") -> str:
    """The member of `struct weight` for a plane of a part, or for its entries or offsets.

    Formats and planes may have any names: none of the kernel's own names holds `__`, no local
    begins with `plane_`, and no function ends in `_tile` or `_tiles` but those of the formats.
    """
    return f"{part}__{plane}{f'__{of}' if of else ''}"


def _materialise(fmt: TileFormat, program: TileProgram, on_missing: str) -> TileFormat:
    if on_missing != "dense":
        rows, columns = program.tile
        raise FormatError(
            f"format {fmt}: expected C code (tile_mac) for {rows}x{columns} tiles of {program.dtype}, found none; "
            "add tile_mac to the format, or pass on_missing='dense'"
        )
    return find_format("dense")


def _fused(program: TileProgram, schedule: Schedule) -> tuple[tuple[str, str], ...]:
    fused = []
    for what in (*PROLOGUE, *EPILOGUE):
        value = getattr(program.beside, what)
        if value is None:
            continue
        if what not in schedule.prologue + schedule.epilogue:
            raise CodegenError(
                f"cpu kernel of {program.name}: expected {what} in the schedule's prologue or epilogue, found it "
                "in neither; add fuse-epilogue to the pipeline"
            )
        fused.append((what, value if what == "activation" else _dtype_of(program.beside, what)))
    return tuple(fused)


def _dtype_of(beside: Beside, what: str) -> str:
    """Low-rank factors stay in their dtype or codes (left, right); the rest becomes fp32 or int32 when packed."""
    if what != "low_rank":
        return ""
    assert beside.low_rank is not None
    return " ".join("codes" if isinstance(factor, CodedFactor) else factor.dtype for factor in beside.low_rank)
