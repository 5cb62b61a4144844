"""The contract of formats with their Triton decode run, in the interpreter.

Run as `TRITON_INTERPRET=1 python -m pytest -m interpreter`; see test_interpreter.py.
"""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import triton
import triton.language as tl

import stoicc
from stoicc import contract_kernels
from stoicc.formats.dense import Dense
from stoicc.ir.format import Tile, TileMac, TritonDecode
from stoicc.ir.registry import REGISTRY
from stoicc.testing import CHECKS, check_format

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where a device overflows to infinity without a word.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

TILE = (32, 32)
BUILT_IN = [
    "empty",
    "dense",
    "nv24",
    "bitmap",
    *(f"{name}<{options}>" for name in ("int8", "int4", "int4_nv24") for options in ("group_size=16", "group_size=0")),
    *(f"{name}<group_size=32, zero_points=true>" for name in ("int8", "int4", "int4_nv24")),
    *(
        f"{name}<{options}>"
        for name in ("int2", "int3")
        for options in ("group_size=16, zero_points=true", "group_size=0")
    ),
    *("fp8", "fp8<kind=e5m2, group_size=16>", "mxfp4", "nvfp4", "nm", "nm<n=3, m=4>"),
    "masked<values=int4<group_size=16>>",
    "masked<mask=nm, values=int8<group_size=0, zero_points=true>>",
    "masked<mask=nv24, values=fp8>",
    "masked<values=fp8<kind=e5m2>>",
    "masked<values=int2<group_size=16>>",
    *("group_sparse", "group_sparse<group_size=8, zero_points=true>"),
    *("outlier<values=int4<group_size=16>>", "outlier<values=int3<group_size=16, zero_points=true>, share=0.05>"),
    *("masked<values=mxfp4>", "masked<mask=nv24, values=nvfp4>"),
    *("masked<mask=nm, values=int4<group_size=32>>", "masked<mask=nm<n=1, m=4>, values=int8<group_size=0>>"),
    "masked<mask=nm<n=4, m=16>, values=mxfp4>",
    "masked<mask=nv24, values=int2<group_size=32, zero_points=true>>",
]


@pytest.fixture(autouse=True)
def device_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C of formats is checked in tests/formats; compiling it again here would take most of the time."""
    for check in ("C multiply equals decode", "C panel decode equals decode"):
        monkeypatch.setitem(CHECKS, check, lambda subject: iter(()))


@pytest.mark.parametrize("text", BUILT_IN)
def test_built_in_formats_decode_on_devices_as_they_do_in_torch(text: str) -> None:
    assert "Triton decode_block equals decode" in check_format(text, TILE) or text == "empty"


def test_every_built_in_format_is_there() -> None:
    assert {text.partition("<")[0] for text in BUILT_IN} == set(stoicc.formats())


def test_the_check_multiplies_with_both_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    given = contract_kernels.run_executor

    def run(kernel, kind, x):
        ran.append((kernel.target, kind))
        return given(kernel, kind, x)

    monkeypatch.setattr(contract_kernels, "run_executor", run)
    check_format("nv24", TILE, ("bf16",))
    assert ran == [("cuda", "tiles"), ("cuda", "dense-once")]


@triton.jit
def decode_shifted(values, BM: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr):
    """Columns in another order than they are stored in."""
    return tl.load(values + tl.arange(0, BM)[:, None] * BK + (tl.arange(0, BK)[None, :] ^ 1))


class Shifted(Dense):
    """A Triton decode that disagrees with the torch decode, and no C."""

    name: ClassVar[str] = "shifted"

    def decode_block(self, tile: Tile, dtype: str) -> TritonDecode:
        return TritonDecode(decode_shifted)

    def tile_mac(self, tile: Tile, dtype: str) -> TileMac | None:  # type: ignore[override]
        return None


@pytest.fixture
def shifted() -> Iterator[Shifted]:
    fmt = Shifted()
    stoicc.register_format(fmt)
    yield fmt
    REGISTRY.unregister("shifted")


@pytest.mark.parametrize("executor", ["tiles", "dense-once"])
def test_a_decode_that_disagrees_is_named(shifted: Shifted, executor: str) -> None:
    sentence = rf"Triton decode_block equals decode \(bf16\): random tiles times the identity \({executor}\) differ"
    with pytest.raises(stoicc.FormatError, match=sentence):
        check_format(shifted, TILE, ("bf16",))
