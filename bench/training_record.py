"""What `bench.training` found, as data, as tables and as a picture."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table

from bench.training_memory import LayerMemory
from bench.training_methods import FORKS, LAZY, METHODS
from bench.training_runs import Run, Setting
from bench.training_tuning import Trial

T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Two-sided 95% of Student's t, by degrees of freedom."""
AHEAD = (
    (LAZY, "sr-ste", "SLoPe with lazy adapters ahead of extended SR-STE (published)"),
    ("dense", LAZY, "SLoPe with lazy adapters behind dense (published)"),
    (LAZY, "slope", "lazy adapters help SLoPe (published)"),
    (LAZY, "transposable", "SLoPe with lazy adapters ahead of transposable masks"),
    (LAZY, "s-ste", "SLoPe with lazy adapters ahead of S-STE"),
)
"""Of these the first is to have fewer bits than the second."""
NAMES = (
    {name: f"{method.source} ({name})" for name, method in METHODS.items()}
    | {name: f"SLoPe, adapters in the last {fork.share:.0%}, the schedule's rate" for name, fork in FORKS.items()}
    | {name: f"SLoPe, adapters in the last {fork.share:.0%}" for name, fork in FORKS.items() if fork.own}
)


@dataclass(frozen=True)
class Record:
    """One run of the bench.

    Attributes:
        about: model, data, steps and seeds in words.
        settings: what each method was run with.
        runs: one for each method and seed.
        step_ms: median milliseconds of a training step.
        model_bytes: weights, masks, gradients and optimizer state of the model.
        layer: memory of one bf16 layer.
        layer_ms: milliseconds of products of one layer.
        machine: where times were taken.
        trials: from which the settings were chosen.
    """

    about: str
    settings: dict[str, Setting]
    runs: list[Run]
    step_ms: dict[str, float]
    model_bytes: dict[str, int]
    layer: LayerMemory
    layer_ms: dict[str, float]
    machine: dict[str, str | int]
    trials: list[Trial] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> "Record":
        """The inverse of `write`."""
        data = json.loads(path.read_text())
        data["settings"] = {name: Setting(**setting) for name, setting in data["settings"].items()}
        data["runs"] = [Run(**{**run, "curve": [tuple(point) for point in run["curve"]]}) for run in data["runs"]]
        data["layer"] = LayerMemory(**data["layer"])
        data["trials"] = [Trial.of(trial) for trial in data["trials"]]
        return Record(**data)

    def bits(self, name: str) -> dict[int, float]:
        """By seed."""
        return {run.seed: run.bits for run in self.runs if run.name == name}


@dataclass(frozen=True)
class Claim:
    """Whether one method has fewer bits than another, seed by seed: seeds and data are the same.

    Attributes:
        gap: mean of the second's bits less the first's.
        interval: half of the 95% interval of the gap (Student's t over seeds); infinite with one seed.
    """

    what: str
    gap: float
    interval: float

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.gap > self.interval:
            return "holds"
        return "**fails**" if self.gap < -self.interval else "open: within the interval"


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95% interval."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, float("inf")
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, T_QUANTILE.get(count - 1, 2.776) * (variance / count) ** 0.5


def claims(record: Record, pairs: Sequence[tuple[str, str, str]] = AHEAD) -> list[Claim]:
    """Those whose methods were run with the same seeds."""
    made = []
    for first, second, what in pairs:
        ours, theirs = record.bits(first), record.bits(second)
        seeds = ours.keys() & theirs.keys()
        if seeds:
            made.append(Claim(what, *mean_and_interval([theirs[seed] - ours[seed] for seed in sorted(seeds)])))
    return made


def rows_table(record: Record) -> Table:
    """Every method on a line."""
    return table(*_rows(record))


def claims_table(record: Record) -> Table:
    """Every claim on a line."""
    return table(*_claims(record))


def about(record: Record) -> str:
    """What was run, and where."""
    machine = record.machine
    return (
        f"{record.about} Step times: {machine['threads']} threads of {machine['cpu']}, torch {machine['torch']}, "
        f"Python {machine['python']}."
    )


def layer(record: Record) -> str:
    """Memory of a layer in words."""
    found = record.layer
    return (
        f"A {found.size} x {found.size} bf16 layer at 2:4, from allocations: weights, gradients and fp32 Adam moments "
        f"{found.training / found.dense_training:.3f}x of dense ({found.training:,} of {found.dense_training:,} "
        f"bytes), {found.adapting / found.dense_training:.3f}x while an adapter of rank {found.rank} trains; its "
        f"kernel {found.serving / found.dense_serving:.4f}x of the dense weight, "
        f"{found.serving_adapter / found.dense_serving:.4f}x with that adapter."
    )


