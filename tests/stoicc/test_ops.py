"""Operators: what each computes, and that graphs lower to what they say."""

import pytest
import torch

import stoicc
from stoicc.ops import CompressedWeight
from stoicc.ops.graph import Prune, Update
from stoicc.ops.lowering import lower


def test_nm_magnitude_keeps_the_largest_of_each_group():
    weight = torch.randn(37, 101)
    kept = stoicc.ops.nm_magnitude(weight, 2, 4).dense()
    for row in range(37):
        for start in range(0, 101, 4):
            group, mine = weight[row, start : start + 4], kept[row, start : start + 4]
            best = sorted(range(len(group)), key=lambda i: -abs(group[i]))[:2]
            assert [i for i in range(len(group)) if mine[i] != 0] == sorted(best)
            assert torch.equal(mine[best], group[best])


@pytest.mark.parametrize(("n", "m"), [(0, 4), (1, 2), (3, 17), (256, 256), (100, 512), (512, 1024)])
def test_nm_magnitude_keeps_n_of_any_m(n, m):
    kept = stoicc.ops.nm_magnitude(torch.randn(3, 1024), n, m).dense() != 0
    for start in range(0, 1024 - m + 1, m):
        assert (kept[:, start : start + m].sum(1) == n).all()


def test_nm_magnitude_ties_keep_the_lower_column():
    assert stoicc.ops.nm_magnitude(torch.ones(1, 8)).dense().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [5, 32, 0])
def test_group_absmax_symmetric(bits, group_size):
    weight = torch.randn(9, 70)
    values = stoicc.ops.group_absmax(weight, bits, group_size).dense()
    top = 2 ** (bits - 1) - 1
    for row in range(9):
        for start in range(0, 70, group_size or 70):
            group = weight[row, start : start + (group_size or 70)]
            scale = group.abs().max() / top
            expected = (group / scale).round().clamp(-top, top) * scale
            torch.testing.assert_close(values[row, start : start + (group_size or 70)], expected, rtol=1e-6, atol=1e-7)


def test_group_absmax_zero_points_cover_the_range():
    weight = torch.rand(16, 64) + 3.0
    symmetric = (stoicc.ops.group_absmax(weight, 4).dense() - weight).norm()
    shifted = torch.cat((torch.rand(16, 32), -0.1 * torch.rand(16, 32)), 1)
    affine = (stoicc.ops.group_absmax(shifted, 4, 64, zero_points=True).dense() - shifted).norm()
    plain = (stoicc.ops.group_absmax(shifted, 4, 64).dense() - shifted).norm()
    assert affine < 0.8 * plain
    assert symmetric > 0


def test_pruned_weights_stay_zero_through_quantization():
    weight = torch.randn(64, 64)
    pruned = stoicc.ops.nm_magnitude(weight)
    quantized = stoicc.ops.group_absmax(pruned, zero_points=True)
    assert not quantized.dense()[pruned.dense() == 0].any()
    later = stoicc.ops.nm_magnitude(stoicc.ops.group_absmax(weight))
    tiled = stoicc.inspect(later)
    assert [segment.format for segment in tiled.program.segments] == ["int4_nv24"]
    assert torch.equal(tiled.to_dense(), later.dense())


def test_everything_at_once_lowers_to_the_effective_matrix():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(100, 150, generator=generator)
    rows, columns = torch.randperm(100, generator=generator), torch.randperm(150, generator=generator)
    x_scale, y_scale = torch.rand(150, generator=generator) + 0.5, torch.rand(100, generator=generator) + 0.5
    left, right = torch.randn(100, 4, generator=generator), torch.randn(4, 150, generator=generator)
    permuted = stoicc.ops.permute(weight, rows, columns)
    assert torch.equal(permuted.values(), weight[rows][:, columns])
    assert torch.equal(permuted.dense(), weight)
    scaled = stoicc.ops.scale(permuted, x_scale, y_scale)
    torch.testing.assert_close(scaled.dense(), weight)
    adapted = stoicc.ops.low_rank(scaled, left, right)
    torch.testing.assert_close(adapted.dense(), weight + left @ right)
    compressed = stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(adapted), 8)
    assert torch.equal(stoicc.inspect(compressed).to_dense(), compressed.dense())
    steps = " | ".join(lower(compressed).steps)
    assert all(word in steps for word in ("permute", "scale", "low rank", "2:4 magnitude", "int8 AbsMax"))
    assert str(compressed).count("\n") == 5


