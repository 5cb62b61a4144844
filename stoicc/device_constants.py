"""The constants of a device that cost models read: measured once, kept as JSON, loaded afterwards.

    model = stoicc.cost_model("cpu")
    print(model.predict(kernel.ir, batch=16, x_dtype="bf16", threads=2))

    python -m stoicc.calibration            # measure anew, after an upgrade or on a quiet machine

A file is kept in the cache folder (`stoicc.codegen.cache`) per device, instruction set, number of threads,
version of torch and text of the kernels. Once it is there, `regimes{tiles=auto}` takes its crossover from it.
`STOICC_CALIBRATION=off` keeps to the built-in constants: nothing is measured and no file is read.
"""

import hashlib
import json
import os
import platform
import re
import uuid
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stoicc.codegen.cache import cache_folder, locked, write_whole
from stoicc.ir.errors import CodegenError, InputError
from stoicc.ir.format import TileFormat
from stoicc.passes.cost_cpu import CpuConstants, CpuCostModel, Curve, Key
from stoicc.passes.cost_defaults import BUILT_IN
from stoicc.passes.cost_gpu import GpuCostModel
from stoicc.passes.cost_model import CostModel, provide

TARGETS = ("cpu", "triton")
_LOADED: dict[Path, tuple[int, CpuConstants]] = {}
"""Constants by file, with the file's time of change: a file is parsed once."""


def cost_model(target: str = "cpu", *, measure: bool = True, device: str | None = None) -> CostModel:
    """The cost model of this device.

    Args:
        target: "cpu", or "triton" for GPUs.
        measure: measure a CPU whose constants are not stored, and store them (seconds, with a progress bar);
            formats, dtypes and tile shapes beyond them are measured when they are first predicted. False:
            stored constants, or else built-in ones, whose `constants.source` says so.
        device: a GPU by name, `stoicc.passes.cost_gpu.GPUS`; default: the one that is there, else an H200.

    Raises:
        InputError: an unknown target or GPU.
    """
    if target == "triton":
        from stoicc.gpu_model import gpu_cost_model  # asks for triton

        return gpu_cost_model(device)
    if target not in TARGETS:
        raise InputError(f"cost model: expected target cpu or triton, found {target!r}; name one of them")
    if not _may_measure():
        return CpuCostModel(BUILT_IN)
    stored = load_constants()
    if not measure:
        return CpuCostModel(stored or BUILT_IN)
    return CpuCostModel(stored or _measured_once(), _measure_format)


def calibrate(quiet: bool = False) -> CpuConstants:
    """Measure this CPU anew and store what was found, whatever was stored before."""
    path = constants_file()
    with locked(path):
        return _measure_and_store(path, quiet)


def _may_measure() -> bool:
    return os.environ.get("STOICC_CALIBRATION", "").lower() not in ("off", "0", "no")


# -- measuring ---------------------------------------------------------------------------------


def _measured_once() -> CpuConstants:
    """Measure, unless another process has done so while this one waited."""
    path = constants_file()
    with locked(path):
        return load_constants() or _measure_and_store(path, quiet=False)


def _measure_and_store(path: Path, quiet: bool) -> CpuConstants:
    from rich.progress import Progress

    from stoicc import calibration  # it compiles and runs kernels, which a prediction does not need

    with Progress(transient=True, disable=quiet) as progress:
        task = progress.add_task("calibrating", total=calibration.steps(torch.get_num_threads()))

        def step(what: str) -> None:
            progress.update(task, advance=1, description=f"calibrating: {what}")

        constants = calibration.calibrate(step)
    return _store(path, constants)


def _measure_format(fmt: TileFormat, dtype: str, tile: tuple[int, int]) -> CpuConstants | None:
    """A format, dtype or tile shape that is met for the first time joins the stored constants."""
    from stoicc import calibration

    path = constants_file()
    with locked(path):
        known = load_constants()
        if known is None or (str(fmt), dtype, *tile) in known.tiles:
            return known
        found = calibration.measure_format(fmt, dtype, tile, known)
        return None if found is None else _store(path, found)


# -- the store ---------------------------------------------------------------------------------


def constants_file() -> Path:
    """Where the constants of this device, these kernels and this number of threads are kept."""
    key = device_key()
    text = json.dumps(key, sort_keys=True)
    device = re.sub(r"[^A-Za-z0-9]+", "-", str(key["device"])).strip("-")[:60]
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return cache_folder() / f"constants_{device}_{key['isa']}_{key['threads']}t_{digest}.json"


def device_key() -> dict[str, str | int]:
    """What constants hold for: another value of any of these needs a measurement of its own."""
    import stoicc
    from stoicc.codegen.cpu.build import instruction_set

    return {
        "device": device_name(),
        "isa": instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stoicc": stoicc.__version__,
        "kernels": kernel_hash(),
    }


