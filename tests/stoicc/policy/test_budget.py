"""A budget is kept, spends its bytes better than one format does, and says what is wrong with it."""

import copy
import io
from dataclasses import replace

import pytest
import torch

import stoicc
from stoicc import Budget
from stoicc.ops import Statistics
from stoicc.ops._output import output_error
from stoicc.ops.lowering import lower
from stoicc.policy.choose import Task, choose
from stoicc.policy.seconds import Clock


@pytest.fixture
def layer(rng):
    """A weight `[192, 320]` whose rows and inputs differ in size, and statistics of correlated inputs."""
    x = torch.randn(1500, 320) @ torch.randn(320, 320) * torch.randn(320).exp()
    weight = (torch.randn(192, 320) * torch.randn(192, 1).exp()).bfloat16()
    return weight, Statistics.of(x)


def compiled(weight, statistics, policy, **options):
    return stoicc.compile(weight, policy=policy, statistics=statistics, target="reference", **options)


@pytest.mark.parametrize("kind", ["gram", "diagonal", "none"])
@pytest.mark.parametrize("bits", [3.25, 5.0])
def test_bytes_are_kept_and_spent(layer, kind, bits):
    weight, gram = layer
    statistics = {"gram": gram, "diagonal": replace(gram, gram=None), "none": None}[kind]
    kernel = compiled(weight, statistics, Budget(bytes_per_weight=bits / 8))
    assert bits / 8 - 0.035 < kernel.stats().bytes_per_weight <= bits / 8 + 1e-9
    assert kernel.choice.bytes_per_weight == pytest.approx(kernel.stats().bytes_per_weight)
    found = output_error(weight, kernel.to_dense(), statistics)
    assert kernel.choice.predicted_error == pytest.approx(found, rel=0.25)
    assert len(kernel.program.segments) > 1 or (kind, bits) == ("none", 3.25)  # there int3 alone does about as well


def test_a_mosaic_is_better_than_one_format_at_its_bytes(layer):
    weight, statistics = layer
    one = stoicc.compile(stoicc.ops.mosaic(weight, statistics, [["int4"] * 5] * 3), target="reference")
    mosaic = compiled(weight, statistics, Budget(bytes_per_weight=one.stats().bytes_per_weight))
    errors = [output_error(weight, kernel.to_dense(), statistics) for kernel in (mosaic, one)]
    assert errors[0] < 0.8 * errors[1]


def test_the_same_formats_are_chosen_on_any_number_of_threads(layer):
    weight, statistics = layer
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            tasks = [Task.of(weight, statistics, policy, None) for policy in (Budget(0.5), Budget(error=0.05))]
            found.append([choose(task)[0] for task in tasks])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*found, strict=True):
        assert (one.table.errors == other.table.errors).all()
        assert (one.choice == other.choice).all()
        assert one.energy == other.energy or one.energy != one.energy  # NaN where nobody asked


def test_the_last_bits_of_a_factorisation_do_not_show(layer, monkeypatch):
    """What another order of its sums would give, on machines whose order does not depend on threads as well."""
    weight, statistics = layer
    task = Task.of(weight, statistics, Budget(0.5), None)
    table = task.table()[0]
    exact, noise = torch.linalg.cholesky_ex, 1 + 5e-10 * torch.randn(320, dtype=torch.float64)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: (exact(matrix)[0] * noise, exact(matrix)[1]))
    monkeypatch.setattr("stoicc.policy.choose.squared_output", lambda *_: 2 + 1e-15)
    energy = task.energy()
    other = task.table()[0]
    assert (table.errors == other.errors).all()
    assert energy == 2


def test_what_was_pruned_is_paid_by_what_is_left(layer):
    weight, statistics = layer
    pruned = stoicc.ops.wanda(weight, statistics, 0.6)
    formats = ["dense", "int4", "bitmap", "masked<mask=bitmap, values=int4<group_size=64>>"]
    kernel = compiled(pruned, statistics, Budget(bytes_per_weight=0.42, formats=formats, sort_inputs=False))
    names = {stats.format.partition("<")[0] for stats in kernel.stats().formats}
    assert "masked" in names <= {"masked", "bitmap"}  # int4 loses as much at 0.53 bytes
    assert kernel.stats().bytes_per_weight <= 0.42
    assert not kernel.to_dense()[lower(pruned).values == 0].any()
    plain = stoicc.compile(stoicc.ops.optq(pruned, statistics, group_size=64), formats=["int4"], target="reference")
    found, uniform = (output_error(weight, each.to_dense(), statistics) for each in (kernel, plain))
    assert 0.5 * uniform < found < 1.05 * uniform
    kept = compiled(pruned, statistics, Budget(bytes_per_weight=1.2, formats=formats, sort_inputs=False))
    assert {stats.format.partition("<")[0] for stats in kept.stats().formats} == {"bitmap"}
    assert torch.equal(kept.to_dense(), lower(pruned).values)


