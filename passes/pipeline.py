"""Pipelines: passes in order, as text and as an object, verified between passes."""

import io
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stoicc.ir.errors import PassError, VerifyError, brief
from stoicc.ir.options import is_whole
from stoicc.ir.types import Module
from stoicc.ir.verify import verify, verify_schedule
from stoicc.passes.base import Pass, WeightPass, scheduled, with_schedule
from stoicc.passes.catalogue import parse_pass
from stoicc.passes.dependencies import check_order, missing, sort_passes
from stoicc.passes.instruments import Instrument, PrintIR

_PIECE = re.compile(r"[^,{}]+|\{[^{}]*\}|[,{}]")
"""What a pipeline's text is made of; a comma that is a piece of its own stands between two passes."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run. Round-trips through text.

    Attributes:
        passes: the passes; PassError where one comes before a pass that it must follow.
        instruments: called around every pass; no part of the pipeline's text or equality.
    """

    passes: tuple[Pass, ...]
    instruments: tuple[Instrument, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_order(self.passes, str(self))

    @staticmethod
    def parse(text: str, instruments: Iterable[Instrument] = ()) -> "Pipeline":
        """A pipeline from text: `order{by=cost},build-csr,split-k{parts=4}`; "" has no passes."""
        steps = [""] if text.strip() else []
        for piece in _PIECE.findall(text) if steps else ():
            if piece == ",":
                steps.append("")
            else:
                steps[-1] += piece
        return Pipeline(tuple(parse_pass(step) for step in steps), tuple(instruments))

    @staticmethod
    def ordered(passes: Iterable[str | Pass], instruments: Iterable[Instrument] = ()) -> "Pipeline":
        """A pipeline of these passes (texts or objects), sorted by their dependencies."""
        steps = [parse_pass(step) if isinstance(step, str) else step for step in passes]
        return Pipeline(tuple(sort_passes(steps)), tuple(instruments))

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)

    def run(self, module: Module) -> Module:
        """Apply the passes to a module (with or without a schedule) and return the new one.

        The module is verified before the first pass and after each; each pass is recorded in
        `schedule.applied`.

        Raises:
            PassError: a pass requires one that has not run.
            VerifyError: the input breaks an invariant, or a pass broke one (it is named).
        """
        verify(module)
        module = with_schedule(module, scheduled(module))
        for step in self.passes:
            if isinstance(step, WeightPass) and str(step) in scheduled(module).applied:
                continue  # the tiles were made with it
            self._check_required(step, module)
            for instrument in self.instruments:
                instrument.before_pass(step, module)
            module = _apply(step, module)
            for instrument in self.instruments:
                instrument.after_pass(step, module)
        return module

    def split(self) -> tuple[tuple[WeightPass, ...], "Pipeline"]:
        """The passes on the weight, which come first, and the pipeline of the others."""
        on_weight = tuple(step for step in self.passes if isinstance(step, WeightPass))
        return on_weight, replace(self, passes=self.passes[len(on_weight) :])

    def _check_required(self, step: Pass, module: Module) -> None:
        ran = [applied.partition("{")[0] for applied in scheduled(module).applied]
        absent = missing(step, ran)
        if absent:
            raise PassError(
                f"pipeline {brief(repr(str(self)))}: expected {absent[0]} before {step.name}, "
                f"found that it has not run; put {absent[0]} in front of {step.name}"
            )


def default_pipeline(target: str, library: bool = False, cores: int | None = None) -> Pipeline:
    """The pipeline that `compile` uses for a target: "cpu", "triton" or "reference".

    Args:
        library: large batches on a GPU go to a vendor's library, which keeps a copy of the matrix in its own form.
        cores: of the CPU that will run it; default: as many as this one has.
    """
    target = "triton" if target == "cuda" else target
    if target not in DEFAULTS:
        raise PassError(f"default_pipeline: expected one of {', '.join(DEFAULTS)}, found {target!r}; name a target")
    if cores is not None and not (is_whole(cores) and cores >= 1):
        raise PassError(f"default_pipeline: expected cores, a whole number from 1, found {cores!r}; leave it out")
    text = DEFAULTS[target] if target != "cpu" or cores is None else _cpu_text(cores)
    return Pipeline.parse(text.replace("device=gpu", "above=vendor,device=gpu") if library else text)


def _cpu_text(cores: int) -> str:
    """How finely rows are cut is for the cores: a part costs its sums, written and read once more, and on two cores 64
    items took 3 to 9% longer than 16. How many threads a call has is not asked, so that it changes no bit."""
    return (
        f"drop-empty,build-csr,split-k{{parts=balance,min_items={min(8 * cores, 64)}}},"
        "order{by=item},balance{bins=256},fuse-epilogue,regimes{tiles=auto}"
    )


DEFAULTS = {
    "cpu": _cpu_text(os.cpu_count() or 1),
    # 264 items: two for each of the 132 SMs of a large GPU
    "triton": (
        "drop-empty,order{by=cost},build-csr,split-k{parts=auto,min_items=264},fuse-epilogue,"
        "regimes{tiles=auto,device=gpu}"
    ),
    "reference": "drop-empty,order{by=row},build-csr,fuse-epilogue",
}


def run_text(text: str, pipeline_text: str, print_after_all: bool = False, exact: bool = False) -> str:
    """Run a pipeline on a textual module: what `stoicc opt` does.

    Args:
        text: an exact textual module.
        print_after_all: also print the module after every pass, each under a comment.
        exact: print in exact mode.

    Returns:
        the text of the scheduled module; with `print_after_all` that of every step, the last one last.
    """
    from stoicc.ir.parser import parse
    from stoicc.ir.printer import print_module

    stream = io.StringIO()
    pipeline = Pipeline.parse(pipeline_text, (PrintIR(stream, exact),) if print_after_all else ())
    module = pipeline.run(parse(text))
    # the last pass printed the result already
    return stream.getvalue() or f"{print_module(module, exact=exact)}\n"


def _apply(step: Pass, module: Module) -> Module:
    """One pass, recorded and verified."""
    made = step.apply(module)
    schedule = scheduled(made)
    made = with_schedule(made, replace(schedule, applied=(*schedule.applied, str(step))))
    try:
        if made.tiles is module.tiles:
            verify_schedule(made)
        else:
            verify(made)
    except VerifyError as error:
        raise VerifyError(f"after pass {step}: {error}") from error
    return made
