"""The bench of the cost model: which schedule counts as picked."""

import torch

import stoicc
from bench.cost_model import TIE, pick


def test_of_schedules_that_are_foretold_alike_the_one_of_fewest_items_is_picked():
    weight = torch.randn(128, 256)
    text = "drop-empty,build-csr,split-k{{parts={}}},balance,fuse-epilogue,regimes{{tiles=auto}}"
    kernels = {f"{parts} parts": stoicc.compile(weight, pipeline=text.format(parts)) for parts in (4, 1, 2)}
    assert len(kernels["4 parts"].schedule.items) > len(kernels["1 parts"].schedule.items)
    alike = {"4 parts": 1.0, "2 parts": 1 + TIE / 2, "1 parts": 1 + 0.9 * TIE}
    assert pick(alike, kernels) == "1 parts"
    assert pick({**alike, "1 parts": 1 + 2 * TIE}, kernels) == "2 parts"
    assert pick({**alike, "4 parts": 0.9}, kernels) == "4 parts"