def test_stack_is_one_matrix():
    plain, quantized = torch.randn(30, 40), stoicc.ops.group_absmax(torch.randn(50, 40))
    pruned = stoicc.ops.nm_magnitude(torch.randn(20, 40))
    adapted = stoicc.ops.low_rank(pruned, torch.randn(20, 2), torch.randn(2, 40))
    permuted = stoicc.ops.permute(torch.randn(10, 40), rows=torch.randperm(10))
    stacked = stoicc.ops.stack(plain, quantized, adapted, permuted)
    dense = [plain, quantized.dense(), adapted.dense(), permuted.dense()]
    torch.testing.assert_close(stacked.dense(), torch.cat(dense))
    assert torch.equal(stoicc.inspect(stacked).to_dense(), stacked.dense())


def test_operators_leave_their_input_alone():
    weight = torch.randn(64, 64)
    first = stoicc.ops.nm_magnitude(weight)
    before = str(first)
    stoicc.ops.group_absmax(first)
    assert str(first) == before


def test_weights_that_move_keep_to_the_mask():
    weight, kept = torch.randn(8, 8), torch.rand(8, 8) < 0.5
    pruned = CompressedWeight.of(weight).then(Prune(kept, "some"))
    moved = pruned.then(Update(weight + 1, "one more"))
    assert torch.equal(moved.dense(), (weight + 1) * kept)
    rows, columns = torch.randperm(8), torch.randperm(8)
    both = stoicc.ops.stack(stoicc.ops.permute(weight, None, columns), stoicc.ops.permute(moved, rows, columns))
    assert torch.equal(both.dense(), torch.cat((weight, moved.dense())))
    left = lower(both).kept
    assert left is not None
    assert torch.equal(left, torch.cat((torch.ones(8, 8), kept[rows][:, columns])).bool())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w: CompressedWeight.of(w).then(Update(w / 0, "up")),
            r"operator: expected finite values \[8, 8\] in torch.float32 to go on with, found .* or infinities",
        ),
        (lambda w: CompressedWeight.of(w).then(Update(w[1:], "up")), r"to go on with, found \[7, 8\] in torch.float32"),
        (lambda w: stoicc.ops.group_absmax(w).then(Update(w, "up")), r"found codes; quantize afterwards"),
        (lambda w: stoicc.ops.nm_magnitude(w, 5, 4), r"ops.nm_magnitude: expected 0 <= n <= m with m >= 1, found 5:4"),
        (lambda w: stoicc.ops.group_absmax(w, 9), r"expected 2 to 8 bits and group_size >= 0, found bits=9"),
        (lambda w: stoicc.ops.nm_magnitude(w.long()), r"weight: expected dtype f32, f16, bf16"),
        (
            lambda w: stoicc.ops.nm_magnitude(w, where=torch.ones(2, 2)),
            r"expected a bool mask of the tile grid \(1, 1\)",
        ),
        (lambda w: stoicc.ops.low_rank(w, torch.ones(8, 2), torch.ones(3, 8)), r"expected float factors \[8, r\]"),
        (lambda w: stoicc.ops.permute(w, torch.zeros(8).long()), r"expected rows to be a permutation of 8"),
        (lambda w: stoicc.ops.scale(w, torch.zeros(8)), r"expected input_scale of 8 positive finite values"),
        (lambda w: stoicc.ops.permute(stoicc.ops.group_absmax(w), torch.arange(8)), r"found codes; permute first"),
        (lambda w: stoicc.ops.scale(stoicc.ops.group_absmax(w), torch.ones(8)), r"found codes; scale first"),
        (lambda w: stoicc.ops.stack(w, torch.ones(3, 9)), r"ops.stack: expected weights of K = 8"),
        (lambda w: stoicc.ops.stack(), r"expected at least one weight, found none"),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    with pytest.raises(stoicc.InputError, match=message):
        call(torch.randn(8, 8))
