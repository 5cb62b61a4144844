"""Weights that stand apart, and groups that are dropped: what is chosen, what is stored, what users are told."""

import pytest
import torch

import stoicc
from stoicc.formats.bitmap import Bitmap
from stoicc.formats.int3 import Int3
from stoicc.formats.int4 import Int4
from stoicc.formats.outlier import Outlier, _slopes
from stoicc.ir.dtypes import bits
from tests.codegen.cpu.mosaics import need
from tests.products import assert_product

EACH = torch.arange(2)


def heavy(rows: int = 64, columns: int = 128, count: int = 30) -> torch.Tensor:
    """Two tiles with some weights that are ten times the others."""
    generator = torch.Generator().manual_seed(0)
    tiles = torch.randn(2, rows, columns, generator=generator).clamp(-2, 2)
    for tile in tiles:
        place = torch.randperm(rows * columns, generator=generator)[:count]
        tile.view(-1)[place] = 20 * tile.view(-1)[place].sign()
    return tiles


@pytest.mark.parametrize("values", [Int4(), Int3(16, True)], ids=str)
def test_the_heavy_weights_are_kept_apart(values):
    tiles = heavy()
    planes, error = Outlier(values, 0.01).approximate(tiles, EACH)
    apart = planes["outliers"].abs() == 20
    assert planes["counts"].sum(1).le(81).all()
    assert apart.sum() >= 2 * 30 * 0.9  # several in one segment of one group may stay
    assert (error < 0.5 * values.approximate(tiles, EACH).error).all()


def test_worth_of_weights_by_hand():
    slopes = _slopes([torch.tensor([10.0, 10.0]), torch.tensor([9.0, 4.0]), torch.tensor([2.0, 3.0])])
    assert slopes.tolist() == [[4.0, 4.0], [6.0, 1.0]]


def test_more_apart_is_never_worse_and_none_beyond_the_share():
    tiles, last = heavy(), torch.inf
    for share in (0.001, 0.003, 0.01, 0.03):
        planes, error = Outlier(share=share).approximate(tiles, EACH)
        assert planes["counts"].flatten(1).sum(1).le(int(64 * 128 * share)).all()
        assert error.sum() < last
        last = float(error.sum())


def test_statistics_say_which_columns_matter():
    tiles, weight = heavy(), torch.ones(2, 128)
    weight[:, :64] = 0
    planes = Outlier(share=0.002).approximate(tiles, EACH, weight).planes
    assert (planes["columns"] >= 64).all()


def test_exact_where_few_weights_of_a_row_are_no_codes():
    whole = torch.randint(-7, 8, (2, 64, 64), generator=torch.Generator().manual_seed(1)).float()
    whole[:, :, 0] = 7
    odd = whole.clone()
    odd[0, 5, 3] = odd[1, 9, 40] = 123.456
    odd[0, 5, 50] = -99.5
    assert Int4().reject(odd).all()
    fmt = Outlier()
    planes = fmt.encode(odd)
    assert planes["counts"][0].nonzero().flatten().tolist() == [5]
    assert torch.equal(bits(fmt.decode(planes, (64, 64), "f32")), bits(odd))
    odd[1, 9, 32:44] += 0.123  # more than a segment may have
    assert fmt.reject(odd).tolist() == [False, True]
    with pytest.raises(stoicc.FormatError, match=r"tile \(0, 1\): expected every weight to be a 4-bit code times its"):
        stoicc.inspect(torch.cat(list(odd), 1), tile_map=[["outlier"] * 2])


def test_a_kernel_holds_its_weight_once(tmp_path):
    weight = torch.cat(list(heavy()), 1)
    kernel = stoicc.compile(weight, tile_map=[["outlier"] * 4], approximate=True, target="cpu")
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(2))
    y = kernel(x)
    held = kernel.to_dense()
    assert_product(y, x, held)
    assert kernel.stats().resident_bytes < 1.01 * kernel.stats().payload_bytes
    kernel.save(tmp_path / "w.safetensors")
    loaded = stoicc.load(tmp_path / "w.safetensors")
    assert torch.equal(bits(loaded.to_dense()), bits(held))
    assert torch.equal(loaded(x), y)


@pytest.mark.parametrize("isa", ["avx512bf16", "vnni", "avx2", "portable"])
def test_a_row_most_of_which_stands_apart(isa, monkeypatch):
    need(isa, monkeypatch)
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(6)) * 0.1
    weight[3, :250] += 100  # more than a signed byte counts
    tiled = stoicc.inspect(weight, tile=(16, 256), tile_map=[["outlier<share=0.125>"]], approximate=True)
    kernel = stoicc.compile(tiled, target="cpu")
    for batch in (1, 5):
        x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(batch))
        assert_product(kernel(x), x, kernel.to_dense(), 1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Outlier(share=0.5),
            r"outlier: expected a share of the weights from above 0 to 0.125, found 0.5",
        ),
        (
            lambda: Outlier(Bitmap()).planes((64, 64), "f32"),
            r"outlier: expected values with planes of fixed size",
        ),
    ],
)
def test_sentences(call, message):
    with pytest.raises(stoicc.FormatError, match=message):
        call()
