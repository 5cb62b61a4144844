"""The house rules of the sources: imports point one way, one thing a file, files one can read."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"stoicc": "stoicc", "ir": "stoicc.ir", "passes": "stoicc.passes", "codegen": "stoicc.codegen"}
FOLDERS = (*PACKAGES, "tests", "bench")
LINKED = ("ir", "passes", "codegen")

MAY_IMPORT = {
    "ir": ("stoicc.ir",),
    "passes": ("stoicc.passes", "stoicc.ir"),
    "codegen": ("stoicc.codegen", "stoicc.ir"),
    "stoicc": ("stoicc",),
    "tests": ("stoicc", "tests", "bench"),
    "bench": ("stoicc", "bench"),
}
"""What of ours a folder may import; other people's packages are free."""

MAX_LINES = 400
MAX_TEST_LINES = 600


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    """Source files below these folders of the repository, links not followed."""
    files = (file for folder in folders for file in (ROOT / folder).rglob("*"))
    return sorted(f for f in files if f.suffix in suffixes and f.is_file() and f.resolve() == f)


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, module) of every import; a relative one keeps its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            # `from stoicc import ir` imports stoicc.ir, and must not pass as the bare package.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "stoicc" else [module]
            yield from ((node.lineno, name) for name in names)


def wrong_imports(text: str, folder: str) -> list[str]:
    """Imports that a file of `folder` may not have."""
    wrong = []
    for line, module in imported(ast.parse(text)):
        ours = module.split(".")[0] in ("stoicc", "tests", "bench", *LINKED) or module.startswith(".")
        if ours and not any(module == free or module.startswith(free + ".") for free in MAY_IMPORT[folder]):
            wrong.append(f"line {line}: import of {module}")
    return wrong


def names_declared(file: Path) -> list[str]:
    """The string values of `name: ClassVar[str] = "..."` in the classes of a file."""
    bodies = [node.body for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ClassDef)]
    return [
        node.value.value
        for body in bodies
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "name"
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]


def tracked() -> list[Path]:
    """Files that git holds or would take."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    found = {str(f.relative_to(ROOT)): wrong_imports(f.read_text("utf-8"), folder) for f in sources(folder)}
    assert found, f"{folder}/ holds no Python file"
    assert {file: wrong for file, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("folder", "statement"),
    [
        ("ir", "from stoicc.passes.base import Pass"),
        ("ir", "import stoicc"),
        ("ir", "from stoicc import passes"),
        ("passes", "def f():\n    from stoicc.codegen.executor import Executor"),
        ("passes", "import ir.types"),
        ("codegen", "from stoicc.formats import formats"),
        ("stoicc", "from codegen import executor"),
        ("stoicc", "from . import formats"),
        ("bench", "import tests.conftest"),
    ],
)
def test_a_wrong_import_is_seen(folder, statement):
    assert wrong_imports(statement, folder)


@pytest.mark.parametrize("statement", ["from stoicc.ir.types import Module", "from stoicc import ir", "import torch"])
def test_a_right_import_passes(statement):
    assert wrong_imports(statement, "passes") == []


def test_files_can_be_read_in_one_sitting():
    lines = {f: len(f.read_text("utf-8").splitlines()) for f in sources(*FOLDERS, suffixes=(".py", ".c", ".h"))}
    limit = {f: MAX_TEST_LINES if f.is_relative_to(ROOT / "tests") else MAX_LINES for f in lines}
    assert {str(f.relative_to(ROOT)): count for f, count in lines.items() if count > limit[f]} == {}


@pytest.mark.parametrize("name", LINKED)
def test_links_are_links(name):
    link = ROOT / "stoicc" / name
    assert link.is_symlink(), f"stoicc/{name} must be a link to ../{name}; `git config core.symlinks true`, check out"
    assert str(link.readlink()) == f"../{name}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_links_are_committed_as_links():
    command = ["git", "ls-files", "-s", *(f"stoicc/{name}" for name in LINKED)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["120000"] * len(LINKED)


def test_no_path_of_one_machine_is_written_down():
    # Put together here, so that this file does not hold what it looks for.
    machine = re.compile(
        rb"(?<![\w.:/-])/(?:" + b"|".join([b"wo" + b"rk", b"ro" + b"ot", b"ho" + b"me"]) + rb")/\w|/tm" + rb"p/w/"
    )
    found = [f"{f.relative_to(ROOT)}: {m[0].decode()}" for f in tracked() if (m := machine.search(f.read_bytes()))]
    assert found == []


def test_one_format_one_file():
    from stoicc.formats import formats  # here, so that the other rules are checked while the package is broken
    from stoicc.ir.registry import find_format

    public = {file.stem: file for file in sources("stoicc/formats") if not file.stem.startswith("_")}
    assert {stem: names_declared(file) for stem, file in public.items()} == {stem: [stem] for stem in public}
    registered = {name: type(find_format(name)).__module__ for name in formats()}
    builtin = {name: module for name, module in registered.items() if module.startswith("stoicc.formats.")}
    assert builtin == {stem: f"stoicc.formats.{stem}" for stem in public}


def test_one_pass_one_file():
    from stoicc.passes.catalogue import CATALOGUE

    named = {file.stem: names for file in sources("passes") if (names := names_declared(file))}
    assert {stem: [name.replace("-", "_") for name in names] for stem, names in named.items()} == {
        stem: [stem] for stem in named
    }
    listed = {name: target.partition(":")[0] for name, target in CATALOGUE.items()}
    assert listed == {names[0]: f"stoicc.passes.{stem}" for stem, names in named.items()}
