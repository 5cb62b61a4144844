"""Low-rank adapters: the closed form, against random factors and a plain SVD, and their codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stoicc
from stoicc.ir.dtypes import bits as bits_of
from stoicc.ir.factors import stored_bits
from stoicc.ops._svd import LARGE, truncated_svd
from stoicc.ops.graph import CompressedWeight, Prune
from stoicc.ops.lowering import lower
from stoicc.ops.slim_lora import channel_saliency
from stoicc.ops.statistics import Statistics
from tests.products import assert_product
from tests.survives import TOLERANCES, assert_survives


def pruned(rows=96, columns=128, dtype=torch.float32):
    """A 2:4 weight, what it was made of, and inputs whose channels differ in size by far."""
    weight = torch.randn(rows, columns).to(dtype)
    x = torch.randn(200, columns) * torch.logspace(-1.5, 1.5, columns)[torch.randperm(columns)]
    return stoicc.ops.nm_magnitude(weight), weight, x


def factors_of(compressed):
    """L and R of a weight."""
    factors = lower(compressed).low_rank
    assert factors is not None
    return factors


def best_left(matrix, rank):
    """The squared norm that the best rank-r product leaves, from singular values in float64."""
    return torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()


def left_by(compressed, weight, weights):
    """||(W - W_c - L R) diag(weights)||^2 in float64."""
    left, right = factors_of(compressed)
    product = left.double() @ right.double()
    return ((weight.double() - compressed.values().double() - product) * weights.double()).square().sum().item()


@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (40, 40)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_factors_match_the_closed_form(shape, rank):
    compressed, weight, x = pruned(*shape)
    statistics = Statistics.of(x)
    saliency = channel_saliency(statistics)
    assert saliency.min() == 2 * statistics.mean_absolute.min()
    for found, weights in (
        (stoicc.ops.naive_lora(compressed, rank), torch.ones(shape[1])),
        (stoicc.ops.slim_lora(compressed, statistics, rank), saliency),
    ):
        best = best_left((weight - compressed.dense()) * weights, rank)
        error = left_by(found, weight, weights)
        assert error <= 1.0001 * best + 1e-9 * ((weight - compressed.dense()) * weights).square().sum()


def test_slim_lora_is_the_svd_of_the_weighted_error_divided_again():
    compressed, weight, x = pruned()
    s = channel_saliency(Statistics.of(x)).double()
    u, d, v = torch.linalg.svd((weight - compressed.dense()).double() * s, full_matrices=False)
    expected = (u[:, :9] * d[:9]) @ v[:9] / s
    left, right = factors_of(stoicc.ops.slim_lora(compressed, Statistics.of(x), 9))
    torch.testing.assert_close(left.double() @ right.double(), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_no_random_factors_do_better(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    compressed, weight, x = pruned(32, 48)
    saliency = channel_saliency(Statistics.of(x))
    found = stoicc.ops.slim_lora(compressed, Statistics.of(x), rank)
    error = (weight - compressed.dense()) * saliency
    least = left_by(found, weight, saliency)
    # Any left factor with the right factor that is best for it, and the answer itself moved a little.
    left = torch.randn(32, rank, generator=generator)
    right = torch.linalg.lstsq(left, error).solution
    assert least <= (error - left @ right).double().square().sum() * (1 + 1e-5)
    own = [factor + 0.02 * torch.randn(factor.shape, generator=generator) for factor in factors_of(found)]
    assert least <= ((error / saliency - own[0] @ own[1]) * saliency).double().square().sum() * (1 + 1e-5)


def test_the_order_of_output_errors():
    compressed, weight, x = pruned()
    outputs = [
        (x @ (each.dense() - weight).T).norm()
        for each in (
            stoicc.ops.slim_lora(compressed, Statistics.of(x)),
            stoicc.ops.naive_lora(compressed),
            compressed,
        )
    ]
    assert outputs[0] < 0.9 * outputs[1] < 0.9 * outputs[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_adapters_survive_lowering(dtype):
    compressed, weight, x = pruned(100, 200, dtype)
    scaled = stoicc.ops.scale(stoicc.ops.permute(weight, torch.randperm(100), torch.randperm(200)), torch.rand(200) + 1)
    for each in (compressed, stoicc.ops.group_absmax(stoicc.ops.nm_magnitude(scaled), 4)):
        for found in (stoicc.ops.naive_lora(each, 5), stoicc.ops.slim_lora(each, Statistics.of(x))):
            assert all(factor.dtype == dtype for factor in factors_of(found))
            assert_survives(found)
            assert_survives(stoicc.ops.quantize_adapter(found))


def test_the_default_rank_is_a_tenth():
    compressed, _, x = pruned(100, 200)
    assert factors_of(stoicc.ops.naive_lora(compressed))[0].shape == (100, 10)
    assert factors_of(stoicc.ops.slim_lora(compressed, Statistics.of(x)))[1].shape == (10, 200)
    assert "Naive-LoRA, rank 10, leaves" in str(stoicc.ops.naive_lora(compressed))


def test_a_second_adapter_makes_up_for_what_the_first_left():
    compressed, _, _ = pruned()
    twice = stoicc.ops.naive_lora(stoicc.ops.naive_lora(compressed, 6), 6)
    once = stoicc.ops.naive_lora(compressed, 12)
    torch.testing.assert_close(twice.dense(), once.dense(), rtol=1e-3, atol=1e-3)


def test_the_original_may_be_given_and_stacks_know_theirs():
    compressed, weight, _ = pruned()
    plain = CompressedWeight.of(compressed.dense())
    found = stoicc.ops.naive_lora(plain, 8, original=weight)
    assert torch.equal(found.dense(), stoicc.ops.naive_lora(compressed, 8).dense())
    stacked = stoicc.ops.naive_lora(stoicc.ops.stack(compressed, compressed), 96)
    torch.testing.assert_close(stacked.dense()[96:], weight, rtol=1e-3, atol=1e-3)


def test_dead_channels_count_a_little():
    compressed, weight, x = pruned()
    x[:, 40:] = 0
    s = channel_saliency(Statistics.of(x))
    assert s.min() > 0
    assert (s[40:] == s.min()).all()
    found = stoicc.ops.slim_lora(compressed, Statistics.of(x))
    assert found.dense().isfinite().all()
    assert (x @ (found.dense() - weight).T).norm() < 0.6 * (x @ (compressed.dense() - weight).T).norm()
    silent = stoicc.ops.slim_lora(compressed, Statistics.of(torch.zeros(3, 128)))
    torch.testing.assert_close(silent.dense(), stoicc.ops.naive_lora(compressed).dense(), rtol=1e-3, atol=1e-4)


def test_factors_keep_in_the_range_of_half_precision():
    weight = torch.randn(64, 64).half()
    weight[:, 3] *= 1000
    weight[5] *= 1e-3
    kept = torch.ones(64, 64, dtype=torch.bool)
    kept[::2] = False
    compressed = CompressedWeight.of(weight).then(Prune(kept, "rows"))
    x = torch.randn(80, 64) * torch.logspace(-8, 3, 64)
    found = stoicc.ops.slim_lora(compressed, Statistics.of(x), 32)
    assert found.dense().isfinite().all()
    assert (found.dense() - weight).norm() < 0.01 * weight.float().norm()


def test_codes_of_an_adapter_are_group_absmax_of_its_factors():
    compressed, _, _ = pruned(70, 300)
    adapter = stoicc.ops.naive_lora(compressed, 40)
    found = stoicc.ops.quantize_adapter(adapter, 3, 16)
    sheets = lower(found).low_rank_codes
    assert sheets is not None
    for factor, codes, value in zip(factors_of(adapter), sheets, factors_of(found), strict=True):
        expected = stoicc.ops.group_absmax(factor, 3, 16)
        assert torch.equal(value, expected.dense())
        assert codes.codes.max() < 8
    assert torch.equal(lower(found).values, compressed.dense())
    assert lower(stoicc.ops.stack(found, found)).low_rank_codes is None
    assert_survives(stoicc.ops.stack(found, compressed))
    assert "quantize the factors (int3 AbsMax, group 16)" in stoicc.inspect(found).lowering[-1]


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 0), (8, 16), (6, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_holds_the_codes_of_its_adapter(bits, group, dtype, tmp_path):
    compressed, _, _ = pruned(70, 300, dtype)
    adapter = stoicc.ops.naive_lora(compressed, 40)
    found = stoicc.ops.quantize_adapter(stoicc.ops.permute(adapter, rows=torch.randperm(70)), bits, group)
    assert_survives(found)
    kernel = stoicc.compile(found)
    codes = sum(-(-extent * stored_bits(bits) // 8) * rows for rows, extent in ((70, 40), (40, 300)))
    groups = sum(-(-extent // (group or extent)) * rows for rows, extent in ((70, 40), (40, 300)))
    order = 70 * 4
    assert kernel.stats().beside_bytes == codes + groups * dtype.itemsize + order
    kernel.save(tmp_path / "w.safetensors")
    again = stoicc.load(tmp_path / "w.safetensors")
    assert torch.equal(bits_of(again.to_dense()), bits_of(found.dense()))
    assert again.stats().beside_bytes == kernel.stats().beside_bytes


def test_every_executor_multiplies_by_the_codes():
    compressed, _, _ = pruned(200, 300, torch.bfloat16)
    found = stoicc.ops.quantize_adapter(stoicc.ops.naive_lora(compressed, 70))
    once = "drop-empty,build-csr,fuse-epilogue,regimes{tiles=0}"
    for kernel in (stoicc.compile(found, target="cpu"), stoicc.compile(found, target="cpu", pipeline=once)):
        for batch in (1, 2, 33):
            for x_dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(batch, 300).to(x_dtype)
                assert_product(kernel(x), x, found.dense(), TOLERANCES[torch.bfloat16])


def spectrum(rows, columns, decay):
    """A matrix with singular values 1, decay, decay^2 and so on."""
    u, v = (torch.linalg.qr(torch.randn(extent, min(rows, columns)))[0] for extent in (rows, columns))
    return (u * decay ** torch.arange(min(rows, columns))) @ v.T


@pytest.mark.parametrize("decay", [0.99, None])
def test_random_subspaces_are_as_good_as_they_say(decay):
    matrix = torch.randn(LARGE + 26, 1200) if decay is None else spectrum(1200, LARGE + 26, decay)
    found, best = truncated_svd(matrix, 20), best_left(matrix, 20) / matrix.square().sum().item()
    assert not found.exact
    true = (matrix - found.left @ found.right).square().sum() / matrix.square().sum()
    assert abs(true - found.error) < 1e-4
    assert best <= found.error * 1.0001
    assert found.error <= 1.01 * best + 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(8, 12),
        lambda: 1e-30 * torch.randn(8, 12),
        lambda: 1e30 * torch.randn(12, 8),
        lambda: spectrum(60, 50, 0.3),
    ],
)
def test_extremes_of_the_range(make):
    matrix = make()
    found = truncated_svd(matrix, 4)
    assert found.exact
    assert found.left.isfinite().all()
    assert found.right.isfinite().all()
    left = (matrix.double() - found.left.double() @ found.right.double()).square().sum().item()
    assert left <= 1.0001 * best_left(matrix, 4) + 1e-12 * matrix.double().square().sum().item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda c, x: stoicc.ops.naive_lora(c, 97),
            r"ops.naive_lora: expected a rank from 1 to 96, the smaller extent of the layer \[96, 128\], found 97",
        ),
        (lambda c, x: stoicc.ops.slim_lora(c, Statistics.of(x), 0), r"ops.slim_lora: expected a rank from 1 to 96"),
        (lambda c, x: stoicc.ops.slim_lora(c, x), r"ops.slim_lora: expected Statistics, found Tensor"),
        (
            lambda c, x: stoicc.ops.slim_lora(c, Statistics.of(x[:, 1:])),
            r"ops.slim_lora: expected statistics of the weight's 128 input channels, found 127; collect",
        ),
        (
            lambda c, x: stoicc.ops.naive_lora(torch.randn(9, 9)),
            r"ops.naive_lora: expected a weight that an operator changed, found no error to make up for; prune or",
        ),
        (
            lambda c, x: stoicc.ops.naive_lora(c, original=torch.randn(9, 9)),
            r"ops.naive_lora: expected an original of \[96, 128\], found \[9, 9\]",
        ),
        (
            lambda c, x: stoicc.ops.naive_lora(c, original=torch.full((96, 128), float("nan"))),
            r"ops.naive_lora: expected a finite original, found NaN or infinity; repair the weight",
        ),
        (
            lambda c, x: stoicc.ops.quantize_adapter(c),
            r"ops.quantize_adapter: expected a weight with low-rank factors, found none; slim_lora or naive_lora first",
        ),
        (
            lambda c, x: stoicc.ops.quantize_adapter(stoicc.ops.naive_lora(c), 9),
            r"ops.quantize_adapter: expected 2 to 8 bits and group_size >= 0, found bits=9, group_size=128",
        ),
    ],
)
def test_misuse_is_one_clear_sentence(call, message):
    compressed, _, x = pruned()
    with pytest.raises(stoicc.InputError, match=message):
        call(compressed, x)
