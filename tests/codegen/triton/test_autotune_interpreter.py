"""Tuning for a GPU, its kernels run by the interpreter: launch parameters are searched and replayed."""

import pytest
import torch

import stoicc
from stoicc.tuning_space import Space
from stoicc.tuning_store import TuningStore
from tests.stoicc.tuning import FakeModel, FakeStopwatch, flat

pytestmark = pytest.mark.interpreter


def test_launch_parameters_are_tuned(tmp_path):
    weight = torch.randn(64, 128).half()
    weight[:, :64] = 0

    def seconds(arm, batch):
        fast = "num_warps=8" in arm.structure.passes and arm.executor == "tiles"
        return 1e-3 * (0.5 if fast else 1.0)

    result = stoicc.autotune(
        weight,
        [1, 20],
        Space(tiles=((32, 64),), parts=("auto", 2), num_warps=(None, 8), block_n=(None, 16)),
        target="cuda",
        keep=12,
        store=TuningStore(tmp_path),
        model=FakeModel(flat),
        stopwatch=FakeStopwatch(seconds),
    )
    assert result.target == "triton"
    assert dict(result.kernel.schedule.launch)["num_warps"] == 8
    assert result.kernel.schedule.regime(20) == "tiles"
    assert [trial.problem for trial in result.trials if trial.problem] == []
    again = stoicc.compile(weight, tile=result.tile, pipeline=result.pipeline, target="cuda")
    assert again.ir == result.kernel.ir
    x = torch.randn(3, 128).half()
    torch.testing.assert_close(again(x).float(), x.float() @ weight.float().T, rtol=1e-2, atol=1e-1)
