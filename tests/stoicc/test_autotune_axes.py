"""What else the autotuner searches: threads that tiles run on, and the order of a weight's rows."""

from dataclasses import replace

import pytest
import torch

import stoicc
from stoicc.autotuner import autotune
from stoicc.codegen.cpu.backend import TilesExecutor
from stoicc.tuning_result import TuningResult
from stoicc.tuning_space import Space
from stoicc.tuning_store import TuningStore
from tests.stoicc.test_autotune import SMALL, fastest_with_four_parts, tuned


@pytest.fixture
def weight():
    values = torch.randn(128, 256).bfloat16()
    values[:64, :128] = 0
    return values


@pytest.fixture
def store(tmp_path):
    return TuningStore(tmp_path / "tuning")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_fewer_threads_are_pipeline_text_that_tiles_keep_to(weight, store, two_threads):
    def seconds(arm, batch):
        return 1e-3 * (0.4 if arm.structure.threads == 1 and arm.executor == "tiles" else 1.0)

    space = replace(SMALL, threads=(1,))
    result, _ = tuned(weight, store, seconds, space=space, batch_sizes=[1])
    assert "threads=1}" in result.pipeline
    assert result.threads == 2  # of torch: the pipeline holds the rest
    assert dict(result.kernel.schedule.launch) == {"threads": 1}
    replayed = TuningResult.from_text(result.text).replay(weight)
    assert replayed.schedule == result.kernel.schedule
    for kernel, threads in ((replayed, 1), (stoicc.compile(weight), 2)):
        executor = kernel.executor("tiles")
        assert isinstance(executor, TilesExecutor)
        assert executor._threads(1 << 20) == threads


def test_dense_once_has_one_arm_whatever_the_threads_of_tiles(weight, store, two_threads):
    result, _ = tuned(
        weight, store, lambda arm, batch: 1e-3, space=replace(SMALL, threads=(1,)), batch_sizes=[64], keep=99
    )
    panels = [trial for trial in result.trials if trial.executor == "dense-once"]
    assert [trial.threads for trial in panels] == [2]


def test_the_space_of_a_cpu_has_fewer_threads_and_reordered_rows(two_threads):
    assert Space.of("cpu").threads == (1,)
    assert Space.of("cpu").reorder == (False, True)


# -- row order ---------------------------------------------------------------------------------


@pytest.fixture
def scattered():
    """Rows of two kinds, each with a block of columns of its own, in turn: gathered, half of the tiles are empty."""
    values = torch.randn(256, 256)
    values[::2, :128] = 0
    values[1::2, 128:] = 0
    return values.bfloat16()


def test_rows_are_reordered_where_that_is_fastest(scattered, store):
    def seconds(arm, batch):
        return 1e-3 * (0.5 if arm.structure.reordered else 1.0)

    result, _ = tuned(scattered, store, seconds, space=SMALL, batch_sizes=[1])
    assert result.pipeline.startswith("reorder-rows{")
    assert result.kernel.program.beside.row_permutation is not None
    x = torch.randn(3, 256).bfloat16()
    torch.testing.assert_close(result.kernel(x), stoicc.compile(scattered)(x), rtol=2e-2, atol=2e-2)
    assert TuningResult.from_text(result.text).replay(scattered).ir == result.kernel.ir
    again = autotune(scattered, store=store, space=SMALL, batch_sizes=[1])
    assert again.remembered
    assert again.kernel.ir == result.kernel.ir


def test_rows_that_no_order_gathers_are_not_tried_twice(weight, store):
    result, _ = tuned(weight, store, fastest_with_four_parts, space=SMALL, batch_sizes=[1], keep=99)
    assert not any("reorder-rows" in trial.passes for trial in result.trials)


def test_rows_of_an_inspected_weight_stay(scattered, store):
    for given in (stoicc.compile(scattered), stoicc.inspect(scattered)):
        result, _ = tuned(given, store, fastest_with_four_parts, space=SMALL, batch_sizes=[1], keep=99, fresh=True)
        assert not any("reorder-rows" in trial.passes for trial in result.trials)