def load_constants() -> CpuConstants | None:
    """The stored constants of this device, or None. A damaged file is reported and set aside."""
    path = constants_file()
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    if path in _LOADED and _LOADED[path][0] == changed:
        return _LOADED[path][1]
    try:
        constants = from_json(json.loads(path.read_text(encoding="utf-8"))["constants"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _set_aside(path, error)
        return None
    _LOADED[path] = (changed, constants)
    return constants


def _set_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
    try:
        path.replace(aside)
    except OSError:
        aside = path  # a folder that cannot be written: the file stays, and is reported again
    warnings.warn(
        f"device constants {path}: expected what stoicc measured, as JSON, found {type(error).__name__}: {error}; "
        f"the file is set aside as {aside.name} and the device is measured again when constants are needed",
        RuntimeWarning,
        stacklevel=3,
    )


def _store(path: Path, constants: CpuConstants) -> CpuConstants:
    """Write the constants; those that a reader of the file will have."""
    held = to_json(constants)
    write_whole(path, json.dumps({"key": device_key(), "constants": held}, indent=1) + "\n")
    return from_json(held)


def to_json(constants: CpuConstants) -> dict[str, Any]:
    """Constants as dictionaries whose keys are texts; a key of `tiles` and `decode` reads `int4|bf16|64x64`."""
    held = {name: getattr(constants, name) for name in constants.__dataclass_fields__}
    for name in ("tiles", "decode"):
        held[name] = {f"{fmt}|{dtype}|{bm}x{bk}": curve for (fmt, dtype, bm, bk), curve in held[name].items()}
    return {name: _rounded(value) for name, value in held.items()}


def from_json(held: Mapping[str, Any]) -> CpuConstants:
    """The inverse of `to_json`; KeyError, ValueError or TypeError where something is missing or is none."""
    return CpuConstants(
        source=str(held["source"]),
        call=_curve(held["call"]),
        bandwidth={int(threads): _curve(curve) for threads, curve in held["bandwidth"].items()},
        tiles={_key(text): _curve(curve) for text, curve in held["tiles"].items()},
        exposed={name: _number(value) for name, value in held["exposed"].items()},
        items={dtype: _curve(curve) for dtype, curve in held["items"].items()},
        pack={dtype: _curve(curve) for dtype, curve in held["pack"].items()},
        join=_curve(held["join"]),
        join_call=_curve(held["join_call"]),
        speedup=_curve(held["speedup"]),
        decode={_key(text): _number(value) for text, value in held["decode"].items()},
        decode_speedup=_curve(held["decode_speedup"]),
        gemm=_curves(held["gemm"]),
        gemm_call=_curves(held["gemm_call"]),
    )


def _key(text: str) -> Key:
    fmt, dtype, tile = text.split("|")
    rows, columns = tile.split("x")
    return fmt, dtype, int(rows), int(columns)


def _curve(held: Mapping[str, Any]) -> Curve:
    if not held:
        raise ValueError("a curve without points")
    return {int(point): _number(value) for point, value in held.items()}


def _curves(held: Mapping[str, Any]) -> dict[str, dict[int, Curve]]:
    """Curves by dtype and threads."""
    return {
        dtype: {int(threads): _curve(curve) for threads, curve in by_threads.items()}
        for dtype, by_threads in held.items()
    }


def _number(value: Any) -> float:
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{value!r} is no time")
    return number


def _rounded(value: Any) -> Any:
    """Four digits: what a measurement on a shared machine is worth."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# -- the device --------------------------------------------------------------------------------


@cache
def device_name() -> str:
    """The CPU's model name and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "CPU part"))]
    return f"{names[0] if names else platform.processor() or platform.machine()} x{os.cpu_count()}"


@cache
def kernel_hash() -> str:
    """12 hex digits of the text that CPU kernels are made from: constants of other kernels do not hold."""
    root = Path(__file__).parent
    files = [file for folder in ("codegen/cpu", "formats") for file in sorted((root / folder).iterdir())]
    sources = [file for file in files if file.suffix in (".py", ".h", ".c")]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sources)).hexdigest()[:12]


def _stored_model() -> tuple[CostModel, int] | None:
    """What passes ask for: a model with stored constants, which measures nothing.

    Where none are stored, machines with matrix units have the built-in constants, which come from such a one.
    """
    from stoicc.codegen.cpu.build import instruction_set, missing_compiler

    if not _may_measure() or missing_compiler() is not None:
        return None
    try:
        stored = load_constants()
    except CodegenError:  # no cache folder, so nothing is stored
        return None
    if stored is None and instruction_set() == "amx":
        stored = BUILT_IN
    return None if stored is None else (CpuCostModel(stored), torch.get_num_threads())


def _gpu_that_is_there() -> tuple[CostModel, int] | None:
    """Constants of this machine's GPU; instructions are estimated, as nothing is compiled."""
    if not torch.cuda.is_available():
        return None
    from stoicc.gpu_model import find_gpu  # asks for triton

    try:
        return GpuCostModel(find_gpu(torch.cuda.get_device_name())), 1
    except InputError:
        return None


provide("cpu", _stored_model)
provide("triton", _gpu_that_is_there)
