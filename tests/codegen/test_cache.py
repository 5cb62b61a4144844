"""The folder that both emitting backends keep their text and libraries in."""

import pytest

from stoicc.codegen.cache import cache_folder, write_whole
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
