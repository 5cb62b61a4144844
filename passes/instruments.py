"""What watches a pipeline run: printing and timing."""

import time
from dataclasses import dataclass, field
from typing import TextIO

from stoicc.ir.types import Module
from stoicc.passes.base import Pass


class Instrument:
    """Called around every pass; override what is needed."""

    def before_pass(self, step: Pass, module: Module) -> None:
        """Called with the module that `step` is about to get."""

    def after_pass(self, step: Pass, module: Module) -> None:
        """Called with the verified module that `step` made."""


@dataclass
class PrintIR(Instrument):
    """Print the IR after each pass to a stream."""

    stream: TextIO
    exact: bool = False

    def after_pass(self, step: Pass, module: Module) -> None:
        from stoicc.ir.printer import print_module

        self.stream.write(f"// after {step}\n{print_module(module, exact=self.exact)}\n")


@dataclass
class Timing(Instrument):
    """Seconds of each pass and of the verification that follows it, in the order they ran."""

    seconds: list[tuple[str, float]] = field(default_factory=list)
    _start: float = 0.0

    def before_pass(self, step: Pass, module: Module) -> None:
        self._start = time.perf_counter()

    def after_pass(self, step: Pass, module: Module) -> None:
        self.seconds.append((str(step), time.perf_counter() - self._start))

    def __str__(self) -> str:
        return "\n".join(f"{seconds * 1e3:9.2f} ms  {step}" for step, seconds in self.seconds)
