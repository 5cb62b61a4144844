"""The autotuner: what it searches, what it chooses, what it may spend."""

import io
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import stoicc
from stoicc.autotuner import autotune
from stoicc.ir.types import Module
from stoicc.passes import Pipeline, default_pipeline, scheduled
from stoicc.timing import Ballast, Call, Stopwatch, cache_bytes
from stoicc.tuning_arms import Arm, Rotation, fastest
from stoicc.tuning_result import TuningResult
from stoicc.tuning_space import Space, Structure, differences
from stoicc.tuning_store import TuningStore
from tests.stoicc.tuning import FakeModel, FakeStopwatch, flat, parts_of

USUAL = {step.name: step for step in default_pipeline("cpu").passes}
BINS = getattr(USUAL["balance"], "bins", 0)
SMALL = Space(tiles=(), orders=(getattr(USUAL["order"], "by", ""),), parts=(1, 2, 4), bins=(BINS,))
"""Split-K alone varies."""


@pytest.fixture
def weight():
    values = torch.randn(128, 256).bfloat16()
    values[:64, :128] = 0
    return values


@pytest.fixture
def store(tmp_path):
    return TuningStore(tmp_path / "tuning")


def tuned(weight, store, seconds, model=flat, tick=0.0, **options):
    """Autotune by formulas; the stopwatch comes along."""
    watch = FakeStopwatch(seconds, tick)
    result = autotune(weight, store=store, model=FakeModel(model), stopwatch=watch, **options)
    return result, watch


def fastest_with_four_parts(arm, batch):
    return 1e-3 * batch * (0.5 if parts_of(arm) == "4" and arm.executor == "tiles" else 1.0)


# -- what is chosen ----------------------------------------------------------------------------


def test_the_measured_fastest_wins_though_it_is_predicted_like_the_others(weight, store):
    result, _ = tuned(weight, store, fastest_with_four_parts, space=SMALL)
    assert "split-k{parts=4}" in result.pipeline
    for batch in (1, 16, 64):
        assert result.best(batch).speedup == pytest.approx(2.0)
        assert result.chosen(batch).executor == "tiles"
    assert result.kernel.schedule.max_parts == 4
    x = torch.randn(3, 256).bfloat16()
    torch.testing.assert_close(result.kernel(x), stoicc.compile(weight)(x), rtol=2e-2, atol=2e-2)


def test_a_tie_goes_to_the_default(weight, store):
    result, _ = tuned(weight, store, lambda arm, batch: 1e-3 * (0.995 if parts_of(arm) == "4" else 1.0), space=SMALL)
    default = default_pipeline("cpu").passes[:-1]
    assert result.pipeline.startswith(",".join(map(str, default)))
    assert all(result.chosen(batch).default for batch in result.batch_sizes)


def test_executors_are_composed_into_one_schedule(weight, store):
    def seconds(arm, batch):
        return 1e-3 * (batch if arm.executor == "tiles" else 20)

    def predicted(module, executor, batch):
        return seconds(Arm(Structure((64, 64), "", 1), executor), batch)

    result, _ = tuned(weight, store, seconds, predicted, space=SMALL, batch_sizes=[1, 8, 64])
    assert [result.chosen(batch).executor for batch in (1, 8, 64)] == ["tiles", "tiles", "dense-once"]
    regimes = result.kernel.schedule.regimes
    assert [regime.executor for regime in regimes] == ["tiles", "dense-once"]
    assert 8 <= regimes[0].max_batch < 64


def test_one_schedule_serves_all_batch_sizes(weight, store):
    """At batch 1 two parts are best, at 64 four are, and by far: the kernel has four."""

    def seconds(arm, batch):
        best = {("2", 1): 0.9, ("4", 1): 0.95, ("4", 64): 0.5, ("2", 64): 1.0}
        return 1e-3 * (2.0 if arm.executor == "dense-once" else best.get((parts_of(arm), batch), 1.0))

    result, _ = tuned(weight, store, seconds, space=SMALL, batch_sizes=[1, 64])
    assert "split-k{parts=2}" in result.best(1).passes
    assert "split-k{parts=4}" in result.best(64).passes
    assert "split-k{parts=4}" in result.pipeline
    assert result.chosen(1).speedup == pytest.approx(1 / 0.95)