def test_a_mask_drops_before_it_is_paid(layer):
    weight, statistics = layer
    formats = ["masked<mask=nm<n=2, m=8>, values=int4<group_size=64>>", "int4"]
    for options in ({}, {"compensate": False}):
        policy = Budget(bytes_per_weight=0.4, formats=formats, sort_inputs=False, **options)
        kernel = compiled(weight, statistics, policy)
        assert 0.3 < kernel.stats().bytes_per_weight <= 0.4 + 1e-9
        assert kernel.choice.bytes_per_weight == pytest.approx(kernel.stats().bytes_per_weight, rel=0.1)


@pytest.mark.parametrize("compensate", [True, False])
def test_an_error_is_kept_with_the_fewest_bytes(layer, compensate):
    weight, statistics = layer
    kernels = [compiled(weight, statistics, Budget(error=error, compensate=compensate)) for error in (0.1, 0.02)]
    found = [output_error(weight, kernel.to_dense(), statistics) for kernel in kernels]
    assert 0.06 < found[0] <= 0.1
    assert 0.012 < found[1] <= 0.02
    assert kernels[0].stats().bytes_per_weight < kernels[1].stats().bytes_per_weight


def test_a_time_is_kept_as_the_cost_model_predicts_it(layer, monkeypatch):
    monkeypatch.setenv("STOICC_CALIBRATION", "off")
    weight, statistics = layer
    clock = Clock.of("cpu", 4)
    dense, empty = (
        clock.seconds(stoicc.compile(each, formats=[fmt], target="reference").program)
        for each, fmt in ((weight, "dense"), (torch.zeros_like(weight), "empty"))
    )
    bound = (0.6 * dense + 0.4 * empty) * 1e6
    kernel = compiled(weight, statistics, Budget(time_us=bound, batch=4, sort_inputs=False))
    assert 0.9 * bound < clock.seconds(kernel.program) * 1e6 <= bound
    assert kernel.choice.batch == 4
    with pytest.raises(stoicc.InputError, match=r"Budget: expected at least .* us at batch 4, .* raise it"):
        compiled(weight, statistics, Budget(time_us=empty * 0.5e6, batch=4))


def test_inputs_are_sorted_where_that_pays(layer):
    weight, statistics = layer
    kernel = compiled(weight, statistics, Budget(bytes_per_weight=0.55))
    assert kernel.program.beside.column_permutation is not None  # energies differ by orders of magnitude
    energy = statistics.square[kernel.choice.columns]
    assert (energy.diff() <= 0).all()
    even = Statistics.of(torch.randn(1500, 320))
    assert compiled(weight, even, Budget(bytes_per_weight=0.55)).program.beside.column_permutation is None
    asked = compiled(weight, even, Budget(bytes_per_weight=0.55, sort_inputs=True))
    assert asked.program.beside.column_permutation is not None
    x = torch.randn(7, 320, dtype=torch.float64)
    torch.testing.assert_close(asked(x), x @ asked.to_dense().double().T)


def test_errors_of_a_sweep_are_foretold(layer):
    weight, statistics = layer
    task = Task.of(
        weight,
        statistics,
        Budget(bytes_per_weight=0.5, formats=["int3", "int4", "int8", "mxfp4", "fp8<group_size=64>"]),
        None,
    )
    table, order = task.table()
    for index, fmt in enumerate(table.formats):
        ordered = stoicc.ops.permute(weight, columns=order.columns)
        swept = stoicc.ops.mosaic(ordered, statistics, [[fmt] * 5] * 3).dense()
        squared = (output_error(weight, swept, statistics) ** 2) * task.energy()
        assert table.errors[:, index].sum() == pytest.approx(squared, rel=0.4)


def test_without_a_sweep_errors_are_those_of_real_encoding(layer):
    weight, _ = layer
    task = Task.of(weight, None, Budget(bytes_per_weight=0.5, formats=["int4", "mxfp4", "nv24"]), None)
    table, _ = task.table()
    for index, fmt in enumerate(table.formats):
        encoded = stoicc.compile(weight, tile_map=[[fmt] * 5] * 3, approximate=True, target="reference").to_dense()
        lost = (encoded.double() - weight.double()).square()
        tiles = lost.view(3, 64, 5, 64).sum((1, 3)).flatten()
        assert table.errors[:, index] == pytest.approx(tiles.numpy(), rel=1e-4)


