"""From C text to a loaded library: find the compiler, build once, keep in a cache folder.

The library shares torch's OpenMP runtime: it links against the very file that torch has loaded,
so one pool of threads serves both (two pools spin against each other on small machines).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from stoicc.codegen.cache import cache_folder, is_whole, locked, move_whole, write_sum, write_whole
from stoicc.codegen.cpu.simd import ISAS
from stoicc.ir.errors import CodegenError

_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c")
_BF16_FLAGS = (*_AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2")
_ISA_FLAGS = {
    "amx": (*_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512bf16": _BF16_FLAGS,
    "vnni": (*_AVX512_FLAGS, "-mavx512vnni"),
    "avx512": _AVX512_FLAGS,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": ("-Wno-psabi",),
}
_AVX512_NEEDS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}
_BF16_NEEDS = {*_AVX512_NEEDS, "avx512_vnni", "avx512_bf16", "avx512vbmi", "avx512_vbmi2"}
_ISA_NEEDS = {
    "amx": {*_BF16_NEEDS, "amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": _BF16_NEEDS,
    "vnni": {*_AVX512_NEEDS, "avx512_vnni"},
    "avx512": _AVX512_NEEDS,
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
_COMMON_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno")


def compiler() -> tuple[str, ...] | None:
    """The C compiler and its first arguments: the environment's CC, else gcc, cc or clang, or None."""
    chosen = os.environ.get("CC", "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [["gcc"], ["cc"], ["clang"]]
    except ValueError:  # a quotation without an end
        return None
    for command in commands:
        found = shutil.which(command[0])
        if found:
            return (found, *command[1:])
    return None


def missing_compiler() -> str | None:
    """One clause that says what is missing, or None where a compiler is there."""
    if compiler():
        return None
    chosen = os.environ.get("CC")
    return f"no C compiler (CC is {chosen!r})" if chosen else "no C compiler (gcc, cc or clang)"


def instruction_set() -> str:
    """The best instruction set of this machine, or the one that STOICC_CPU_ISA names."""
    able = able_instruction_sets()
    forced = os.environ.get("STOICC_CPU_ISA")
    if forced and forced not in able:
        raise CodegenError(
            f"STOICC_CPU_ISA: expected one of {', '.join(able)} on this machine, found {forced!r}; unset it"
        )
    return forced or able[0]


@cache
def able_instruction_sets() -> tuple[str, ...]:
    """Instruction sets that this machine has and lets us use and the compiler knows, the best first."""
    have = _cpu_flags()
    able = tuple(isa for isa in ISAS if _ISA_NEEDS[isa] <= have and (isa != "amx" or _may_use_tiles()))
    known = next((i for i, isa in enumerate(able) if _knows(isa)), 0)  # a compiler that knows none says so later
    return able[known:]


def _knows(isa: str) -> bool:
    """Whether the compiler takes the flags of an instruction set; one of before AVX512-BF16 does not."""
    cc = compiler()
    command = (*(cc or ()), *_ISA_FLAGS[isa], "-E", "-x", "c", os.devnull)
    try:
        return cc is None or subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def load(source: str, label: str, isa: str) -> ctypes.CDLL:
    """Compile C text (once per text, flags and compiler) and load it.

    Raises:
        CodegenError: there is no compiler, it refuses the text, or the library cannot be loaded.
    """
    cc = compiler()
    if cc is None:
        raise CodegenError(f"cpu backend: expected a C compiler, found {missing_compiler()}; install gcc or set CC")
    flags = (*_COMMON_FLAGS, *_ISA_FLAGS[isa])
    openmp = openmp_library()
    key = "\n".join((source, *cc, *flags, Path(openmp or "").name, platform.machine()))
    stem = f"{label[:150]}_{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    library = cache_folder() / f"{stem}.so"
    if not is_whole(library):  # what is there already is loaded from a folder that cannot be written, too
        with locked(library):
            if not is_whole(library):
                _compile(cc, flags, openmp, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # built where another C library or OpenMP was: once more, here
        with locked(library):
            _compile(cc, flags, openmp, source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CodegenError(
            f"cpu backend: expected the library to load, found {error}; the compiler's OpenMP must be torch's, "
            "set CC=gcc"
        ) from None


def openmp_library() -> str | None:
    """The OpenMP runtime that torch has loaded, or None; other packages may bring more of them."""
    try:
        return _pick_openmp(Path("/proc/self/maps").read_text().splitlines())
    except OSError:
        return None


def _pick_openmp(lines: list[str]) -> str | None:
    """From lines of a process's map of memory: the runtime in torch's own folders, else the first."""
    own = Path(torch.__file__).parent
    paths = {line.split(maxsplit=5)[5] for line in lines if "omp" in line.rpartition("/")[2]}
    found = sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))
    ours = [p for p in found if p.startswith((f"{own}/", f"{own}.libs/"))]
    return next(iter(ours + found), None)


def _compile(cc: tuple[str, ...], flags: tuple[str, ...], openmp: str | None, source: str, library: Path) -> None:
    """Build next to the target and rename: another process never sees half a library."""
    text = library.with_suffix(".c")
    part = library.with_suffix(f".{os.getpid()}")
    half_object, half_library = (part.with_suffix(f"{part.suffix}{end}") for end in (".o", ".so"))
    runtime = (openmp,) if openmp else ("-fopenmp",)
    write_whole(text, source)
    try:
        _call(*cc, *flags, "-c", str(text), "-o", str(half_object))
        _call(*cc, "-shared", str(half_object), *runtime, "-lm", "-o", str(half_library))
        if not half_library.exists():
            raise _refused(cc[0], "no library and no message")
        move_whole(half_library, library)
        write_sum(library)
    finally:
        for left in (half_object, half_library):
            left.unlink(missing_ok=True)


def _call(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise _refused(command[0], error.strerror or str(error)) from error
    if done.returncode == 0:
        return
    lines = done.stderr.splitlines()
    said = [line for line in lines if "error" in line] or lines
    raise _refused(command[0], repr(said[0]) if said else f"exit status {done.returncode} and no message")


def _refused(compiler: str, found: str) -> CodegenError:
    return CodegenError(
        f"cpu backend, {Path(compiler).name}: expected the emitted C to compile, found {found}; "
        "look at the file it names, and at a format's tile_mac if you wrote one"
    )


def _may_use_tiles() -> bool:
    """Ask Linux for the state of tile registers, which a process has to request once."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return int(ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request_permission, tile_data)) == 0


@cache
def _cpu_flags() -> frozenset[str]:
    """Feature flags of this x86 CPU; empty on other machines, where only portable code runs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))