def test_the_cost_model_prunes(weight, store):
    def predicted(module, executor, batch):
        return 1e-3 * (1 if executor == "dense-once" else 10 - module.schedule.max_parts)

    space = replace(SMALL, parts=(1, 2, 3, 4))
    result, _ = tuned(weight, store, lambda arm, batch: 1e-3, predicted, space=space, batch_sizes=[1], keep=2)
    tried = {(trial.executor, parts_of(Arm(Structure(trial.tile, trial.passes, 1), ""))) for trial in result.trials}
    assert tried == {("dense-once", parts_of(_default_arm())), ("tiles", "4"), ("tiles", parts_of(_default_arm()))}
    assert result.predicted(1).executor == "dense-once"
    assert result.ranked == 5, "one to four parts, of which one is the default's cut, and dense-once"


def _default_arm():
    return Arm(Structure((64, 64), str(default_pipeline("cpu")), 1), "tiles")


@pytest.mark.parametrize(("foretold", "tried"), [(1.2, True), (1.3, False)])
def test_every_tile_shape_that_is_foretold_to_be_near_is_tried(weight, store, foretold, tried):
    """Many schedules of one shape are foretold alike: they do not keep another out that is foretold a little worse."""

    def model(module, executor, batch):
        return 1e-3 * (foretold if module.tiles.tile == (32, 64) else 1.0) * (1 if executor == "tiles" else 2)

    def seconds(arm, batch):
        return 1e-3 * (0.5 if arm.structure.tile == (32, 64) and arm.executor == "tiles" else 1.0)

    space = Space(tiles=((64, 64), (32, 64)), orders=("row", "cost"), parts=(1, 2, 4), bins=(BINS,))
    result, _ = tuned(weight, store, seconds, model, space=space, keep=2, batch_sizes=(16,))
    assert (result.kernel.program.tile == (32, 64)) == tried


def test_schedules_that_come_out_alike_are_one(weight, store):
    """Four tile columns cannot be cut in more than four parts."""
    result, _ = tuned(weight, store, fastest_with_four_parts, space=replace(SMALL, parts=(4, 5, 60)), batch_sizes=[1])
    assert len([trial for trial in result.trials if trial.executor == "tiles"]) <= 2
    assert "parts=4" in result.pipeline


def test_a_wrong_output_cannot_win(weight, store, monkeypatch):
    import stoicc.tuning_search as search

    compile_as = search.compile_as

    def broken(kernel, pipeline):
        made = compile_as(kernel, pipeline)
        if "parts=4" in pipeline:
            made.register_forward_hook(lambda module, inputs, y: y * 1.5)
        return made

    monkeypatch.setattr(search, "compile_as", broken)
    result, _ = tuned(weight, store, fastest_with_four_parts, space=SMALL, batch_sizes=[16])
    assert "parts=4" not in result.pipeline
    problems = [trial.problem for trial in result.trials if "parts=4" in trial.passes and trial.executor == "tiles"]
    assert problems
    assert all("wrong output: expected that of the default within" in problem for problem in problems)
    assert any("wrong output" in note for note in result.notes)


def test_a_schedule_that_does_not_build_cannot_win(weight, store, monkeypatch):
    import stoicc.tuning_search as search

    compile_as = search.compile_as

    def failing(kernel, pipeline):
        if "parts=4" in pipeline:
            raise RuntimeError("out of registers")
        return compile_as(kernel, pipeline)

    monkeypatch.setattr(search, "compile_as", failing)
    result, _ = tuned(weight, store, fastest_with_four_parts, space=SMALL, batch_sizes=[16])
    assert "parts=4" not in result.pipeline
    assert any(trial.problem == "failed: out of registers" for trial in result.trials)


def test_noise_widens_a_tie():
    plain, other = (Arm(Structure((64, 64), passes, 1, changes), "tiles") for changes, passes in enumerate("ab"))
    steady, noisy = [0.985] * 9, [0.9, 0.985, 1.06] * 3
    assert fastest({plain: [1.0] * 9, other: steady}) == other
    assert fastest({plain: [1.0] * 9, other: noisy}) == plain


