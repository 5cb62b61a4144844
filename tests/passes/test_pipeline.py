"""Pipelines: text both ways, order, verification between passes, instruments, a user's own passes."""

import io
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from hypothesis import given

from stoicc.ir import ParseError, PassError, VerifyError, parse, print_module
from stoicc.ir.types import Module
from stoicc.passes import (
    Pass,
    Pipeline,
    PrintIR,
    Timing,
    default_pipeline,
    find_pass,
    pass_names,
    register_pass,
    run_text,
)
from stoicc.passes.base import scheduled
from stoicc.passes.catalogue import CATALOGUE, unregister_pass
from stoicc.passes.pipeline import DEFAULTS
from tests.ir.modules import make_program, pipelines

MODULE = Module(make_program())


@pytest.fixture
def registered():
    """Registers passes for the length of a test."""
    names: list[str] = []

    def add(cls: type[Pass]) -> type[Pass]:
        names.append(cls.name)
        return register_pass(cls)

    yield add
    for name in names:
        unregister_pass(name)


# -- text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "order{by=cost},build-csr,split-k{parts=4}", *DEFAULTS.values()])
def test_text_goes_both_ways(text):
    assert str(Pipeline.parse(text)) == text


@given(pipelines())
def test_pipelines_read_back(pipeline):
    assert Pipeline.parse(str(pipeline)) == pipeline


def test_layout_of_the_text_does_not_matter():
    spaced = Pipeline.parse(" order { by = cost } , build-csr, split-k{ parts=auto , min_items=7 }\n")
    assert str(spaced) == "order{by=cost},build-csr,split-k{parts=auto,min_items=7}"


def test_defaults_are_filled_in():
    assert str(Pipeline.parse("order,build-csr,split-k,balance{},regimes")) == (
        "order{by=cost},build-csr,split-k{parts=1},balance{bins=256},regimes{tiles=auto}"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("buid-csr", "pass 'buid-csr': expected a known pass, found an unknown name; did you mean build-csr?"),
        (
            "zzz",
            "pass 'zzz': expected a known pass, found an unknown name; known passes are reorder-rows, drop-empty",
        ),
        ("order{by=cost", r"pass 'order\{by=cost': expected name or name\{option=value,...\}, found neither"),
        ("order,,build-csr", "pass '': expected name or name"),
    ],
)
def test_wrong_text_is_named(text, message):
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)


@pytest.mark.parametrize("target", ["cpu", "triton", "reference"])
def test_default_pipelines_run(target):
    module = default_pipeline(target).run(MODULE)
    assert ",".join(scheduled(module).applied) == str(default_pipeline(target))


def test_unknown_target_is_named():
    with pytest.raises(PassError, match="default_pipeline: expected one of cpu, triton, reference, found 'tpu'"):
        default_pipeline("tpu")


# -- order ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split-k{parts=2},build-csr", "expected build-csr before split-k, found it after; move build-csr in front"),
        ("build-csr,balance,split-k{parts=2}", "expected split-k before balance, found it after"),
        (
            "build-csr,balance,order",
            "expected order before balance, found it after; .* sort the passes with Pipeline.ord",
        ),
    ],
)
def test_wrong_order_is_refused(text, message):
    with pytest.raises(PassError, match=message):
        Pipeline.parse(text)


def test_missing_requirement_is_refused_when_it_runs():
    pipeline = Pipeline.parse("order,split-k{parts=4}")
    with pytest.raises(
        PassError, match=r"expected build-csr before split-k, found that it has not run; put build-csr in"
    ):
        pipeline.run(MODULE)


def test_an_earlier_run_counts():
    once = Pipeline.parse("build-csr").run(MODULE)
    twice = Pipeline.parse("split-k{parts=4}").run(once)
    assert scheduled(twice).applied == ("build-csr", "split-k{parts=4}")
    assert scheduled(twice).items == scheduled(Pipeline.parse("build-csr,split-k{parts=4}").run(MODULE)).items


def test_passes_are_sorted_by_their_dependencies():
    shuffled = ["regimes", "balance{bins=9}", "split-k{parts=2}", "order", "build-csr", "drop-empty", "fuse-epilogue"]
    assert str(Pipeline.ordered(shuffled)) == (
        "drop-empty,order{by=cost},build-csr,split-k{parts=2},balance{bins=9},fuse-epilogue,regimes{tiles=auto}"
    )
    assert Pipeline.ordered(["split-k", find_pass("build-csr")()]) == Pipeline.parse("build-csr,split-k")


# -- verification --------------------------------------------------------------------------


def test_a_broken_input_is_refused():
    with pytest.raises(VerifyError, match="rule dtype"):
        Pipeline(()).run(Module(replace(MODULE.tiles, dtype="f64")))


@dataclass(frozen=True)
class Spoil(Pass):
    """Breaks the schedule, or the tiles."""

    name: ClassVar[str] = "test-spoil"
    tiles: bool = False

    def apply(self, module: Module) -> Module:
        if self.tiles:
            return replace(module, tiles=replace(module.tiles, dtype="f64"))
        return replace(module, schedule=replace(scheduled(module), row_order=()))


