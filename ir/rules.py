"""How a verifier rule is written: a named check of one invariant, and the rules it builds on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stoicc.ir.errors import VerifyError, brief
from stoicc.ir.options import DIGITS, is_whole
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
    found = brief(str(found), 400)
    return VerifyError(f"{brief(where, 400)}: expected {brief(expected, 400)}, found {found}; {way_out}")


def check_numbers(where: str, values: Sequence[object]) -> None:
    """All are integers that fit in 64 bits, and whose text the parser reads back."""
    # types first, in one step for a map of many tiles
    if set(map(type, values)) <= {int} and (not values or -(10**DIGITS) < min(values) <= max(values) < 10**DIGITS):  # type: ignore[type-var, operator]
        return
    for value in values:
        if not is_whole(value):
            found = f"one of {value.bit_length()} bits" if isinstance(value, int) and value > 1 else repr(value)
            raise broken(where, f"whole numbers of at most {DIGITS} digits", found, "correct the number")


def check_texts(where: str, values: Sequence[object]) -> None:
    """All are strings that can be written to a file."""
    for value in values:
        try:
            good = isinstance(value, str) and value.encode() is not None
        except UnicodeEncodeError:
            good = False
        if not good:
            raise broken(where, "text (a str that UTF-8 can hold)", repr(value), "name it with a string")


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
