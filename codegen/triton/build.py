"""From emitted text to a module: written to the cache folder, imported from there.

Triton reads a kernel's source with `inspect`, so the text has to be a file. The file's name holds
the text's hash: the same class of kernel is the same file, in every process.
"""

import importlib.util
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from stoicc.ir.errors import CodegenError


def cache_dir() -> Path:
    """`$STOICC_CACHE_DIR`, or the user's cache folder for stoicc; made if it is not there."""
    given = os.environ.get("STOICC_CACHE_DIR")
    if given:
        folder = Path(given)
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("stoicc"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CodegenError(
            f"kernel cache {folder}: expected a folder that can be written, found {error.strerror}; "
            "set STOICC_CACHE_DIR"
        ) from error
    return folder


def load(name: str, source: str) -> ModuleType:
    """The module of an emitted text; written once, imported once per process."""
    return _load(cache_dir() / f"{name}.py", source)


@cache
def _load(path: Path, source: str) -> ModuleType:
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        _write(path, source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _write(path: Path, source: str) -> None:
    """Write beside and rename: another process sees the whole file or none."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(source)
    os.replace(scratch, path)
