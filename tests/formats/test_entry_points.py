"""Formats of installed packages: the example package, and one that does not load."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/example_package"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
USE = """
import torch
import stoicc
from stoicc.testing import check_format

assert "ternary" in stoicc.formats(), stoicc.formats()
checked = check_format("ternary<group_size=16>", (32, 32), ("bf16",))
assert "C multiply equals decode" in checked, checked
weight = (torch.randn(100, 130).sign() * 0.5).bfloat16()
kernel = stoicc.compile(weight, ["ternary"], target="cpu")
assert [entry.format for entry in kernel.stats().formats] == ["ternary"]
assert torch.equal(kernel.to_dense(), weight)
print("used")
"""


def run(code: str, installed: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter to which the packages in a folder are installed."""
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_installed_package_brings_its_format(tmp_path):
    sources, installed = tmp_path / "sources", tmp_path / "installed"
    sources.mkdir()
    for name in ("pyproject.toml", "stoicc_ternary.py"):
        (sources / name).write_text((PACKAGE / name).read_text("utf-8"))
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(sources)], cwd=sources, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    wheel = sources / built.stdout.split()[-1]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    if "No module named pip" in done.stderr:
        subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(installed)], check=True)
    else:
        assert done.returncode == 0, done.stderr
    used = run(USE, installed)
    assert used.returncode == 0, used.stderr
    assert used.stdout.split() == ["used"]


@pytest.mark.parametrize(
    ("entry", "found"),
    [("absent_module:FORMAT", "No module named 'absent_module'"), ("json:dumps", "expected an instance")],
)
def test_a_package_that_fails_is_a_warning_and_stoicc_works(tmp_path, entry, found):
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[stoicc.formats]\nbroken = {entry}\n")
    done = run("import stoicc; print(*stoicc.formats())", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "int4" in done.stdout.split()
    assert re.search(
        rf"entry point broken = {entry} of stoicc.formats: expected a tile format .* found .*{found}", done.stderr
    )


def test_the_package_is_what_the_tutorial_builds():
    """Every function and method of the page stands in the package's file as it is."""
    page, file = (
        (ROOT / name).read_text("utf-8") for name in ("docs/formats.md", "tests/example_package/stoicc_ternary.py")
    )
    for left_out in ("On tensor cores", "When its layout changes"):  # what the package does without
        page = re.sub(rf"## {left_out}.*?(?=\n## )", "", page, flags=re.DOTALL)
    parts = re.findall(r"(?:^@triton.jit\n| {4})def \w+\(.*?(?=\n\n|\n```)", page, re.DOTALL | re.MULTILINE)
    names = set(re.findall(r"def (\w+)", "".join(parts)))
    assert {"planes", "encode", "decode", "approximate", "tile_mac", "decode_block", "decode_ternary"} <= names
    wanted = [part for part in parts if "def reject" not in part]
    assert [part for part in wanted if part not in file] == []