@pytest.mark.parametrize(("option", "rule"), [("false", "row-order"), ("true", "dtype")])
def test_a_pass_that_breaks_the_module_is_named(registered, option, rule):
    registered(Spoil)
    pipeline = Pipeline.parse(f"drop-empty,test-spoil{{tiles={option}}},build-csr")
    with pytest.raises(VerifyError, match=rf"after pass test-spoil\{{tiles={option}\}}: .* \(rule {rule}\)"):
        pipeline.run(MODULE)


# -- instruments ---------------------------------------------------------------------------


def test_instruments_see_every_pass_and_leave_the_result_alone():
    stream, timing = io.StringIO(), Timing()
    pipeline = Pipeline.parse("drop-empty,order,build-csr", [PrintIR(stream, exact=True), timing])
    assert pipeline.run(MODULE) == Pipeline.parse("drop-empty,order,build-csr").run(MODULE)
    assert pipeline == Pipeline.parse("drop-empty,order,build-csr")
    assert [step for step, _ in timing.seconds] == ["drop-empty", "order{by=cost}", "build-csr"]
    assert all(seconds > 0 for _, seconds in timing.seconds)
    assert str(timing).splitlines()[1].endswith("ms  order{by=cost}")
    printed = stream.getvalue().split("// after ")
    assert [text.splitlines()[0] for text in printed[1:]] == ["drop-empty", "order{by=cost}", "build-csr"]
    assert parse("// after " + printed[-1]) == pipeline.run(MODULE)


# -- a user's own passes -------------------------------------------------------------------


@dataclass(frozen=True)
class Reverse(Pass):
    """Tile rows from the last to the first."""

    name: ClassVar[str] = "test-reverse"
    requires: ClassVar[tuple[str, ...]] = ("build-csr",)
    after: ClassVar[tuple[str, ...]] = ("order",)
    twice: bool = False

    def apply(self, module: Module) -> Module:
        rows = scheduled(module).row_order
        return replace(module, schedule=scheduled(module).order(rows if self.twice else rows[::-1]))


def test_a_users_pass_joins_the_others(registered):
    registered(Reverse)
    registered(Reverse)  # a notebook cell that runs again
    assert pass_names()[-1] == "test-reverse"
    pipeline = Pipeline.ordered(["test-reverse", "build-csr", "order{by=row}"])
    assert str(pipeline) == "order{by=row},build-csr,test-reverse{twice=false}"
    assert scheduled(pipeline.run(MODULE)).row_order == (3, 2, 1, 0)
    assert scheduled(Pipeline.parse("build-csr,test-reverse{twice=true}").run(MODULE)).row_order == (0, 1, 2, 3)
    with pytest.raises(PassError, match="option twice: expected bool, found 'yes'"):
        Pipeline.parse("test-reverse{twice=yes}")
    with pytest.raises(PassError, match="expected order before test-reverse"):
        Pipeline.parse("build-csr,test-reverse,order")


def test_a_taken_or_illegal_name_is_refused(registered):
    registered(Reverse)
    other = type("Other", (Reverse,), {"__module__": "elsewhere"})
    with pytest.raises(PassError, match="register_pass: expected a new name, found 'test-reverse' which is taken"):
        register_pass(other)
    with pytest.raises(PassError, match="found 'order' which is taken; choose another name"):
        register_pass(type("Order", (Reverse,), {"name": "order"}))
    with pytest.raises(PassError, match="expected a name of a-z, 0-9 and -, found 'No Name'; set the class variable"):
        register_pass(type("NoName", (Reverse,), {"name": "No Name"}))


def test_a_cycle_of_dependencies_is_refused(registered):
    registered(type("First", (Reverse,), {"name": "test-first", "requires": ("test-second",)}))
    registered(type("Second", (Reverse,), {"name": "test-second", "requires": ("test-first",)}))
    with pytest.raises(PassError, match=r"passes test-\w+, test-\w+: expected dependencies without a cycle"):
        Pipeline.parse("test-first")


def test_catalogue_holds_passes_of_their_names():
    for name in CATALOGUE:
        assert find_pass(name).name == name
        assert find_pass(name).__doc__


# -- text in, text out ---------------------------------------------------------------------


def test_run_text_schedules_a_file(golden):
    text = run_text(str(MODULE), "order{by=cost},build-csr,split-k{parts=2}")
    golden(text)
    assert scheduled(parse(text)).applied == ("order{by=cost}", "build-csr", "split-k{parts=2}")


def test_run_text_prints_after_every_pass():
    text = run_text(str(MODULE), "drop-empty,build-csr", print_after_all=True)
    first, last = text.split("// after build-csr\n")
    assert first.startswith("// after drop-empty\nprogram")
    assert last == run_text(str(MODULE), "drop-empty,build-csr")
    assert run_text(str(MODULE), "", print_after_all=True) == run_text(str(MODULE), "")


def test_run_text_is_exact_where_asked():
    large = Module(make_program((4096, 4096)))
    text = run_text(print_module(large, exact=True), "build-csr", exact=True)
    assert parse(text) == Pipeline.parse("build-csr").run(large)
    with pytest.raises(ParseError, match="exact=True"):
        parse(run_text(print_module(large, exact=True), "build-csr"))