def test_rows_can_count_differently(layer):
    weight, statistics = layer
    task = Task.of(weight, statistics, Budget(bytes_per_weight=0.5, sort_inputs=False), None)
    rows = torch.ones(192)
    rows[64:128] = 5
    plain, weighed = task.table()[0], replace(task, rows=rows).table()[0]
    factors = [1.0] * 5 + [5.0] * 5 + [1.0] * 5
    assert weighed.errors == pytest.approx(plain.errors * torch.tensor(factors).numpy()[:, None])


def test_the_choice_is_kept_by_copies(layer):
    weight, statistics = layer
    kernel = compiled(weight, statistics, Budget(bytes_per_weight=0.5))
    assert copy.deepcopy(kernel).choice is kernel.choice
    buffer = io.BytesIO()
    torch.save(kernel, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert (loaded.choice.choice == kernel.choice.choice).all()


def test_the_weight_is_left_alone_and_an_operators_result_will_do(layer):
    weight, statistics = layer
    before = weight.clone()
    pruned = stoicc.ops.magnitude(weight, 0.2)
    kernel = compiled(pruned, statistics, Budget(bytes_per_weight=0.5))
    assert torch.equal(weight, before)
    assert not kernel.to_dense()[lower(pruned).values == 0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of bytes_per_weight, time_us and error, found none"),
        ({"bytes_per_weight": 1, "error": 0.1}, "found bytes_per_weight and error; bound one"),
        ({"error": -1}, "expected error as a number >= 0, found -1"),
        ({"time_us": float("nan")}, "expected time_us as a number >= 0, found nan"),
        ({"time_us": 5, "batch": 0}, "expected a batch from 1, found 0"),
        ({"error": 0.1, "formats": []}, "expected at least one format, found none"),
    ],
)
def test_a_budget_that_is_none_is_refused(options, message):
    with pytest.raises(stoicc.InputError, match=message):
        Budget(**options)


def test_what_cannot_be_kept_is_refused(layer):
    weight, statistics = layer
    with pytest.raises(
        stoicc.InputError, match=r"expected at least 0\.40\d+ bytes per weight, .* found 0\.2; raise it"
    ):
        compiled(weight, statistics, Budget(bytes_per_weight=0.2, formats=["int3", "int4"]))
    with pytest.raises(
        stoicc.InputError, match=r"expected an error of at least .* found 1e-06; raise it, or add 'dense'"
    ):
        compiled(weight, statistics, Budget(error=1e-6, formats=["int3", "int4"]))
    with pytest.raises(
        stoicc.InputError, match="expected statistics with a gram matrix to compensate with, found none"
    ):
        compiled(weight, None, Budget(bytes_per_weight=0.5, compensate=True))
    with pytest.raises(stoicc.InputError, match="formats whose tiles stand alone, found int4<group_size=0>"):
        compiled(weight, None, Budget(bytes_per_weight=0.5, formats=["int4<group_size=0>"]))
    with pytest.raises(stoicc.InputError, match="found nvfp4, which shares planes between tiles; leave it out"):
        compiled(weight, None, Budget(bytes_per_weight=0.5, formats=["nvfp4"]))
    with pytest.raises(stoicc.InputError, match=r"found outlier.* on tiles of 64 x 64; leave it out"):
        compiled(weight, statistics, Budget(bytes_per_weight=0.6, formats=["outlier", "dense"]))


def test_what_else_says_how_tiles_are_made_is_refused(layer):
    weight, statistics = layer
    policy = Budget(bytes_per_weight=0.5)
    with pytest.raises(stoicc.InputError, match=r"expected no formats with a policy, .* name formats in the Budget"):
        compiled(weight, statistics, policy, formats=["int4"])
    with pytest.raises(stoicc.InputError, match=r"expected no reorder-rows.* with a policy"):
        compiled(weight, statistics, policy, pipeline="reorder-rows,drop-empty,build-csr")
    with pytest.raises(stoicc.InputError, match="expected a policy with statistics, found none"):
        stoicc.compile(weight, statistics=statistics)
    with pytest.raises(stoicc.InputError, match="policy: expected a Budget, found float"):
        compiled(weight, None, 0.5)
    with pytest.raises(stoicc.InputError, match="expected no policy with a weight that is inspected already"):
        stoicc.compile(stoicc.inspect(weight), policy=policy)
    with pytest.raises(stoicc.InputError, match="Budget: expected a weight that is not quantized yet"):
        compiled(stoicc.ops.group_absmax(weight), statistics, policy)
