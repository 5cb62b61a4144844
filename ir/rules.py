"""How a verifier rule is written: a named check of one invariant, and the rules it builds on."""

from collections.abc import Callable
from dataclasses import dataclass

from stoicc.ir.errors import VerifyError
from stoicc.ir.types import Module

Check = Callable[[Module], None]


@dataclass(frozen=True, slots=True)
class Rule:
    """One invariant: `check` raises VerifyError where it is broken.

    Attributes:
        needs: rules without which this one has no meaning; it is skipped where one of them fails.
    """

    name: str
    check: Check
    needs: tuple[str, ...]


def rule(rules: list[Rule], name: str, *needs: str) -> Callable[[Check], Check]:
    """Add the decorated check to `rules`, after the rules that it needs."""

    def add(check: Check) -> Check:
        rules.append(Rule(name, check, needs))
        return check

    return add


def broken(where: str, expected: str, found: object, way_out: str) -> VerifyError:
    """The error of a broken invariant, as one sentence."""
    return VerifyError(f"{where}: expected {expected}, found {found}; {way_out}")


def run_rules(rules: list[Rule], module: Module, failed: dict[str, VerifyError], stop: bool) -> None:
    """Run the rules in order and collect what fails by rule name; `stop` ends at the first."""
    for entry in rules:
        if any(need in failed for need in entry.needs):
            failed_need = next(need for need in entry.needs if need in failed)
            failed.setdefault(entry.name, failed[failed_need])
            continue
        try:
            entry.check(module)
        except VerifyError as error:
            failed[entry.name] = VerifyError(f"{error} (rule {entry.name})")
            if stop:
                return
