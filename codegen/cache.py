"""The folder where emitted text and what is built from it are kept, safe with several processes."""

import os
import tempfile
from pathlib import Path

from stoicc.ir.errors import CodegenError


def cache_folder() -> Path:
    """`$STOICC_CACHE_DIR`, or the user's cache folder for stoicc; made if it is not there."""
    given = os.environ.get("STOICC_CACHE_DIR")
    if given:
        folder = Path(given)
    else:
        import platformdirs  # not needed, and maybe not there, where the variable is set

        folder = Path(platformdirs.user_cache_dir("stoicc"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CodegenError(
            f"kernel cache {folder}: expected a folder that can be written, found {error.strerror}; "
            "set STOICC_CACHE_DIR"
        ) from error
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename: another process sees the whole file or none."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(scratch, path)