# -- tiles -------------------------------------------------------------------------------------


def tile_lover(arm, batch):
    return 1e-3 * (0.5 if arm.structure.tile == (32, 64) else 1.0) * (1 if arm.executor == "tiles" else 3)


@pytest.mark.parametrize("given", ["weight", "inspected", "kernel"])
def test_tile_shapes_are_searched_where_nothing_is_guessed(weight, store, given):
    subject = {"weight": weight, "inspected": stoicc.inspect(weight), "kernel": stoicc.compile(weight)}[given]
    result, _ = tuned(subject, store, tile_lover, space=replace(SMALL, tiles=((32, 64), (64, 32))), batch_sizes=[4])
    assert result.tile == (32, 64)
    assert result.notes == ()
    assert torch.equal(result.kernel.to_dense(), weight)
    again = TuningResult.from_text(result.text).replay(subject)
    assert again.ir == result.kernel.ir


def test_codes_keep_their_tile_and_a_note_says_so(weight, store):
    kernel = stoicc.compile(stoicc.ops.group_absmax(weight, 4, 64))
    result, _ = tuned(kernel, store, tile_lover, space=replace(SMALL, tiles=((32, 64),)), batch_sizes=[4])
    assert result.tile == (64, 64)
    assert "tile 64x64 stays: the codes of int4 keep the tiles they have" in result.notes[0]


def test_an_operators_result_without_a_tile_is_cut_anew(weight, store):
    compressed = stoicc.ops.group_absmax(weight, 4, 64)
    result, _ = tuned(compressed, store, tile_lover, space=replace(SMALL, tiles=((32, 64),)), batch_sizes=[4])
    assert result.tile == (32, 64)
    assert {segment.format for segment in result.kernel.program.segments} == {"empty", "int4"}


def test_an_operator_that_chose_tiles_keeps_them(weight, store):
    compressed = stoicc.ops.group_absmax(weight, 4, 64, where=torch.ones(2, 4, dtype=torch.bool))
    result, _ = tuned(compressed, store, tile_lover, space=replace(SMALL, tiles=((32, 64),)), batch_sizes=[4])
    assert result.tile == (64, 64)
    assert "operators chose what to do tile by tile" in result.notes[0]


# -- threads, launch ---------------------------------------------------------------------------


def test_threads_are_set_for_a_call_and_put_back():
    before = torch.get_num_threads()
    seen = []
    calls = {
        name: Call(lambda: seen.append(torch.get_num_threads()), threads) for name, threads in {"a": 1, "b": 3}.items()
    }
    times = Stopwatch().samples(calls, 2)
    assert sorted(seen) == [1, 1, 3, 3]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}
    assert torch.get_num_threads() == before


def test_threads_are_searched(weight, store):
    count = torch.get_num_threads()

    def seconds(arm, batch):
        return 1e-3 * (0.4 if arm.structure.threads == count + 1 else 1.0)

    result, _ = tuned(weight, store, seconds, space=replace(SMALL, threads=(count + 1,)), batch_sizes=[1])
    assert result.threads == count + 1
    assert torch.get_num_threads() == count


def test_launch_parameters_are_pipeline_text():
    space = Space(tiles=(), parts=("auto",), num_warps=(None, 4, 8))
    structures = space.structures(default_pipeline("triton"), [(64, 64)], 1)
    assert [s for s in structures if s.changes == 0] == [structures[0]]
    texts = {structure.passes.rpartition("fuse-epilogue")[2] for structure in structures}
    assert texts == {"", ",launch{block_n=none,num_warps=4}", ",launch{block_n=none,num_warps=8}"}
    module = Pipeline.parse(structures[-1].passes).run(Module(stoicc.inspect(torch.randn(64, 64)).program))
    assert scheduled(module).launch


# -- the budget --------------------------------------------------------------------------------


@pytest.mark.parametrize("call_s", [1e-4, 5e-3, 0.1])
@pytest.mark.parametrize("budget_s", [2.0, 20.0])
def test_the_budget_holds(weight, store, call_s, budget_s):
    result, watch = tuned(weight, store, lambda arm, batch: call_s, tick=1e-3, budget_s=budget_s)
    assert result.seconds <= watch.clock <= 1.2 * budget_s


