"""What pyproject.toml says about packages is what the tree holds and what a wheel installs."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"stoicc": "stoicc", "ir": "stoicc.ir", "passes": "stoicc.passes", "codegen": "stoicc.codegen"}
DATA = ("*.h", "*.c", "py.typed")

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def sources(pattern: str) -> dict[str, Path]:
    """Files of the four source folders by where they install, links not followed."""
    found = {}
    for folder, package in FOLDERS.items():
        for file in (ROOT / folder).rglob(pattern):
            inside = file.relative_to(ROOT / folder)
            if not any((ROOT / folder / parent).is_symlink() for parent in inside.parents if parent.name):
                found[f"{package.replace('.', '/')}/{inside.as_posix()}"] = file
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from a copy of the sources (a build leaves folders behind), without a network."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", PROJECT["project"].get("readme")):
        if name is not None:
            shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(copy)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(copy / done.stdout.split()[-1]) as archive:
        return archive.namelist()


def test_every_package_of_the_tree_is_listed():
    in_tree = {str(Path(name).parent).replace("/", ".") for name in sources("*.py")}
    assert in_tree == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_package_has_an_init_file():
    files = sources("*.py")
    folders = {Path(name).parent for name in files}
    assert [str(folder) for folder in sorted(folders) if f"{folder}/__init__.py" not in files] == []


def test_wheel_holds_every_module_and_data_file(wheel):
    wanted = {name for pattern in ("*.py", *DATA) for name in sources(pattern)}
    assert wanted - set(wheel) == set()


def test_wheel_installs_nothing_beside_stoicc(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"stoicc", f"stoicc-{PROJECT['project']['version']}.dist-info"}


def test_wheel_carries_licence_and_command(wheel):
    held = {name.partition(".dist-info/")[2] for name in wheel if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt"} <= held


def test_version_stands_the_same_in_both_places():
    text = (ROOT / "stoicc/__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', text, re.MULTILINE) == [PROJECT["project"]["version"]]


def test_every_dependency_is_a_range_with_a_reason():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("dependencies = [\n")[1].split("\n]\n")[0]
    assert len(lines.splitlines()) == len(PROJECT["project"]["dependencies"])
    assert [line for line in lines.splitlines() if "#" not in line] == []
    assert [name for name in PROJECT["project"]["dependencies"] if "==" in name.partition(";")[0]] == []
