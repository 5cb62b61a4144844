"""A compressed model written and read back, and what is refused."""

import copy
import shutil

import pytest
import torch
from torch import nn

import stoicc
from tests.models import Transformer, kernels_of, record_of, token_batches

RULES = {"rules": [{"layers": "blocks.*", "steps": ["nm_magnitude", "group_absmax"]}]}


@pytest.fixture
def case(tmp_path):
    dense, batches = Transformer(tied=True), token_batches()
    model = stoicc.compress(copy.deepcopy(dense), RULES, batches)
    stoicc.save_model(model, tmp_path / "saved")
    return dense, model, batches, tmp_path / "saved"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_comes_back_bit_for_bit(case, device):
    _, model, batches, folder = case
    with torch.device(device):
        other = Transformer(tied=True)
    assert stoicc.load_model(other, folder) is other
    assert torch.equal(other(batches[0]), model(batches[0]))
    assert list(kernels_of(other)) == list(kernels_of(model))
    assert [record_of(each) for each in kernels_of(other).values()] == [
        record_of(each) for each in kernels_of(model).values()
    ]
    assert other.head.weight.data_ptr() == other.embedding.weight.data_ptr()
    assert str(stoicc.report(other)) == str(stoicc.report(model))


def test_one_kernel_at_two_names_stays_one(tmp_path):
    def made():
        layer = nn.Linear(64, 64)
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = stoicc.compress(made(), ["nm_magnitude"])
    stoicc.save_model(model, tmp_path / "saved")
    assert len(list((tmp_path / "saved" / "layers").iterdir())) == 2
    other = stoicc.load_model(made(), tmp_path / "saved")
    assert other.get_submodule("0") is other.get_submodule("2")


def test_torch_encoders_run_after_loading(tmp_path):
    def made():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1).eval()

    x = torch.randn(2, 5, 32)
    model = stoicc.compress(made(), ["nm_magnitude"], [x])
    stoicc.save_model(model, tmp_path / "saved")
    other = stoicc.load_model(made(), tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def wider():
    return Transformer(width=32, tied=True)


def shorter():
    return Transformer(blocks=1, tied=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (wider, r"expected blocks.0.q \[64, 64\] as saved in .*, found \[32, 32\]; give a model of the same arch"),
        (shorter, r"expected blocks.1.q \[64, 64\] as saved in .*, found none"),
        (Transformer, r"expected head.bias to be absent as saved in .*, found \[48\]"),
    ],
)
def test_another_architecture_is_refused_and_left_alone(case, other, message):
    model = other()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(stoicc.InputError, match=message):
        stoicc.load_model(model, case[3])
    assert not kernels_of(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_saved_or_read(case, tmp_path):
    dense, model, batches, folder = case
    with pytest.raises(stoicc.InputError, match="model Transformer: expected kernels to save, found none"):
        stoicc.save_model(dense, tmp_path / "other")
    with pytest.raises(stoicc.InputError, match="expected a new one to save to, found other things"):
        stoicc.save_model(model, folder)
    with pytest.raises(stoicc.InputError, match=r"folder file .*stoicc\.json: expected JSON, found .*No such file"):
        stoicc.load_model(dense, tmp_path)
    stoicc.compress(copy.deepcopy(dense), RULES, batches, resume=tmp_path / "run")
    with pytest.raises(stoicc.InputError, match="expected a saved model, found a run of compress; finish it"):
        stoicc.load_model(dense, tmp_path / "run")
    with pytest.raises(stoicc.InputError, match="expected a run that was stopped, found a saved model"):
        stoicc.compress(dense, RULES, batches, resume=folder)
    (folder / "rest.safetensors").write_bytes(b"nothing")
    with pytest.raises(stoicc.InputError, match=r"expected rest\.safetensors, found"):
        stoicc.load_model(dense, folder)
    shutil.rmtree(folder / "layers")
    with pytest.raises(stoicc.InputError, match=r"folder file .*expected JSON"):
        stoicc.load_model(dense, folder)
    assert not kernels_of(dense)