def test_a_large_budget_is_not_used_up_where_rounds_suffice(weight, store):
    result, _ = tuned(weight, store, lambda arm, batch: 1e-4, budget_s=1000)
    assert result.seconds < 1


def test_what_the_model_measures_first_is_beyond_the_budget(weight, store):
    watch = FakeStopwatch(lambda arm, batch: 1e-4)
    met = set()

    def slow_once(module, executor, batch):
        if module.tiles.tile not in met:
            met.add(module.tiles.tile)
            watch.clock += 5.0
        return flat(module, executor, batch)

    space = replace(SMALL, tiles=((32, 64), (64, 32)))
    result = autotune(weight, [1], space, 4.0, store=store, model=FakeModel(slow_once), stopwatch=watch)
    assert watch.clock >= 15
    assert result.seconds < 1
    assert result.notes == ()


def test_slow_ranking_stops_and_says_so(weight, store):
    space = Space(tiles=(), parts=tuple(range(1, 41)))
    model = FakeModel(flat)
    watch = FakeStopwatch(lambda arm, batch: 1e-4, tick=0.1)
    result = autotune(weight, [1], space, 2.0, store=store, model=model, stopwatch=watch)
    assert any("were not ranked: out of time" in note for note in result.notes)
    assert result.chosen(1).default


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_is_shown_on_a_terminal_alone(weight, store, monkeypatch, stderr, progress, shown):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stderr())
    tuned(weight, store, lambda arm, batch: 1e-4, space=SMALL, batch_sizes=[1], progress=progress)
    assert isinstance(sys.stderr, io.StringIO)
    assert ("batch 1" in sys.stderr.getvalue()) == shown


# -- remembering -------------------------------------------------------------------------------


def test_a_second_run_measures_nothing(weight, store):
    first, watch = tuned(weight, store, fastest_with_four_parts, space=SMALL)
    assert watch.timed > 0
    again, watch = tuned(weight, store, fastest_with_four_parts, space=SMALL)
    assert watch.timed == 0
    assert again.remembered
    assert again == first
    assert again.kernel.ir == first.kernel.ir


@pytest.mark.parametrize(
    "change",
    [
        {"space": replace(SMALL, parts=(1, 2))},
        {"batch_sizes": [1, 16, 65]},
        {"x_dtype": torch.float32},
        {"bias": torch.ones(128)},
        {"budget_s": 30.0},
        {"fresh": True},
    ],
)
def test_another_question_is_measured(weight, store, change):
    tuned(weight, store, fastest_with_four_parts, space=SMALL)
    _, watch = tuned(weight, store, fastest_with_four_parts, **{"space": SMALL, **change})
    assert watch.timed > 0


def test_batch_sizes_of_one_bucket_share_what_was_tuned(weight, store):
    tuned(weight, store, fastest_with_four_parts, space=SMALL, batch_sizes=[1, 16])
    _, watch = tuned(weight, store, fastest_with_four_parts, space=SMALL, batch_sizes=[1, 12])
    assert watch.timed == 0


def test_a_store_that_cannot_be_written_costs_the_memory_alone(weight, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="tuning store .*expected a folder that can be written"):
        result, _ = tuned(weight, TuningStore(tmp_path / "file"), fastest_with_four_parts, space=SMALL)
    assert "parts=4" in result.pipeline


