"""Classes, shapes, batches and launch constants that nobody chose, emulated against float64."""

from dataclasses import replace
from random import Random

import pytest
import torch

from stoicc.codegen.gluon.compile import compile_for
from stoicc.codegen.gluon.launch import unsupported
from tests.codegen.gluon.classes import PARAMETERS
from tests.codegen.gluon.test_emulated import TOLERANCE, error_of
from tests.kernel_classes import KernelClass, make_case
from tests.ptx.run import emulate

BESIDE = (*map(str, PARAMETERS["beside"]), "permuted", "scales", "all")
BATCHES = (1, 2, 7, 8, 9, 15, 17, 31, 33, 63, 65, 100, 127, 129, 140)
LAUNCH = {"num_warps": (4, 8), "num_stages": (2, 4, 8), "prologue": (0, 1), "block_n": (16, 32, 64, 128)}


@pytest.fixture(autouse=True)
def _no_triton_cache(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n < 2 else pytest.mark.slow) for n in range(40)])
def test_any_class_equals_the_reference(seed: int) -> None:
    """Four times the tolerance: few elements, and weights that are scaled unrounded, are further from the reference."""
    random = Random(seed)
    tile, weight = random.choice(PARAMETERS["tile"]), str(random.choice(PARAMETERS["weight"]))
    formats, batch = str(random.choice(PARAMETERS["formats"])), random.choice(BATCHES)
    kernel = KernelClass(formats, tile, weight, "same", random.choice(BESIDE), random.random() < 0.6, 16)  # type: ignore[arg-type]
    shape = random.randint(1, 300), random.randint(1, 720)
    case = make_case(kernel, shape, seed=seed, parts=random.randint(2, 9), empty=random.choice((0.0, 0.2, 0.7)))
    given = {name: random.choice(values) for name, values in LAUNCH.items() if random.random() < 0.3}
    assert case.module.schedule is not None
    module = replace(case.module, schedule=case.module.schedule.launch_with(**given))
    arch = random.choice(("sm_80", "sm_86", "sm_90"))
    if (why := unsupported(module, kernel.x_dtype, int(arch[3:]))) is not None:
        assert "KB, sm_86 has" in why or "range of f16" in why
        return
    compiled = compile_for(module, kernel.x_dtype, batch, arch)
    assert all(launched.machine().spills_in_loops == 0 for launched in compiled.kernels)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(seed)).to(kernel.x_dtype)
    assert error_of(emulate(compiled, x, case.pools), case, x) < 4 * TOLERANCE[weight]
