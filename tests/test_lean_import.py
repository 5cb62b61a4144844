"""`import stoicc` is lean: no question to CUDA, no library that only the command line or the demo needs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

Seen = dict[str, Any]

HEAVY = {"matplotlib", "typer", "rich", "transformers", "sentence_transformers"}

ABSENT = HEAVY | {"safetensors", "platformdirs"}
"""What a machine that only has torch, triton, numpy, scipy and pytest lacks (torch brings networkx and filelock)."""

# Every way to ask torch for a GPU is replaced by one that records who asked, then `{statement}` runs.
PROBE = """
import json, sys, traceback
import torch

asked = []

def spy(name, real):
    def ask(*args, **kwargs):
        asked.append(name + " from " + traceback.extract_stack()[-2].filename)
        return real(*args, **kwargs)
    return ask

for name in ("is_available", "device_count", "current_device", "init", "_lazy_init", "get_device_properties",
             "get_device_capability", "get_device_name"):
    setattr(torch.cuda, name, spy(name, getattr(torch.cuda, name)))
before = set(sys.modules)
{statement}
print(json.dumps({{
    "asked": asked,
    "initialized": torch.cuda.is_initialized(),
    "imported": sorted({{module.partition(".")[0] for module in set(sys.modules) - before}}),
    "file": getattr(sys.modules.get("stoicc"), "__file__", None),
}}))
"""


def probe(statement: str) -> Seen:
    """What `statement` did in a fresh interpreter at the repository's root."""
    command = [sys.executable, "-c", PROBE.format(statement=statement)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def imported() -> Seen:
    return probe("import stoicc")


def test_import_asks_nothing_of_cuda(imported):
    assert imported["asked"] == []
    assert not imported["initialized"]


def test_import_brings_no_command_line_or_demo_library(imported):
    assert imported["file"] is not None, "stoicc/__init__.py is missing: an empty namespace was imported"
    assert HEAVY.isdisjoint(imported["imported"])


def test_the_probe_sees_a_question_and_an_import():
    seen = probe("import rich; torch.cuda.is_available()")
    assert [question.partition(" ")[0] for question in seen["asked"]] == ["is_available"]
    assert "rich" in seen["imported"]


@pytest.mark.parametrize("module", ["stoicc", "bench.gpu_check"])
def test_a_gpu_machine_with_little_more_than_torch_can_import(module):
    seen = probe(f"sys.modules.update(dict.fromkeys({sorted(ABSENT)})); import {module}, stoicc")
    assert seen["file"] is not None
