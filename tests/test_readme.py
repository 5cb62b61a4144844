"""The code of README.md runs as it stands there."""

import re
from pathlib import Path

from bench import figures
from stoicc.ir.registry import REGISTRY

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    module = tmp_path / "readme.py"
    module.write_text("\n".join(blocks))
    namespace: dict[str, object] = {"__name__": "readme"}
    try:
        exec(compile(module.read_text(), str(module), "exec"), namespace)
    finally:
        REGISTRY.unregister("ternary")
    assert (tmp_path / "small.safetensors").stat().st_size < 4096 * 1024 * 3.2 / 8 + 20_000


def test_figures_are_those_on_record():
    for document in figures.DOCUMENTS:
        text = document.read_text()
        assert "<!-- figures" in text
        assert figures.filled(text) == text, f"{document.name}: run python -m bench.figures"


def test_readme_shows_commands_that_exist():
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert (README.parent / "docs" / "mosaic.png").stat().st_size > 1000
