"""The tile-level IR: types, schedule, format protocol, text form, verifier. Knows nobody."""

from stoicc.ir.digest import digest
from stoicc.ir.errors import (
    CodegenError,
    FormatError,
    InputError,
    ParseError,
    PassError,
    StoiccError,
    VerifyError,
)
from stoicc.ir.format import (
    Approximation,
    Plane,
    PlaneKind,
    Planes,
    TileCodes,
    TileCost,
    TileFormat,
    TileMac,
    TritonDecode,
)
from stoicc.ir.parser import parse, parse_program, parse_schedule
from stoicc.ir.printer import print_module, print_program, print_schedule
from stoicc.ir.registry import find_format, find_formats, register_format
from stoicc.ir.schedule import Regime, Schedule, TileCsr, WorkItem
from stoicc.ir.types import Beside, CodedFactor, Module, Pool, Segment, TileProgram
from stoicc.ir.verify import failures, verify, verify_pools, verify_runnable, verify_schedule

__all__ = [
    "Approximation",
    "Beside",
    "CodedFactor",
    "CodegenError",
    "FormatError",
    "InputError",
    "Module",
    "ParseError",
    "PassError",
    "Plane",
    "PlaneKind",
    "Planes",
    "Pool",
    "Regime",
    "Schedule",
    "Segment",
    "StoiccError",
    "TileCodes",
    "TileCost",
    "TileCsr",
    "TileFormat",
    "TileMac",
    "TileProgram",
    "TritonDecode",
    "VerifyError",
    "WorkItem",
    "digest",
    "failures",
    "find_format",
    "find_formats",
    "parse",
    "parse_program",
    "parse_schedule",
    "print_module",
    "print_program",
    "print_schedule",
    "register_format",
    "verify",
    "verify_pools",
    "verify_runnable",
    "verify_schedule",
]
