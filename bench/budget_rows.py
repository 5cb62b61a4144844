"""What `bench.budget` compares: formats for all tiles, and mosaics at the same bytes and between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

UNIFORM = {"int4_nv24": 3.25, "int3": 3.25, "int4": 4.25, "int8": 8.25}
"""Formats that all tiles have, and their bits per weight."""
BUDGETS = (3.25, 3.75, 4.25, 5.0, 6.0, 8.25)
"""Bits per weight of the mosaics."""
ALONE = (3.25, 4.25, 5.0)
"""Those at which every layer has the same bytes as well."""
BASELINE = "int4_nv24"
"""At its bytes a mosaic should have an error `MARGIN` lower."""
MARGIN = 0.3


@dataclass(frozen=True)
class Row:
    """One way to compress every layer; all of them are rounded by the same sweep.

    Attributes:
        name: of the format, or of the mosaic.
        bits: per weight that tiles (and the order of the columns) may take.
        options: of `stoicc.ops.budget_mosaic` for every layer; None where one multiplier spreads the bytes over them.
    """

    name: str
    bits: float
    options: tuple[tuple[str, Any], ...] | None = None


MODEL, LAYER = "one multiplier", "layer by layer"


def all_rows() -> list[Row]:
    """Uniform formats, then mosaics."""
    rows = []
    for name, bits in UNIFORM.items():
        share = ("bytes_per_weight", (bits + 1e-6) / 8)
        rows.append(Row(name, bits, (share, ("formats", (name,)), ("sort_inputs", False))))
    rows += [Row(MODEL, bits) for bits in BUDGETS]
    return rows + [Row(LAYER, bits, (("bytes_per_weight", bits / 8),)) for bits in ALONE]


@dataclass(frozen=True)
class Found:
    """A row and what was measured.

    Attributes:
        stored: bits per weight of tiles and orders.
        scores: errors of the model over the dense one's by name, one for each draw of the calibration inputs.
        formats: tiles by format in the first draw.
        foretold: change of the model's output on them, as a share of its squared norm, one for each draw.
    """

    name: str
    bits: float
    stored: float
    scores: dict[str, list[float]]
    formats: dict[str, int]
    foretold: list[float] = field(default_factory=list)

    def mean(self, score: str) -> float:
        """Over the draws."""
        return _mean(self.scores[score])


@dataclass(frozen=True)
class Claim:
    """A mosaic against what it should beat, draw by draw.

    Attributes:
        what: the claim in words.
        mosaic, other: means over draws.
        gap: mean over draws of other - mosaic.
        noise: twice the standard error of the gap over draws.
        foretold: share of the squared error of the other's output that the budget promised to save; NaN: not recorded.
        holds: whether the claim does.
    """

    what: str
    mosaic: float
    other: float
    gap: float
    noise: float
    foretold: float
    holds: bool


def claims(rows: Sequence[Found], score: str, name: str = MODEL) -> list[Claim]:
    """Every claim for which rows are there: at the bytes of formats, between them, and far below int4_nv24."""
    mosaics = {found.bits: found for found in rows if found.name == name}
    plain = [found for found in rows if found.name in UNIFORM]
    best = {
        bits: min((f for f in plain if f.bits == bits), key=lambda f: f.mean(score)) for bits in {f.bits for f in plain}
    }
    made: list[Claim] = []
    for bits, mosaic in sorted(mosaics.items()):
        if bits in best:
            other = best[bits]
            gap, noise = _gap(mosaic.scores[score], other.scores[score])
            what = f"{bits:g} bits: not worse than {other.name}"
            promise = _promise(mosaic, other.foretold)
            made.append(_claim(what, mosaic.scores[score], other.scores[score], gap, noise, promise, gap >= -noise))
        elif min(best, default=bits) < bits < max(best, default=bits):
            below, above = max(b for b in best if b < bits), min(b for b in best if b > bits)
            share = (bits - below) / (above - below)
            line, foretold = (
                [(1 - share) * low + share * high for low, high in zip(*ends, strict=True)]
                for ends in (
                    (best[below].scores[score], best[above].scores[score]),
                    (best[below].foretold, best[above].foretold),
                )
            )
            gap, noise = _gap(mosaic.scores[score], line)
            what = f"{bits:g} bits: better than the line from {best[below].name} to {best[above].name}"
            promise = _promise(mosaic, foretold)
            made.append(_claim(what, mosaic.scores[score], line, gap, noise, promise, gap > noise))
    baseline = next((f for f in plain if f.name == BASELINE), None)
    if baseline is not None and baseline.bits in mosaics:
        mosaic = mosaics[baseline.bits]
        gap, noise = _gap(mosaic.scores[score], baseline.scores[score])
        what = f"{baseline.bits:g} bits: an error at least {MARGIN:.0%} below {BASELINE}'s"
        holds = gap - noise >= MARGIN * baseline.mean(score)
        promise = _promise(mosaic, baseline.foretold)
        made.append(_claim(what, mosaic.scores[score], baseline.scores[score], gap, noise, promise, holds))
    return made


def _claim(
    what: str, mosaic: Sequence[float], other: Sequence[float], gap: float, noise: float, foretold: float, holds: bool
) -> Claim:
    count = min(len(mosaic), len(other))
    return Claim(what, _mean(mosaic[:count]), _mean(other[:count]), gap, noise, foretold, holds)


def _promise(mosaic: Found, other: Sequence[float]) -> float:
    return 1 - _mean(mosaic.foretold) / _mean(other) if mosaic.foretold and any(other) else math.nan


def _mean(draws: Sequence[float]) -> float:
    return sum(draws) / len(draws)


def _gap(mosaic: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of other - mosaic over draws, and twice its standard error (0 for a single draw)."""
    gaps = [theirs - own for own, theirs in zip(mosaic, other, strict=False)]  # a row may have fewer draws
    mean = sum(gaps) / len(gaps)
    if len(gaps) < 2:
        return mean, 0.0
    spread = (sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)) ** 0.5
    return mean, 2 * spread / len(gaps) ** 0.5
