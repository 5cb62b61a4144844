"""Processes with batches of their own compress as one process with all of them does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import stoicc

ROOT = Path(__file__).parents[3]

WORKER = """
import sys, torch, torch.distributed as dist, stoicc
from tests.models import Transformer, kernels_of, record_of, token_batches

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
torch.manual_seed(0)
alone, together, batches = Transformer(blocks=1), Transformer(blocks=1), token_batches(5)
together.load_state_dict(alone.state_dict())
reference = {"target": "reference"}
recipe = {
    "width": [{"producers": "blocks.{}.up", "consumers": "blocks.{}.down", "keep": 0.5}],
    "rules": [
        {"layers": "*.up", "steps": ["wanda"], "budget": {"sparsity": 0.5}, "compile": reference},
        {"layers": "*", "steps": [{"sparsegpt": {"n": 2, "m": 4}}], "compile": reference},
    ],
}
stoicc.compress(alone, recipe, batches, dtype=torch.float64)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mine = batches[:1] if rank == 0 else batches[1:]
stoicc.compress(together, recipe, mine, dtype=torch.float64, distributed=True, resume=f"{folder}/{rank}")
for name, kernel in kernels_of(together).items():
    expected = kernels_of(alone)[name]
    torch.testing.assert_close(kernel.to_dense(), expected.to_dense(), rtol=1e-3, atol=1e-4)
    assert torch.equal(kernel.to_dense() == 0, expected.to_dense() == 0), name
    assert abs(record_of(kernel).error / record_of(expected).error - 1) < 1e-3, name
states = [None, None]
dist.all_gather_object(states, {name: kernel.to_dense() for name, kernel in kernels_of(together).items()})
assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

rule = {"layers": "blocks.*", "steps": ["budget_mosaic"], "budget": {"bytes_per_weight": 0.8}, "compile": reference}
torch.manual_seed(1)
dense = Transformer(blocks=1)
alone = stoicc.compress(dense, {"rules": [rule]}, batches, dtype=torch.float64, in_place=False)
together = stoicc.compress(dense, {"rules": [rule]}, mine, dtype=torch.float64, in_place=False, distributed=True)
shares = [[record_of(kernel).steps[0] for kernel in kernels_of(model).values()] for model in (alone, together)]
assert len(set(shares[0])) > 1
assert shares[0] == shares[1]  # each batch has as many sequences of one half as of the other
dist.all_gather_object(states, shares[1])
assert states[0] == states[1]

other = mine if rank == 0 else lambda model: model.head(torch.ones(2, 64))
try:
    stoicc.compress(Transformer(), ["wanda"], other, distributed=True)
except stoicc.InputError as error:
    assert "expected the batches of every process to call the same layers in the same order" in str(error)
else:
    raise AssertionError("processes with other layers went on")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_are_as_one(tmp_path):
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in range(2)]
    assert [worker.wait(150) for worker in workers] == [0, 0]


def test_without_processes_it_is_one_sentence():
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(stoicc.InputError, match=r"compress: expected torch.distributed to be initialised with distrib"):
        stoicc.compress(model, ["wanda"], [torch.randn(4, 8)], distributed=True)
    assert type(model[0]) is nn.Linear
