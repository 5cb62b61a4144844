"""What a weight may cost: the policy that chooses a format for every tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stoicc.ir.errors import InputError
from stoicc.ir.format import TileFormat
from stoicc.weights import FormatLike, as_formats

CANDIDATES = ("empty", "int2<zero_points=true>", "int3", "int4_nv24", "int4", "int8", "nv24", "dense")
"""Formats that a budget chooses from where it names none."""


@dataclass(frozen=True)
class Budget:
    """A bound on bytes, predicted time or error; every tile gets the format that serves the output best within it.

    Exactly one of `bytes_per_weight`, `time_us` and `error` is given.

    Attributes:
        bytes_per_weight: of the tiles and the order of the columns, over M x K; a dense bf16 weight has 2.
        time_us: predicted microseconds of one call with `batch` rows of x on the target.
        batch: rows of x that a time is for.
        error: ||X (W - W_c)^T|| / ||X W^T||, the relative error of the layer's output; bytes are then the least found.
        formats: to choose from, texts or formats; default: `CANDIDATES` that have code for the target.
        compensate: let the weights to come make up for every tile's error (`stoicc.ops.mosaic`); default: where the
            statistics have a gram matrix.
        sort_inputs: bring input channels of like energy together before tiling, which the executor undoes on x;
            default: where it lowers the error by more than the order's bytes cost.

    Raises:
        InputError: none of the bounds or several, or values out of range.
    """

    bytes_per_weight: float | None = None
    time_us: float | None = None
    batch: int = 1
    error: float | None = None
    formats: Sequence[FormatLike] | None = None
    compensate: bool | None = None
    sort_inputs: bool | None = None

    def __post_init__(self) -> None:
        bounds = {name: getattr(self, name) for name in ("bytes_per_weight", "time_us", "error")}
        given = [name for name, value in bounds.items() if value is not None]
        if len(given) != 1:
            raise InputError(
                f"Budget: expected one of bytes_per_weight, time_us and error, found {' and '.join(given) or 'none'}; "
                "bound one of them, the others follow"
            )
        value = bounds[given[0]]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise InputError(f"Budget: expected {given[0]} as a number >= 0, found {value!r}")
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise InputError(f"Budget: expected a batch from 1, found {self.batch!r}; name the rows of x of one call")
        if self.formats is not None:
            object.__setattr__(self, "formats", as_formats(self.formats))
            if not self.formats:
                raise InputError("Budget: expected at least one format, found none; leave formats out for the default")

    @property
    def candidates(self) -> tuple[TileFormat, ...]:
        """The formats to choose from, as objects."""
        return as_formats(CANDIDATES if self.formats is None else self.formats)