# -- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": []}, r"autotune: expected batch_sizes from 1, found \[\]; for example"),
        ({"batch_sizes": [0, 1]}, r"autotune: expected batch_sizes from 1, found \[0, 1\]"),
        ({"batch_sizes": 16}, r"autotune: expected batch_sizes from 1, found 16"),
        ({"budget_s": 0}, r"autotune: expected budget_s to be seconds above 0, found 0"),
        ({"keep": 0}, r"autotune: expected keep from 1, found 0"),
        ({"space": "wide"}, r"autotune: expected a stoicc.Space, found str"),
        ({"target": "reference"}, r"autotune: expected a backend that emits code, found reference"),
    ],
)
def test_wrong_options_are_one_clear_sentence(weight, store, options, message):
    with pytest.raises(stoicc.InputError, match=message):
        autotune(weight, store=store, **options)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"parts": ()}, r"space, parts: expected a tuple of choices, found \(\)"),
        ({"bins": 256}, r"space, bins: expected a tuple of choices, found 256"),
        ({"parts": (0,)}, r"space: expected choices that passes take, found one that pass split-k, option parts"),
        ({"orders": ("size",)}, r"space: expected choices that passes take, found one that pass order"),
        ({"num_warps": (3,)}, r"found one that pass launch, option num_warps"),
        ({"executors": ("gpu",)}, r"space, executors: expected some of tiles, dense-once, found 'gpu'"),
        ({"reorder": (2,)}, r"space, reorder: expected some of False, True, found 2; name one"),
        ({"threads": (0,)}, r"space, threads: expected whole numbers from 1, found 0"),
        ({"tiles": ((64, 60),)}, r"tile: expected two of"),
    ],
)
def test_a_wrong_space_is_one_clear_sentence(axes, message):
    with pytest.raises(stoicc.InputError, match=message):
        Space(**axes)


def test_a_space_too_large_to_enumerate_is_refused():
    space = Space(tiles=(), parts=tuple(range(1, 1000)), bins=tuple(range(1, 1000)))
    with pytest.raises(stoicc.InputError, match=r"space: expected at most 100,000 schedules, found"):
        space.structures(default_pipeline("cpu"), [(64, 64)], 1)


def test_differences_name_what_changed():
    passes = str(default_pipeline("cpu"))
    assert differences(passes, passes) == ""
    assert differences(passes.replace(f"bins={BINS}", "bins=3"), passes) == "balance{bins=3}"


# -- the stopwatch -----------------------------------------------------------------------------


def test_the_cache_is_displaced_between_rounds():
    seen: list[str] = []
    watch = Stopwatch(between=lambda: seen.append("between"))
    watch.samples({name: Call(partial(seen.append, name)) for name in "ab"}, 3)
    assert seen == ["between", "a", "a", "b", "between", "b", "b", "a", "between", "a", "a", "b"]


def test_ballast_is_read_in_parts():
    assert cache_bytes(torch.device("cpu")) >= 1 << 15
    ballast = Ballast(torch.device("cpu"), 1 << 16, 4)
    assert [ballast().item() for _ in range(5)] == [1 << 11] * 5
    assert len({part.data_ptr() for part in [next(ballast._parts) for _ in range(8)]}) == 4


def test_copies_are_called_in_turn(weight):
    kernel = stoicc.compile(weight)
    rotation = Rotation(kernel, 3)
    ran: list[int] = []
    for number, each in enumerate(rotation.kernels):
        each.register_forward_hook(lambda module, inputs, y, number=number: ran.append(number))
    x = torch.randn(2, 256).bfloat16()
    assert all(torch.equal(rotation.run(x), kernel(x)) for _ in range(4))
    assert [number for number in ran if number] == [1, 2]
    assert len({next(iter(each.pools.values())).data_ptr() for each in rotation.kernels}) == 3
    assert Rotation(kernel).kernels == [kernel]


def test_small_weights_are_timed_cold_where_that_is_affordable(weight, store, monkeypatch):
    displaced: list[int] = []
    monkeypatch.setattr("stoicc.autotuner.cache_bytes", lambda device: 1 << 20)
    read = Ballast.__call__

    def counted(self):
        displaced.append(1)
        return read(self)

    monkeypatch.setattr(Ballast, "__call__", counted)
    options = {"space": SMALL, "store": store, "model": FakeModel(flat), "batch_sizes": [2], "budget_s": 3.0}
    result = autotune(weight, **options)
    assert len(displaced) > 10
    assert result.notes == ()
    displaced.clear()
    autotune(weight, cold=False, fresh=True, **options)
    assert displaced == []
    monkeypatch.setattr("stoicc.autotuner.memory_bytes", lambda device: 1 << 20)
    result = autotune(weight, fresh=True, **options)
    assert displaced == []
    assert any("weights were warm: too little memory" in note for note in result.notes)
