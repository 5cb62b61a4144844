"""What the tuning bench compares, on small mosaics and made-up times."""

from dataclasses import replace

import pytest

from bench.autotune import BATCHES, FULL, QUICK, ROLES, compared, every_schedule, mosaics, summary, table_of
from bench.cost_model import tiled_weight
from stoicc.passes import default_pipeline

FAST, SLOW = ((64, 64), "build-csr", "tiles"), ((32, 64), "build-csr", "tiles")
TIMES = {FAST: [1.0, 2.0, 1.0], SLOW: [1.1, 2.2, 1.2]}


def test_ten_skewed_mosaics_some_with_codes():
    made = mosaics(FULL)
    assert len({str(mosaic) for mosaic in made}) == 10
    assert all(mosaic.skew > 0 for mosaic in made)
    assert sum(any(name.startswith("int") for name in mosaic.shares) for mosaic in made) == 4
    assert all(sum(mosaic.shares.values()) == pytest.approx(1) for mosaic in made)


def test_every_schedule_is_there_once():
    kernels = every_schedule(tiled_weight(replace(mosaics(QUICK)[0], shape=(256, 256))))
    assert len({kernel.schedule for kernel in kernels.values()}) == len(kernels)
    usual = ",".join(map(str, default_pipeline("cpu").passes[:-1]))
    assert ((64, 64), usual, "tiles") in kernels
    assert {tile for tile, _, executor in kernels if executor == "dense-once"} == {tile for tile, _, _ in kernels}
    assert {kernel.schedule.regime(BATCHES[-1]) for (_, _, kind), kernel in kernels.items() if kind == "tiles"} == {
        "tiles"
    }


def test_distances_are_medians_of_ratios():
    row = compared(dict.fromkeys(ROLES, SLOW), TIMES)
    assert row["best_s"] == 1.0
    assert row["best"] == "64x64 tiles build-csr"
    assert row["tuned_off"] == pytest.approx(0.1)
    assert compared(dict.fromkeys(ROLES, FAST), TIMES)["tuned_off"] == 0


def test_the_summary_counts_what_is_within_the_goal():
    near, far = (compared(dict.fromkeys(ROLES, name), TIMES) for name in (FAST, SLOW))
    rows = [{"mosaic": "m", "schedules": 2, "batches": {"1": near, "16": far, "64": far}}]
    figures = summary(rows)["tuned"]
    assert (figures["within_goal"], figures["of"]) == (1, 3)
    assert figures["largest_off"] == pytest.approx(0.1)
    assert table_of(rows).row_count == 3
