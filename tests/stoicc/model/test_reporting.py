"""The table of a compressed model."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import stoicc
from stoicc.record import LayerRecord
from tests.models import Transformer, record_of, token_batches


@pytest.fixture
def model():
    rules = [
        {"layers": "blocks.*", "steps": ["nm_magnitude", "group_absmax"], "compile": {"tile": [32, 32]}},
        {"layers": "head", "steps": []},
    ]
    return stoicc.compress(Transformer(), {"rules": rules}, token_batches())


def test_the_table_of_a_model(model, golden):
    text = re.sub(r"\d+\.\d$", "#.#", str(stoicc.report(model)), flags=re.MULTILINE)  # seconds
    golden(re.sub(r"0\.4\d{3} ", "0.4### ", text))


def test_rows_count_what_kernels_hold(model):
    report = stoicc.report(model)
    assert [row.name for row in report.rows][-1] == "head"
    assert report.dense_bytes == 4 * (2 * 8 * 64 * 64 + 48 * 64)
    assert report.bytes == sum(row.bytes for row in report.rows)
    up = next(row for row in report.rows if row.name == "blocks.0.up")
    assert up.shape == (128, 64)
    assert up.formats == (("int4_nv24", 8),)
    assert up.bits == 8 * up.bytes / (128 * 64)
    assert report.rows[-1].shares == "dense"
    assert (record_of(model.head).error, record_of(model.head).steps) == (0.0, ())


def test_kernels_that_nobody_compressed_have_a_row_too():
    model = nn.Sequential(stoicc.compile(torch.randn(64, 64)))
    assert re.search(r"\n0 +64 x 64 +dense +32.00 +16,384\n", str(stoicc.report(model)))
    with pytest.raises(stoicc.InputError, match="report: expected a model with compiled layers, found none in ReLU"):
        stoicc.report(nn.ReLU())


def test_records_travel_with_kernels(model):
    kernel = model.blocks[0].q
    record = record_of(kernel)
    assert record.steps
    assert copy.deepcopy(kernel).record == record
    assert pickle.loads(pickle.dumps(kernel)).record == record
    assert LayerRecord.of(record.data) == record
    assert stoicc.compile(torch.randn(16, 16)).record is None


@pytest.mark.parametrize("data", [None, {}, {"steps": 3, "error": None, "seconds": 1, "notes": []}])
def test_what_is_no_record_is_one_sentence(data):
    with pytest.raises(stoicc.InputError, match="layer record: expected steps, error, seconds, notes and a shape"):
        LayerRecord.of(data)
