"""The bench of operators measures what it says it does."""

import json

from bench import operators


def test_every_operator_is_measured_and_pruning_orders_as_published():
    weight, statistics = operators.layer(256)
    gram = statistics.hessian(0.0)
    rows = {
        name: operators.measure(name, call, weight, gram)
        for name, call in operators.operators(weight, statistics).items()
    }
    assert all(row.seconds > 0 and 0 < row.error < 3 for row in rows.values())
    assert rows["sparsegpt 2:4"].error < rows["wanda 2:4"].error < rows["nm_magnitude 2:4"].error
    assert rows["optq int4"].error < rows["group_absmax int4"].error < rows["absmax int4"].error
    stages = rows["sparsegpt 2:4 + int4"].stages
    assert {"invert H", "masks", "grids", "codes", "columns", "sweep"} <= set(stages)
    assert all(0 <= spent < row.seconds for row in rows.values() for spent in row.stages.values())


def test_the_command_prints_and_writes(tmp_path, capsys, monkeypatch):
    small = operators.layer(64)
    monkeypatch.setattr(operators, "layer", lambda size: small)
    operators.main(["--only", "wanda", "--json", str(tmp_path / "found.json")])
    assert "wanda 2:4" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["name"] for row in found["operators"]] == ["wanda 50%", "wanda 2:4"]
    assert found["machine"]["cores"] >= 1


def test_a_record_may_be_made_in_pieces(tmp_path, monkeypatch):
    small, path = operators.layer(64), tmp_path / "found.json"
    monkeypatch.setattr(operators, "layer", lambda size: small)
    for piece in ("wanda", "magnitude", "wanda 2:4"):
        operators.main(["--only", piece, "--json", str(path)])
    data = json.loads(path.read_text())
    assert [row["name"] for row in data["operators"]] == ["magnitude 50%", "wanda 50%", "wanda 2:4"]
    lines = [line.split(" | ") for line in operators.page(data | {"size": 4096}).splitlines()]
    assert [(line[0], line[2]) for line in lines[-2:]] == [("| wanda 50%", "3"), ("| wanda 2:4", "3")]
    operators.main(["--quick", "--only", "obd", "--json", str(path)])
    assert [row["name"] for row in json.loads(path.read_text())["operators"]] == ["obd 50%"]  # of another size
