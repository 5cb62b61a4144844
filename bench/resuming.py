"""Long benches in pieces: a record that is written after each row, and read to go on."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench.machine import describe_machine

Row = dict[str, object]
Summary = Callable[[list[Row]], object]


class Resumable:
    """Rows of a bench in a JSON file, which holds the whole record after each of them.

    Args:
        path: None writes nothing.
        resume: go on where the file ends, if it is of this machine.
        limit_s: no row is begun after so many seconds; None is no limit.
        summary: of all rows.

    Attributes:
        rows: in the order in which they were measured.
    """

    def __init__(self, path: Path | None, resume: bool, limit_s: float | None, summary: Summary) -> None:
        self._path, self._summary = path, summary
        self._end = time.perf_counter() + limit_s if limit_s is not None else float("inf")
        self._machine = describe_machine()
        self.rows: list[Row] = []
        if resume and path is not None and path.exists():
            held = json.loads(path.read_text())
            if (
                held["machine"]["cpu"] == self._machine["cpu"]
                and held["machine"]["threads"] == self._machine["threads"]
            ):
                self.rows = held["rows"]

    def missing(self, subjects: Iterable[object]) -> Iterator[object]:
        """The subjects that have no row yet (their text is its `mosaic`), while there is time."""
        done = {row["mosaic"] for row in self.rows}
        for subject in subjects:
            if str(subject) in done:
                continue
            if time.perf_counter() > self._end:
                return
            yield subject

    def add(self, row: Row) -> None:
        """One more row; the file holds it from here on."""
        self.rows.append(row)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            record = {"machine": self._machine, "summary": self._summary(self.rows), "rows": self.rows}
            self._path.write_text(json.dumps(record, indent=1) + "\n")
