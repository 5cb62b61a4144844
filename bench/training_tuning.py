"""Settings of every method of `bench.training`, tuned with the same effort on text of their own.

Seven short runs each: four peak rates with the method's defaults, then three more values of its own option at the best
of them; an eighth where the best stood at the end of the range. The rates of SLoPe's adapters are chosen in forks of
its best run, for each of `FORKS` by itself.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.corpus import Corpus
from bench.training_methods import FORKS, METHODS
from bench.training_runs import Setting, runs_of

PATH = Path(__file__).parent / "results" / "training-tuning.json"
RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
ADAPTER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
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

    def tried(setting: Setting) -> None:
        run = runs_of(name, STEPS, SEED, setting, corpus, "calibration")[0]
        trials.append(Trial(name, setting, run.bits))
        say(trials[-1])

    first, *others = METHODS[name].options
    for rate in RATES:
        tried(Setting(rate, dict(first)))
    rate = best(trials, name).rate
    for options in others:
        tried(Setting(rate, dict(options)))
    if name == "slope":
        trials += tuned_adapters(best(trials, name), corpus, say)
    return trials


def tuned_adapters(chosen: Setting, corpus: Corpus, say: Callable[[Trial], None]) -> list[Trial]:
    """Trials of the adapters' own rates, on forks of SLoPe's run with the settings that were chosen for it."""
    trials = []
    own = [of for of, fork in FORKS.items() if fork.own]
    for rate in ADAPTER_RATES:
        setting = Setting(chosen.rate, chosen.options, dict.fromkeys(own, rate))
        runs = {run.name: run for run in runs_of("slope", STEPS, SEED, setting, corpus, "calibration")}
        for of in own:
            trials.append(Trial(of, setting, runs[of].bits))
            say(trials[-1])
    return trials


def best(trials: list[Trial], name: str) -> Setting:
    """The setting with the fewest bits."""
    return min((trial for trial in trials if trial.name == name), key=lambda trial: trial.bits).setting


def recorded() -> list[Trial]:
    """The trials on record; none before the first `--tune`."""
    return [Trial.of(trial) for trial in json.loads(PATH.read_text())] if PATH.exists() else []


def settings(trials: list[Trial]) -> dict[str, Setting]:
    """What tuning chose for every method; SLoPe's with the rates of its adapters. Without trials, defaults."""
    if not trials:
        return {name: Setting() for name in METHODS}
    found = {name: best(trials, method.like or name) for name, method in METHODS.items()}
    forks = {trial.name for trial in trials} & FORKS.keys()
    found["slope"] = replace(found["slope"], adapter_rates={of: best(trials, of).adapter_rates[of] for of in forks})
    return found


def tune(corpus: Corpus, say: Callable[[Trial], None], adapters: bool = False) -> None:
    """Tune every method, or the adapters alone, and write the record."""
    if adapters:
        trials = [trial for trial in recorded() if trial.name not in FORKS]
        trials += tuned_adapters(best(trials, "slope"), corpus, say)
    else:
        names = [name for name, method in METHODS.items() if not method.like]
        trials = [trial for name in names for trial in tuned(name, corpus, say)]
    PATH.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
