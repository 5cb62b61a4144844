"""From emitted text to a module: written to the cache folder, imported from there.

Triton reads a kernel's source with `inspect`, so the text has to be a file. The file's name holds
the text's hash: the same class of kernel is the same file, in every process.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from stoicc.codegen.cache import cache_folder, write_whole


def load(name: str, source: str) -> ModuleType:
    """The module of an emitted text; written once, imported once per process."""
    return _load(cache_folder() / f"{name}.py", source)


@cache
def _load(path: Path, source: str) -> ModuleType:
    if not path.exists() or path.read_text(encoding="utf-8") != source:
        write_whole(path, source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
