"""Settings of every method of `bench.training`, tuned with the same effort on text of their own.

Seven short runs each: four peak rates with the method's defaults, then three more values of its own option at the best
of them; an eighth where the best stood at the end of the range. The rate of SLoPe's adapters is chosen in forks of the
last 1% of its best run.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.corpus import Corpus
from bench.training_methods import LAZY, METHODS
from bench.training_runs import Setting, runs_of

PATH = Path(__file__).parent / "results" / "training-tuning.json"
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)
STEPS, SEED = 500, 100
"""Of a short run; no run that counts has this seed."""


@dataclass(frozen=True)
class Trial:
    """A setting and what came of it: bits per byte of the calibration split."""

    name: str
    setting: Setting
    bits: float

    @staticmethod
    def of(data: dict[str, Any]) -> "Trial":
        """From what `asdict` gives."""
        return Trial(data["name"], Setting(**data["setting"]), data["bits"])


def tuned(name: str, corpus: Corpus, say: Callable[[Trial], None]) -> list[Trial]:
    """All trials of a method."""
    trials: list[Trial] = []

    def tried(setting: Setting, of: str = name) -> None:
        runs = {run.name: run for run in runs_of(name, STEPS, SEED, setting, corpus, "calibration")}
        trials.append(Trial(of, setting, runs[of].bits))
        say(trials[-1])

    first, *others = METHODS[name].options
    for rate in RATES:
        tried(Setting(rate, dict(first)))
    rate = best(trials, name).rate
    for options in others:
        tried(Setting(rate, dict(options)))
    if name == "slope":
        chosen = best(trials, name)
        for adapter_rate in ADAPTER_RATES:
            tried(Setting(chosen.rate, chosen.options, adapter_rate), LAZY)
    return trials


def best(trials: list[Trial], name: str) -> Setting:
    """The setting with the fewest bits."""
    return min((trial for trial in trials if trial.name == name), key=lambda trial: trial.bits).setting


def recorded() -> list[Trial]:
    """The trials on record; none before the first `--tune`."""
    return [Trial.of(trial) for trial in json.loads(PATH.read_text())] if PATH.exists() else []


def settings(trials: list[Trial]) -> dict[str, Setting]:
    """What tuning chose for every method; SLoPe's with the rate of its adapters. Without trials, defaults."""
    if not trials:
        return {name: Setting() for name in METHODS}
    return {name: best(trials, LAZY if name == "slope" else name) for name in METHODS}


def tune(corpus: Corpus, say: Callable[[Trial], None]) -> None:
    """Tune every method, and write the record."""
    trials = [trial for name in METHODS for trial in tuned(name, corpus, say)]
    PATH.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
