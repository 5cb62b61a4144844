"""Which executor serves which batch on a GPU: where the cost model of that GPU predicts the crossover."""

import pytest

from stoicc.ir.errors import PassError
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, cost_model, default_pipeline
from stoicc.passes.cost_gpu import GPUS, VENDOR_BATCH, GpuCostModel
from tests.ir.modules import make_program


def regimes(text: str, formats: str = "int4", shape: tuple[int, int] = (8192, 28672)) -> list[tuple[str, int | None]]:
    program = make_program(shape, (128, 64), (formats,))
    made = Pipeline.parse(f"drop-empty,build-csr,{text}").run(Module(program))
    assert made.schedule is not None
    return [(regime.executor, regime.max_batch) for regime in made.schedule.regimes]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost_model._PROVIDERS, "triton", lambda: None)


def test_the_default_of_gpus_is_predicted() -> None:
    """At the crossover tiles are predicted to be no slower, at twice that batch slower."""
    assert str(default_pipeline("cuda")).endswith("regimes{tiles=auto,device=gpu}")
    (tiles, most), (above, rest) = regimes("regimes{tiles=auto,device=gpu}")
    assert (tiles, above, rest) == ("tiles", "dense-once", None)
    module = Pipeline.parse("drop-empty,build-csr").run(Module(make_program((8192, 28672), (128, 64), ("int4",))))
    assert module.schedule is not None
    model = GpuCostModel(GPUS["H200"])

    def seconds(kind: str, batch: int) -> float:
        assert module.schedule is not None
        return model.predict(Module(module.tiles, module.schedule.executor(kind)), batch, "bf16").seconds

    assert most is not None
    assert seconds("tiles", most) <= seconds("dense-once", most)
    assert seconds("tiles", 2 * most) > seconds("dense-once", 2 * most)


def test_another_gpu_has_another_crossover(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 has fewer operations for each byte: tiles serve larger batches there."""
    h200 = regimes("regimes{tiles=auto,device=gpu}")[0][1]
    monkeypatch.setitem(cost_model._PROVIDERS, "triton", lambda: (GpuCostModel(GPUS["A100"]), 1))
    a100 = regimes("regimes{tiles=auto,device=gpu}")[0][1]
    assert h200 is not None
    assert a100 is not None
    assert a100 > h200


@pytest.mark.parametrize("formats", ["dense", "nv24", "int4_nv24"])
def test_a_library_serves_large_batches_where_it_may_keep_a_copy(formats: str) -> None:
    assert str(default_pipeline("cuda", library=True)).endswith("regimes{tiles=auto,above=vendor,device=gpu}")
    (tiles, most), (above, rest) = regimes("regimes{tiles=auto,above=vendor,device=gpu}", formats)
    assert (tiles, above, rest) == ("tiles", "vendor", None)
    assert most is not None
    assert most >= VENDOR_BATCH // 2


@pytest.mark.parametrize("batch", [2048, 4096])
@pytest.mark.parametrize("formats", ["dense", "nv24", "int4", "int4_nv24"])
def test_with_a_copy_no_kernel_is_predicted_to_lose_to_a_library(formats: str, batch: int) -> None:
    """0.97 of the faster of cuBLAS and, for a matrix of 2:4 tiles, cuSPARSELt."""
    module = default_pipeline("cuda", library=True).run(Module(make_program((8192, 28672), (128, 64), (formats,))))
    dense = default_pipeline("cuda", library=True).run(Module(make_program((8192, 28672), (128, 64), ("dense",))))
    for gpu in ("H200", "A100"):
        model = GpuCostModel(GPUS[gpu])
        ours, cublas = (model.predict(one, batch, "bf16").seconds for one in (module, dense))
        assert cublas / ours >= (1.05 if formats == "nv24" else 0.97)


def test_a_device_that_is_none() -> None:
    with pytest.raises(PassError, match="device"):
        Pipeline.parse("regimes{device=tpu}")
