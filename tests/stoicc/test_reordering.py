"""Weights compiled with reorder-rows: the same matrix, the same y, fewer tiles."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu

import stoicc
from stoicc.ir import InputError, PassError
from stoicc.ir.dtypes import bits
from stoicc.passes import WeightPass, default_pipeline, register_pass
from stoicc.passes.catalogue import unregister_pass
from stoicc.reordering import occupied
from tests.products import assert_product

STEPS = "drop-empty,build-csr,split-k{parts=2},balance,fuse-epilogue"
PIPELINE = f"reorder-rows,{STEPS}"
TARGETS = ["cpu", "reference"]
FORMATS = ("empty", "nv24", "dense")
"""No bitmap: it takes next to nothing for rows that are empty within a tile, and leaves no bytes to save."""


def shuffled(
    rows: int = 300, columns: int = 450, patterns: int = 4, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Rows of a few block patterns, shuffled, with tails of tiles on both sides."""
    rng = np.random.default_rng(2)
    kinds = rng.random((patterns, -(-columns // 32))) < 0.3
    mask = np.repeat(kinds[rng.integers(0, patterns, rows)], 32, axis=1)[:, :columns]
    values = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32))
    return torch.where(torch.from_numpy(mask), values, torch.zeros(())).to(dtype)


def tiles_of(kernel: stoicc.Kernel) -> int:
    """Tiles that store something."""
    return sum(segment.count for segment in kernel.program.segments if segment.pools)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_the_same_in_fewer_tiles(dtype, target):
    weight = shuffled(dtype=dtype)
    kernel = stoicc.compile(weight, FORMATS, (32, 32), pipeline=PIPELINE, target=target)
    plain = stoicc.compile(weight, FORMATS, (32, 32), pipeline=STEPS, target=target)
    assert kernel.program.beside.row_permutation is not None
    assert tiles_of(plain) >= 1.5 * tiles_of(kernel)
    assert torch.equal(bits(kernel.to_dense()), bits(weight))
    for batch in (1, 5, 40):
        x = torch.randn(batch, 450, dtype=dtype)
        assert_product(kernel(x), x, weight, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("target", TARGETS)
def test_the_default_pipeline_behind_it_runs(target):
    weight = shuffled()
    pipeline = f"reorder-rows,{default_pipeline(target)}"
    kernel = stoicc.compile(weight, FORMATS, (32, 32), pipeline=pipeline, target=target)
    assert ",".join(kernel.schedule.applied) == f"reorder-rows{{min_saving=0.1}},{default_pipeline(target)}"
    x = torch.randn(3, 450)
    assert_product(kernel(x), x, weight)


@pytest.mark.parametrize("target", TARGETS)
def test_what_stands_beside_the_tiles_stays_right(target):
    """y = gelu(S_o W S_i x + L R x + b), all in the order of y and x."""
    weight, rows, columns = shuffled(), 300, 450
    bias = torch.randn(rows)
    output_scale, input_scale = torch.rand(rows) + 0.5, torch.rand(columns) + 0.5
    left, right = torch.randn(rows, 3), torch.randn(3, columns)
    scaled = stoicc.ops.scale(weight, input_scale=input_scale, output_scale=output_scale)
    expression = stoicc.ops.low_rank(scaled, left, right)
    options = {"bias": bias, "activation": "gelu", "tile": (32, 32), "target": target}
    kernel = stoicc.compile(expression, FORMATS, pipeline=PIPELINE, **options)
    assert kernel.program.beside.row_permutation is not None
    torch.testing.assert_close(kernel.to_dense(), expression.dense())
    x = torch.randn(4, columns)
    expected = gelu(x.double() @ expression.dense().double().T + bias.double())
    torch.testing.assert_close(kernel(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("group", "zeros"), [(32, False), (128, True), (0, False)])
def test_codes_of_an_operator_move_with_their_rows(group, zeros, target):
    weight = shuffled(dtype=torch.bfloat16)
    quantized = stoicc.ops.group_absmax(weight, 4, group, zero_points=zeros)
    kernel = stoicc.compile(quantized, tile=(32, 32), pipeline=PIPELINE, target=target)
    assert kernel.program.beside.row_permutation is not None
    held = {segment.format.partition("<")[0] for segment in kernel.program.segments}
    assert held <= {"int4", "int4_nv24", "empty"}
    assert torch.equal(bits(kernel.to_dense()), bits(quantized.dense()))
    x = torch.randn(3, 450, dtype=torch.bfloat16)
    assert_product(kernel(x), x, quantized.dense(), 1e-2)


def test_rows_that_an_operator_left_alone_may_move_among_the_others():
    """Tiles of both kinds of rows keep their values; what they stand for is the same bit for bit."""
    where = (torch.arange(10)[:, None] + torch.arange(15)) % 2 == 0
    weight = shuffled(320, 480, dtype=torch.bfloat16)
    quantized = stoicc.ops.group_absmax(weight, 4, 32, where=where, tile=(32, 32))
    for least in ("0.0", "0.1"):
        pipeline = f"reorder-rows{{min_saving={least}}},{STEPS}"
        kernel = stoicc.compile(quantized, pipeline=pipeline, target="reference")
        assert torch.equal(bits(kernel.to_dense()), bits(quantized.dense()))


@given(st.integers(0, 99), st.integers(1, 100), st.integers(1, 80), st.sampled_from([0.02, 0.2]))
def test_any_weight_is_held_bit_for_bit(seed, rows, columns, density):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 2
    weight[torch.rand(weight.shape, generator=generator) > density] = 0
    weight[torch.rand(weight.shape, generator=generator) < 0.002] = -0.0
    pipeline = f"reorder-rows{{min_saving=0.0}},{STEPS}"
    kernel = stoicc.compile(weight, tile=(16, 16), pipeline=pipeline, target="reference")
    plain = stoicc.compile(weight, tile=(16, 16), pipeline=STEPS, target="reference")
    assert torch.equal(bits(kernel.to_dense()), bits(weight))
    assert kernel.stats().payload_bytes <= plain.stats().payload_bytes
    x = torch.randn(2, columns, generator=generator)
    torch.testing.assert_close(kernel(x), x @ weight.T, rtol=1e-4, atol=1e-4)


def test_a_permutation_that_is_there_is_composed_with():
    weight, rows, columns = shuffled(), torch.randperm(300), torch.randperm(450)
    permuted = stoicc.ops.permute(weight, rows=rows)
    kernel = stoicc.compile(permuted, FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")
    first = stoicc.inspect(permuted, tile=(32, 32))
    assert not torch.equal(kernel.pools["row_permutation"], first.pools["row_permutation"])
    assert torch.equal(kernel.to_dense(), weight)
    both = stoicc.ops.permute(weight[:, columns.argsort()], columns=columns)
    kernel = stoicc.compile(both, FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")
    assert torch.equal(kernel.to_dense(), weight[:, columns.argsort()])
    x = torch.randn(2, 450)
    assert_product(kernel(x), x, weight[:, columns.argsort()])


@pytest.mark.parametrize("steps", [PIPELINE, STEPS], ids=["after", "before"])
def test_a_reordered_weight_prints(steps, golden):
    """Rows of two patterns by turns: half of the tiles are empty once those of one pattern stand together."""
    weight = torch.zeros(64, 64)
    weight[0::2, :32] = torch.arange(1.0, 33.0)
    weight[1::2, 32:] = torch.arange(1.0, 33.0)
    golden(str(stoicc.compile(weight, ["empty", "dense"], (32, 32), pipeline=steps, target="reference").ir))


def test_it_saves_and_loads(tmp_path):
    kernel = stoicc.compile(shuffled(), FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")
    kernel.save(tmp_path / "w.safetensors")
    back = stoicc.load(tmp_path / "w.safetensors", target="cpu")
    assert back.ir == kernel.ir
    assert torch.equal(back.to_dense(), shuffled())
    x = torch.randn(2, 450)
    assert torch.equal(back(x), kernel(x))


@pytest.mark.parametrize("name", ["dense", "random", "grouped", "negative zeros"])
def test_it_is_skipped_where_it_would_not_pay(name):
    weight = shuffled()
    if name == "dense":
        weight = torch.randn(300, 450)
    elif name == "random":
        weight = torch.randn(300, 450) * (torch.rand(300, 450) < 0.1)
    elif name == "grouped":
        kernel = stoicc.compile(weight, FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")
        weight = weight[kernel.pools["row_permutation"].long()]
    else:
        weight = torch.where(weight == 0, torch.tensor(-0.0), weight)  # stored, as lossless means bit patterns
    kernel = stoicc.compile(weight, FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")
    assert kernel.program.beside.row_permutation is None
    assert "reorder-rows{min_saving=0.1}" in kernel.schedule.applied
    assert kernel.program == stoicc.compile(weight, FORMATS, (32, 32), pipeline=STEPS, target="cpu").program
    assert torch.equal(bits(kernel.to_dense()), bits(weight))


def test_bytes_of_the_formats_decide():
    """Tiles that gathering empties are cheap int8 ones here; those that stay are most of the bytes."""
    codes = shuffled(320, 512, patterns=4)[:, :256].sign() * 0.5
    weight = torch.cat((codes, torch.randn(320, 256 * 8)), 1)
    formats = ["int8<group_size=32>", "dense", "empty"]
    kernel = stoicc.compile(weight, formats, (32, 32), pipeline=PIPELINE, target="cpu")
    assert kernel.program.beside.row_permutation is None
    alone = stoicc.compile(codes, formats, (32, 32), pipeline=PIPELINE, target="cpu")
    assert alone.program.beside.row_permutation is not None


def test_a_kernel_keeps_the_order_that_it_was_made_with():
    kernel = stoicc.compile(shuffled(), FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")
    again = stoicc.compile(kernel, pipeline="reorder-rows,drop-empty,build-csr,fuse-epilogue", target="cpu")
    assert again.program == kernel.program
    assert again.schedule.applied == ("reorder-rows{min_saving=0.1}", "drop-empty", "build-csr", "fuse-epilogue")
    other = stoicc.compile(kernel, pipeline="drop-empty,build-csr,fuse-epilogue", target="cpu")
    assert other.schedule.applied == again.schedule.applied
    assert torch.equal(other.to_dense(), shuffled())


# -- errors --------------------------------------------------------------------------------


def test_tiles_that_are_cut_already_are_refused():
    for made in (stoicc.inspect(shuffled()), stoicc.compile(shuffled(), target="cpu")):
        with pytest.raises(PassError, match="pass reorder-rows: expected a weight, found a program whose tiles are"):
            stoicc.compile(made, pipeline=PIPELINE, target="cpu")


def test_a_tile_map_is_refused():
    with pytest.raises(
        InputError, match=r"inspect: expected no tile_map with reorder-rows, found one; .*stoicc\.ops\.permute"
    ):
        stoicc.compile(shuffled(64, 64), tile_map=[["dense"]], pipeline=PIPELINE, target="cpu")


def test_what_is_wrong_with_a_weight_is_said_of_its_own_rows():
    weight = shuffled()
    weight[123, 45] = float("nan")
    with pytest.raises(InputError, match="expected finite values, found nan at row 123, column 45"):
        stoicc.compile(weight, FORMATS, (32, 32), pipeline=PIPELINE, target="cpu")


@dataclass(frozen=True)
class Reverse(WeightPass):
    """A user's pass on the weight: rows from the last to the first, or something that is no permutation."""

    name: ClassVar[str] = "test-reverse"
    wrong: bool = False

    def row_order(self, weight):
        order = np.arange(len(weight.occupied))[::-1].copy()
        return order // 2 if self.wrong else order


@pytest.fixture
def reverse() -> Iterator[None]:
    register_pass(Reverse)
    yield
    unregister_pass("test-reverse")


@pytest.mark.usefixtures("reverse")
def test_a_pass_of_a_user_reorders_rows_too():
    weight = torch.randn(50, 70)
    kernel = stoicc.compile(weight, pipeline=f"test-reverse,{STEPS}", target="cpu")
    assert kernel.pools["row_permutation"].tolist() == list(range(50))[::-1]
    assert torch.equal(kernel.to_dense(), weight)
    both = stoicc.compile(shuffled(), FORMATS, (32, 32), pipeline=f"test-reverse,{PIPELINE}", target="cpu")
    assert torch.equal(both.to_dense(), shuffled())


@pytest.mark.usefixtures("reverse")
def test_what_is_no_permutation_is_refused():
    with pytest.raises(PassError, match="pass test-reverse: expected row_order to give a permutation of 50 rows, fou"):
        stoicc.compile(torch.randn(50, 70), pipeline=f"test-reverse{{wrong=true}},{STEPS}", target="cpu")


# -- what a pass sees ----------------------------------------------------------------------


def test_occupied_is_by_row_and_tile_column():
    weight = torch.zeros(3, 70)
    weight[0, 31], weight[1, 69], weight[2, 32] = 1.0, -0.0, float("nan")
    assert occupied(weight, 32).tolist() == [[True, False, False], [False, False, True], [False, True, False]]
