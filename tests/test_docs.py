"""The code of pages in docs/ runs as it stands there."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoicc.cli import app
from stoicc.ir.registry import REGISTRY

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text("utf-8")]


@pytest.fixture(autouse=True)
def formats_of_pages_are_forgotten():
    before = set(REGISTRY.names())
    yield
    for name in set(REGISTRY.names()) - before:
        REGISTRY.unregister(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / f"{page.stem}.py"
    code.write_text("\n".join(re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)))
    exec(compile(code.read_text(), str(code), "exec"), {"__name__": page.stem})


def test_commands_of_pages_have_these_options():
    text = (DOCS / "compress.md").read_text("utf-8")
    commands = re.findall(r"^stoicc (\w+) (.*)$", text, re.MULTILINE)
    assert {command for command, _ in commands} == {"compress", "report"}
    for command, rest in commands:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        assert all(option in shown for option in re.findall(r"--[a-z]+", rest)), shown
