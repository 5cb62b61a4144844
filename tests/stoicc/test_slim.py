"""The whole SLiM pipeline: what its steps are, what each wins, and that all of it reaches the kernel."""

import pytest
import torch

import stoicc
from stoicc.ops.lowering import lower
from stoicc.ops.statistics import Statistics
from tests.survives import assert_survives


def layer(rows=128, columns=192, dtype=torch.float32):
    weight = torch.randn(rows, columns)
    weight[torch.rand(rows, columns) < 0.003] *= 8  # outliers, which a scale of the largest weight suffers from
    mixing = torch.randn(columns, columns) / columns**0.5 + torch.eye(columns)
    x = torch.randn(512, columns) @ mixing * torch.logspace(-1, 1, columns)[torch.randperm(columns)]
    return weight.to(dtype), x


def output_error(compressed, weight, x):
    return ((x @ (compressed.dense().float() - weight.float()).T).norm() / (x @ weight.float().T).norm()).item()


def test_slim_is_its_steps():
    weight, x = layer()
    statistics = Statistics.of(x)
    expected = stoicc.ops.wanda(stoicc.ops.slim_quant(weight), statistics, n=2, m=4)
    expected = stoicc.ops.quantize_adapter(stoicc.ops.slim_lora(expected, statistics))
    assert torch.equal(stoicc.ops.slim(weight, statistics).dense(), expected.dense())
    assert torch.equal(stoicc.ops.slim(weight, x).dense(), expected.dense())
    assert str(stoicc.ops.slim(weight, x)).count("\n") == 4


def test_every_step_wins_what_the_paper_says():
    """SLiM-LoRA < Naive-LoRA < none in the output's error, and SLiM-Quant < AbsMax."""
    weight, x = layer()
    statistics = Statistics.of(x)
    pruned = stoicc.ops.wanda(stoicc.ops.slim_quant(weight), statistics, n=2, m=4)
    errors = [
        output_error(each, weight, x)
        for each in (
            stoicc.ops.slim(weight, x, adapter_bits=None),
            stoicc.ops.naive_lora(pruned),
            pruned,
            stoicc.ops.wanda(stoicc.ops.absmax(weight), statistics, n=2, m=4),
        )
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.97 * errors[1]
    assert output_error(stoicc.ops.slim(weight, x), weight, x) < 1.1 * errors[0] < errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "format"),
    [
        ({}, "int4_nv24<group_size=0>"),
        ({"activation_aware": True}, "int4_nv24<group_size=0>"),
        ({"sparsity": 0.5, "rank": 7}, "int4<group_size=0>"),
        ({"bits": None, "adapter_bits": None}, "nv24"),
    ],
)
def test_the_pipeline_survives_lowering(dtype, options, format):
    weight, x = layer(dtype=dtype)
    assert_survives(stoicc.ops.slim(weight, x, **options), format)


def test_what_it_became_is_said():
    weight, x = layer()
    lowering = " | ".join(stoicc.inspect(stoicc.ops.slim(weight, x)).lowering)
    for part in ("int4 SLiM-Quant, clip", "Wanda 2:4", "SLiM-LoRA, rank 13, leaves", "int4 AbsMax, group 128"):
        assert part in lowering


def test_an_operator_may_come_before():
    weight, x = layer()
    scaled = stoicc.ops.scale(weight, torch.rand(192) + 0.5)
    found = stoicc.ops.slim(scaled, x)
    assert lower(found).input_scale is not None
    assert output_error(found, weight, x) < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: stoicc.ops.slim(w, x, rank=129), r"ops.slim_lora: expected a rank from 1 to 128"),
        (lambda w, x: stoicc.ops.slim(w, x * float("nan")), r"calibration, batch 0: expected finite inputs, found nan"),
        (lambda w, x: stoicc.ops.slim(w, x.numpy()), r"expected Statistics, found ndarray"),
        (lambda w, x: stoicc.ops.slim(w, x, adapter_bits=1), r"ops.quantize_adapter: expected 2 to 8 bits"),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    weight, x = layer()
    before = weight.clone()
    with pytest.raises(stoicc.InputError, match=message):
        call(weight, x)
    assert torch.equal(weight, before)
