"""The gradient bench: its rows say what kernels hold, and times are positive."""

from bench.gradient import COLUMNS, measure, page


def test_rows_of_a_small_weight():
    rows = measure(128, (1, 5), repeats=1)
    assert [row[:2] for row in rows[:3]] == [[1, "dense"], [1, "nv24"], [1, "bitmap"]]
    assert len(rows) == 10
    for row in rows:
        said = dict(zip(COLUMNS, row, strict=True))
        assert said["dense / kernel"] == said["dense us"] / said["kernel us"] > 0
        assert said["scratch MB"] > 0
    assert rows[0][5] == 128 * 128 * 2 / 1e6


def test_the_page_has_a_line_for_each_batch():
    rows = [
        [1, "dense", 50.0, 100.0, 2.0, 8.0, 1.5],
        [1, "nv24", 25.0, 100.0, 4.0, 4.5, 1.5],
        [64, "dense", 1, 2, 2, 8, 3],
    ]
    rows.append([64, "nv24", 1234.0, 4321.0, 3.5, 4.5, 2.5])
    lines = page({"machine": {"threads": 2, "cpu": "a CPU", "torch": "2"}, "size": 64, "rows": rows}).splitlines()
    assert lines[0].startswith("64 x 64 bf16 weights, 2 threads of a CPU, torch 2; scratch of a call at most 3.0 MB")
    assert lines[-2:] == ["| 1 | 100 | 2.00 | 4.00 |", "| 64 | 2 | 2.00 | 3.50 |"]
