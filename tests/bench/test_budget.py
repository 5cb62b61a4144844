"""The bench of the budget policy: its rows, claims and records."""

import io

import pytest
import torch
from rich.console import Console

import stoicc
from bench import budget, budget_search
from bench.budget_record import Record, claims_table, rows, rows_table, shown_claims
from bench.budget_rows import LAYER, MODEL, Found, all_rows, claims
from bench.budget_solver import phases, phases_table
from stoicc.ops import Statistics
from stoicc.ops._output import output_error


def found(name, bits, *draws):
    return Found(name, bits, bits, {"error": list(draws)}, {"int4": 4}, [0.5 * draw for draw in draws])


UNIFORM = [
    found("int4_nv24", 3.25, 0.10, 0.11, 0.12),
    found("int3", 3.25, 0.030, 0.031, 0.032),
    found("int4", 4.25, 0.010, 0.010, 0.010),
    found("int8", 8.25, 0.0, 0.0, 0.0),
]


def verdicts(*mosaics):
    return [claim.holds for claim in claims([*UNIFORM, *mosaics], "error")]


def test_claims_are_those_of_three_draws():
    assert verdicts(found(MODEL, 3.25, 0.03, 0.03, 0.03)) == [True, True]
    assert verdicts(found(MODEL, 3.25, 0.05, 0.05, 0.05)) == [False, True]
    assert verdicts(found(MODEL, 3.25, 0.09, 0.09, 0.09)) == [False, False]
    assert verdicts(found(MODEL, 4.25, 0.012, 0.009, 0.010)) == [True]  # not worse beyond noise
    assert verdicts(found(MODEL, 4.25, 0.012, 0.0121, 0.0119)) == [False]
    assert verdicts(found(MODEL, 5.0, 0.004, 0.004, 0.004)) == [True]  # the line is at 0.0081
    assert verdicts(found(MODEL, 5.0, 0.012, 0.002, 0.008)) == [False]  # within noise is not clearly above
    line = claims([*UNIFORM, found(MODEL, 5.0, 0.004, 0.004, 0.004)], "error")[0]
    assert line.other == pytest.approx(0.010 * 3.25 / 4)
    assert "int4 to int8" in line.what
    assert line.foretold == pytest.approx(1 - 0.004 / 0.008125)


def test_only_the_mosaics_that_are_asked_for_are_judged():
    assert claims([*UNIFORM, found(LAYER, 3.25, 0.03, 0.03, 0.03)], "error") == []
    assert len(claims([*UNIFORM, found(LAYER, 3.25, 0.03, 0.03, 0.03)], "error", LAYER)) == 2


def test_records_read_back_and_are_shown(tmp_path):
    record = Record(
        "GPT", "about", {"error": "of it"}, {"python": "3"}, (*UNIFORM, found(MODEL, 4.25, 0.01, 0.01, 0.01))
    )
    record.write(tmp_path / "one.json")
    assert Record.read(tmp_path / "one.json") == record
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(rows_table(record), claims_table(record))
    assert "not worse than int4" in console.export_text()
    assert rows(record).count("\n") == 6
    assert "| holds |" in shown_claims(record)


def test_rows_are_measured_and_resumed(tmp_path, rng):
    wanted = [row for row in all_rows() if (row.name, row.bits) in {("int4", 4.25), (MODEL, 4.25)}]
    console = Console(quiet=True)
    record = budget.run("synthetic", wanted, console, tmp_path)
    assert [one.stored for one in record.rows] == [pytest.approx(4.25, abs=0.2), pytest.approx(4.25, abs=0.2)]
    assert all(0 < one.mean("squared error") < 0.02 for one in record.rows)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    kept[0].write_text(kept[0].read_text().replace(str(record.rows[0].scores["squared error"][0]), "7.0"))
    assert budget.run("synthetic", wanted, console, tmp_path).rows[0].scores == {"squared error": [7.0]}


def test_the_solver_is_timed_by_phase():
    measured = phases((128, 256))
    assert len(measured.seconds) == 3
    assert measured.chosen > 0
    assert phases_table(measured).row_count == 4


def test_a_search_keeps_bytes_and_never_loses(rng):
    weight = (torch.randn(128, 512) * torch.randn(128, 1).exp()).bfloat16()
    statistics = Statistics.of(torch.randn(900, 512) @ torch.randn(512, 512) * torch.randn(512).exp())
    layer = budget_search.Layer.of(weight, statistics, 3.5)
    first = layer.sweep(torch.from_numpy(layer.found.choice).view(layer.found.table.grid))
    best, kept, tried = layer.search(first, 6)
    assert 0 <= kept <= tried <= 12
    assert tried > 0
    assert (best.errors <= first.errors).all()
    assert torch.equal(best.choice.sort(1).values, first.choice.sort(1).values)
    torch.testing.assert_close(layer.sweep(best.choice).errors, best.errors)
    whole = output_error(weight, stoicc.ops.budget_mosaic(weight, statistics, 3.5 / 8).dense(), statistics)
    assert float(first.errors.sum()) == pytest.approx(whole**2 * layer.task.energy(), rel=1e-3)
