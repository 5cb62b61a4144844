"""Layers on disk: an artefact for each kernel and a record for each layer, written whole or not at all.

A folder has `stoicc.json` (what it is), and in `layers/` a `.safetensors` artefact per kernel with one
`.json` per layer, which is written last: a layer is there when its record is.
"""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stoicc.codegen.cache import move_whole, write_whole
from stoicc.io import load
from stoicc.ir.errors import InputError, StoiccError, brief
from stoicc.kernel import Kernel
from stoicc.record import LayerRecord

VERSION = "1"
CONTENTS = "stoicc.json"
LAYERS = "layers"

Made = tuple[dict[str, Kernel], LayerRecord]
"""Kernels by the names at which they stand, and what was done."""


class ResumeFolder:
    """Finished layers of a compression that may be stopped and taken up again.

    Args:
        path: created where it is missing.
        fingerprint: what results depend on, as a hash for each kind of thing.

    Raises:
        InputError: a folder that was started with something else, or that holds other things.
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self.path = Path(path)
        if (self.path / CONTENTS).exists():
            self._refuse_other(fingerprint)
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(
                f"resume {path}: expected a new folder, or one of a run that was stopped, found other things; "
                "name a new folder"
            )
        make_folder(self.path / LAYERS)
        write_contents(self.path, {"resume": dict(fingerprint)})

    def read(self, name: str, loading: Mapping[str, Any]) -> Made | None:
        """What an earlier run made of a layer, if it got so far; `loading`: options of `stoicc.load`."""
        return read_layer(self.path, name, **loading) if record_path(self.path, name).exists() else None

    def write(self, name: str, kernels: Mapping[str, Kernel], record: LayerRecord) -> None:
        """Keep a finished layer."""
        write_layer(self.path, name, kernels, record)

    def _refuse_other(self, fingerprint: Mapping[str, str]) -> None:
        found = read_contents(self.path).get("resume")
        if not isinstance(found, Mapping):
            raise InputError(
                f"resume {self.path}: expected a run that was stopped, found a saved model; name a new folder"
            )
        other = [what for what, digest in fingerprint.items() if found.get(what) != digest]
        if other:
            raise InputError(
                f"resume {self.path}: expected the {', '.join(fingerprint)} that it was started with, found another "
                f"{' and '.join(other)}; name a new folder, or delete this one to start again"
            )


def make_folder(path: Path) -> None:
    """Create a folder and those above it; InputError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {path}: expected one that can be written, found {error.strerror or error}") from None


def write_contents(folder: Path, data: Mapping[str, Any]) -> None:
    """Write `stoicc.json`."""
    write_whole(folder / CONTENTS, json.dumps({"version": VERSION, **data}, indent=1) + "\n")


def read_contents(folder: Path) -> dict[str, Any]:
    """Read `stoicc.json`; InputError where it is missing, damaged or of another version."""
    data = _read_json(folder / CONTENTS)
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise InputError(f"folder {folder}: expected compressed layers of version {VERSION}, found another {CONTENTS}")
    return data


def write_layer(folder: Path, name: str, kernels: Mapping[str, Kernel], record: LayerRecord) -> None:
    """Write a layer's kernels, each once, and then its record."""
    files: dict[int, str] = {}
    for place, kernel in kernels.items():
        if id(kernel) not in files:
            file = f"{_file_name(place)}.safetensors"
            scratch = folder / LAYERS / f"{file}.{uuid.uuid4().hex}.tmp"
            try:
                kernel.save(scratch)
                move_whole(scratch, folder / LAYERS / file)
            finally:
                scratch.unlink(missing_ok=True)
            files[id(kernel)] = file
    data = {"name": name, "kernels": {place: files[id(kernel)] for place, kernel in kernels.items()}}
    write_whole(record_path(folder, name), json.dumps({**data, "record": record.data}, indent=1) + "\n")


def read_layer(folder: Path, name: str, target: str = "auto", on_missing: str = "error") -> Made:
    """Read what `write_layer` wrote; InputError where a file is missing or damaged."""
    data = _read_json(record_path(folder, name))
    try:
        places = {str(place): str(file) for place, file in data["kernels"].items()}
        record = LayerRecord.of(data["record"])
    except (KeyError, TypeError, AttributeError, InputError):
        raise InputError(
            f"folder {folder}, layer {name}: expected its record, found something else; delete it"
        ) from None
    kernels: dict[str, Kernel] = {}
    for file in dict.fromkeys(places.values()):
        try:
            kernels[file] = load(folder / LAYERS / file, target, on_missing=on_missing)
        except StoiccError as error:
            raise type(error)(f"folder {folder}, layer {name}: {error}") from None
        kernels[file].record = record
    return {place: kernels[file] for place, file in places.items()}, record


def record_path(folder: Path, name: str) -> Path:
    """Where a layer's record stands."""
    return folder / LAYERS / f"{_file_name(name)}.json"


def _file_name(name: str) -> str:
    """A layer's name as a file's: readable, and told apart by a hash."""
    readable = re.sub(r"[^\w.-]+", "_", name)[-80:]
    return f"{readable}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"folder file {path}: expected JSON, found {brief(str(error))}") from None