def _rows(record: Record) -> tuple[list[str], list[list[str]]]:
    columns = ["method", "bits per byte", "+-", "by seed", "over dense", "bytes", "ms a step", "rate", "own option"]
    dense = record.bits("dense")
    lines = []
    for name in sorted({run.name for run in record.runs}, key=list(NAMES).index):
        bits = record.bits(name)
        mean, interval = mean_and_interval(list(bits.values()))
        over = [bits[seed] - dense[seed] for seed in bits if seed in dense]
        base = "slope" if name in FORKS else name
        setting = record.settings[base]
        own = ", ".join(f"{option} {value}" for option, value in setting.options.items())
        lines.append([
            NAMES[name],
            f"{mean:.4f}",
            f"{interval:.4f}",
            ", ".join(f"{value:.4f}" for value in bits.values()),
            f"{sum(over) / len(over):+.4f}" if over else "",
            f"{record.model_bytes[base] / record.model_bytes['dense']:.2f}x",
            f"{record.step_ms[base]:.1f}",
            f"{setting.rate:g}",
            f"adapters' rate {setting.adapter_rates[name]:g}" if name in setting.adapter_rates else own,
        ])  # fmt: skip
    return columns, lines


def _claims(record: Record) -> tuple[list[str], list[list[str]]]:
    return ["claim", "gap in bits", "+-", ""], [
        [claim.what, f"{claim.gap:+.4f}", f"{claim.interval:.4f}", claim.verdict] for claim in claims(record)
    ]


def _products(record: Record) -> tuple[list[str], list[list[str]]]:
    return ["products", "ms"], [[what, f"{found:.2f}"] for what, found in record.layer_ms.items()]


def _trials(record: Record) -> tuple[list[str], list[list[str]]]:
    lines = []
    for name in sorted({trial.name for trial in record.trials}, key=list(NAMES).index):
        own = [trial for trial in record.trials if trial.name == name]
        least = min(own, key=lambda trial: trial.bits)
        tried = [f"{_shown(trial)} {'**' * (trial is least)}{trial.bits:.4f}{'**' * (trial is least)}" for trial in own]
        lines.append([NAMES[name], "; ".join(tried)])
    return ["method", "setting and bits per byte of the calibration split"], lines


def _shown(trial: Trial) -> str:
    if trial.name in FORKS:
        return f"adapters' rate {trial.setting.adapter_rates[trial.name]:g}:"
    own = ", ".join(f"{option} {value}" for option, value in trial.setting.options.items())
    return f"{trial.setting.rate:g}, {own}:"


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Of rich, for a terminal."""
    found = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for line in lines:
        found.add_row(*line)
    return found


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of a page."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))


PAGE = {
    "about": about,
    "layer": layer,
    "rows": lambda record: markdown(*_rows(record)),
    "claims": lambda record: markdown(*_claims(record)),
    "products": lambda record: markdown(*_products(record)),
    "trials": lambda record: markdown(*_trials(record)),
}
"""Blocks of docs/training.md: `<!-- figures: training_rows -->` is `rows`."""


def curves(record: Record) -> Iterator[tuple[str, list[int], list[float]]]:
    """(method, steps, mean bits over seeds) of all methods that have curves."""
    for name in METHODS:
        found = [run.curve for run in record.runs if run.name == name and run.curve]
        if found:
            steps = [step for step, _ in found[0]]
            yield (
                name,
                steps,
                [sum(bits) / len(found) for bits in zip(*([b for _, b in c] for c in found), strict=True)],
            )


def draw(record: Record, path: Path) -> None:
    """Curves on the left, where each seed ended on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, steps, bits in curves(record):
        left.plot(steps[1:], bits[1:], label=name)
    left.set(xlabel="step", ylabel="bits per held-out byte (mean of seeds)")
    left.legend()
    names = sorted({run.name for run in record.runs}, key=list(NAMES).index)
    for place, name in enumerate(names):
        found = list(record.bits(name).values())
        right.plot([place] * len(found), found, "o")
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set(ylabel="bits per held-out byte at the end, by seed")
    figure.savefig(path, dpi=110)
