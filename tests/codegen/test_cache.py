"""The folder that both emitting backends keep their text and libraries in."""

import os
import stat
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from stoicc.codegen import cache
from stoicc.codegen.cache import cache_folder, is_whole, locked, write_sum, write_whole
from stoicc.ir.errors import CodegenError


def test_a_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STOICC_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(CodegenError, match=r"expected a folder that can be written, found .*; set STOICC_CACHE_DIR"):
        cache_folder()


def test_files_are_written_whole(tmp_path):
    write_whole(tmp_path / "k.c", "int x;")
    write_whole(tmp_path / "k.c", "int y;")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("k.c", "int y;")]


def test_a_written_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "k.c", "int x;")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "k.c").stat().st_mode) == 0o644


def test_a_failed_write_says_so_and_leaves_nothing(tmp_path):
    (tmp_path / "k.c").mkdir()  # no file can take its name
    with pytest.raises(CodegenError, match=r"expected a folder that can be written, found .*; set STOICC_CACHE_DIR"):
        write_whole(tmp_path / "k.c", "int x;")
    assert [path.name for path in tmp_path.iterdir()] == ["k.c"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_a_folder_that_takes_no_files_is_an_error_at_once():
    sentence = r"kernel cache /proc/self: expected a folder that can be written, found .*; set STOICC_CACHE_DIR"
    with pytest.raises(CodegenError, match=sentence), locked(Path("/proc/self/k.so")):
        pass
    with pytest.raises(CodegenError, match=sentence):
        write_whole(Path("/proc/self/k.c"), "int x;")


def test_a_lock_that_is_never_released(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_PATIENCE", 0.1)
    sentence = r"expected k\.so to be built within 0 s, found its lock still held by another process; end that process"
    with FileLock(tmp_path / "k.so.lock"), pytest.raises(CodegenError, match=sentence), locked(tmp_path / "k.so"):
        pass


def test_a_file_that_is_not_what_was_written_is_not_whole(tmp_path):
    path = tmp_path / "k.so"
    assert not is_whole(path)
    path.write_bytes(b"library")
    assert not is_whole(path)
    write_sum(path)
    assert is_whole(path)
    path.write_bytes(b"librarx")
    assert not is_whole(path)
