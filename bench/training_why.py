"""What SLoPe's distance from dense consists of, and what adapters bring, from paired runs: a table."""

from bench.training_methods import FORKS, LAZY
from bench.training_record import Claim, Record, claims, markdown
from bench.training_runs import CONFIG, Setting, plan_for

WHY = (
    ("static", "slope", "the same mask without the second prune: every gradient exact"),
    ("dense", "static", "no mask, against that"),
    ("sr-ste", "static", "a mask that moves and decay of what is dropped (SR-STE), against that"),
    ("lazy, schedule's rate", "slope", "adapters in the last 1%, at the rate that the schedule then has"),
    (LAZY, "slope", "adapters in the last 1%, with a rate of their own (published)"),
    ("lazy, 10%", "slope", "adapters in the last 10%, with a rate of their own"),
    ("throughout", "slope", "adapters from the first step, at the schedule's rate"),
)
"""Of each, what the first saves of the second's bits."""


def rows(record: Record) -> tuple[list[str], list[list[str]]]:
    """Each part on a line."""
    return ["what differs from SLoPe", "bits saved", "+-", ""], [
        [part.what, f"{part.gap:+.4f}", f"{part.interval:.4f}", effect(part)] for part in claims(record, WHY)
    ]


def effect(part: Claim) -> str:
    """Whether a part saves bits."""
    return {"holds": "saves", "**fails**": "costs"}.get(part.verdict, "nothing beyond the interval")


def last_steps(record: Record) -> str:
    """What lazy adapters are given here, in words."""
    steps = max(step for run in record.runs for step, _ in run.curve)
    plan, joins = plan_for(steps, 0, Setting(1.0)), steps - max(1, round(FORKS[LAZY].share * steps))
    return (
        f"The last 1% are {steps - joins} of {steps} steps, {(steps - joins) * plan.batch * CONFIG.context:,} bytes of "
        f"text, and the cosine schedule has fallen to {plan.rate_at(joins):.2%} of its peak when they begin."
    )


PAGE = {"why": lambda record: markdown(*rows(record)), "last": last_steps}
"""Blocks of docs/training.md, as those of `bench.training_record`."""
