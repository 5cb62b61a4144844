"""The folder where emitted text and what is built from it are kept, safe with several processes."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoicc.ir.errors import CodegenError

_PATIENCE = 600.0
"""Seconds to wait for another process that builds the same file."""


def cache_folder() -> Path:
    """`$STOICC_CACHE_DIR`, or the user's cache folder for stoicc; made if it is not there.

    Raises:
        CodegenError: it is not there and cannot be made.
    """
    given = os.environ.get("STOICC_CACHE_DIR")
    if given:
        folder = Path(given)
    else:
        import platformdirs  # not needed, and maybe not there, where the variable is set

        folder = Path(platformdirs.user_cache_dir("stoicc"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename: another process sees the whole file or none.

    Raises:
        CodegenError: the folder cannot be written; nothing is left behind.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        move_whole(scratch, path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    finally:
        _remove(scratch)


def move_whole(scratch: Path, path: Path) -> None:
    """Rename once the bytes are on the disk, so that a crash leaves no half file under the name.

    Raises:
        CodegenError: the folder cannot be written.
    """
    try:
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise _unwritable(path.parent, error) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from building `path`; the lock is a file beside it.

    Raises:
        CodegenError: the folder cannot be written, or another process holds the lock for long.
    """
    from filelock import FileLock, Timeout  # not needed, and maybe not there, where text alone is emitted

    lock = FileLock(f"{path}.lock", timeout=_PATIENCE)
    try:
        with open(lock.lock_file, "ab"):  # filelock tries again for ever where the folder takes no files
            pass
        lock.acquire()
    except Timeout as error:
        raise CodegenError(
            f"kernel cache {path.parent}: expected {path.name} to be built within {_PATIENCE:.0f} s, found its lock "
            f"still held by another process; end that process, or remove {lock.lock_file}"
        ) from error
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    try:
        yield
    finally:
        lock.release()


def write_sum(path: Path) -> None:
    """Note the size and hash of a file beside it (`.sum`)."""
    write_whole(path.with_suffix(".sum"), _sum(path))


def is_whole(path: Path) -> bool:
    """True where a file is there and is what `write_sum` saw: a truncated library kills who loads it."""
    try:
        return path.with_suffix(".sum").read_text(encoding="utf-8") == _sum(path)
    except (OSError, UnicodeDecodeError):
        return False


def _sum(path: Path) -> str:
    data = path.read_bytes()
    return f"{len(data)} {hashlib.blake2b(data).hexdigest()}\n"


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # what kept it from being written is told already


def _unwritable(folder: Path, error: OSError) -> CodegenError:
    return CodegenError(
        f"kernel cache {folder}: expected a folder that can be written, found {error.strerror or error}; "
        "set STOICC_CACHE_DIR"
    )
