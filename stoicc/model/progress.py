"""A progress bar on stderr where that is a terminal, and silence elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str], None]
"""Called with the name of a layer when work on it begins."""


@contextmanager
def layer_bar(total: int, wanted: bool | None) -> Iterator[Show]:
    """A bar of so many layers; wanted None: only where stderr is a terminal.

    It vanishes at the end, except from a log, which gets its last state alone.
    """
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as progress:
        task = progress.add_task("compressing", total=total)
        begun = 0

        def show(name: str) -> None:
            nonlocal begun
            progress.update(task, description=f"compressing {name}", completed=begun)
            begun += 1

        yield show
        progress.update(task, description="compressed", completed=begun)
