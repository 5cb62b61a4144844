"""What was tuned, remembered on disk: one readable JSON file for each key.

A key says all that a result depends on: device, versions, the emitted code, shape, formats, batch
buckets and the space that was searched. Files are replaced whole and under a lock, so several
processes may read and write; a damaged one is reported, set aside and made anew.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stoicc.codegen.cache import cache_folder, locked, write_whole
from stoicc.ir.errors import CodegenError, InputError, brief
from stoicc.kernel import Kernel
from stoicc.tuning_result import TuningResult, from_json

Key = Mapping[str, Any]
FOLDER = "tuning"
DAMAGED = ".damaged"


def bucket(batch: int) -> int:
    """The least power of two from `batch` on: batch sizes of one bucket share what was tuned."""
    return 1 << (batch - 1).bit_length()


def key_of(kernel: Kernel, code: str, batch_sizes: Sequence[int], x_dtype: str, target: str, searched: str) -> Key:
    """What a tuning result depends on, as readable JSON values.

    Args:
        kernel: with the default schedule.
        code: the source that is emitted for it: a change of the compiler forgets what was tuned.
        target: the backend's name.
        searched: digest of the space.
    """
    program = kernel.program
    beside = program.beside
    return {
        "device": device_name(kernel.device),
        "versions": versions(),
        "code": hashlib.blake2b(code.encode(), digest_size=8).hexdigest(),
        "target": target,
        "threads": torch.get_num_threads(),
        "shape": list(program.shape),
        "tile": list(program.tile),
        "dtype": program.dtype,
        "x_dtype": x_dtype,
        "formats": {segment.format: segment.count for segment in program.segments},
        "beside": [pool.name for pool in beside.pools()] + ([beside.activation] if beside.activation else []),
        "batch_buckets": sorted({bucket(batch) for batch in batch_sizes}),
        "space": searched,
    }


def versions() -> dict[str, str]:
    """Versions of stoicc, torch and triton ("none" where one is not installed)."""
    import stoicc  # it imports this module

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"stoicc": stoicc.__version__, "torch": torch.__version__, "triton": triton}


def device_name(device: torch.device) -> str:
    """What a device calls itself, and how many cores it has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # the name that Python knows will do
    return f"{model}, {os.cpu_count()} cores"


@dataclass(frozen=True)
class TuningStore:
    """Results by key, in a folder; None: `tuning` in the user's cache folder for stoicc."""

    folder: Path | None = None

    def path(self, key: Key) -> Path:
        """The file of a key: shape and dtype to read, and a hash of all of it."""
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        shape = "x".join(map(str, key["shape"]))
        return self._folder() / f"{shape}-{key['dtype']}-{digest}.json"

    def read(self, key: Key) -> TuningResult | None:
        """What was tuned under this key, or None; a damaged file is set aside with a warning."""
        path = self.path(key)
        if not path.exists():
            return None
        with locked(path):
            return _parsed(path, key)

    def write(self, key: Key, result: TuningResult) -> None:
        """Remember a result in place of an older one of the same key.

        Raises:
            CodegenError: the folder cannot be written.
        """
        path = self.path(key)
        record = {"key": key, "result": json.loads(result.text)}
        with locked(path):
            write_whole(path, json.dumps(record, indent=1) + "\n")

    def _folder(self) -> Path:
        folder = cache_folder() / FOLDER if self.folder is None else self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CodegenError(
                f"tuning store {folder}: expected a folder that can be written, found {error.strerror or error}; "
                "set STOICC_CACHE_DIR"
            ) from error
        return folder


def _parsed(path: Path, key: Key) -> TuningResult | None:
    """The result of a file; one that is not whole is moved out of the way."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("key") != json.loads(json.dumps(key)):
            raise InputError("a record of another key")
        return from_json(record.get("result"))
    except FileNotFoundError:
        return None  # another process set it aside
    except (ValueError, OSError) as error:
        aside = path.with_name(path.name + DAMAGED)
        warnings.warn(
            f"tuning store: expected a whole record in {path}, found {brief(str(error))}; "
            f"it is kept as {aside.name} and will be tuned anew",
            RuntimeWarning,
            stacklevel=4,
        )
        path.replace(aside)
        return None
