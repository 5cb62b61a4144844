"""The gradient bench: its rows say what kernels hold, and times are positive."""

from bench.gradient import COLUMNS, measure


def test_rows_of_a_small_weight():
    rows = measure(128, (1, 5), repeats=1)
    assert [row[:2] for row in rows[:3]] == [[1, "dense"], [1, "nv24"], [1, "bitmap"]]
    assert len(rows) == 10
    for row in rows:
        said = dict(zip(COLUMNS, row, strict=True))
        assert said["dense / kernel"] == said["dense us"] / said["kernel us"] > 0
        assert said["scratch MB"] > 0
    assert rows[0][5] == 128 * 128 * 2 / 1e6
