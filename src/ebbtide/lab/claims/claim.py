"""What a claim is: words that stand before the run, a measurement, and a rule between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ebbtide.lab.claims.bench import Bench
from ebbtide.lab.report import Picture, Table
from ebbtide.lab.statistics import Interval

__all__ = ["Claim", "Evidence", "Number", "Verdict", "exact", "graded"]


class Verdict(StrEnum):
    """What an experiment says of a claim."""

    CONFIRMED = "confirmed"
    CONDITION = "confirmed with a condition"
    NOT_CONFIRMED = "not confirmed"
    UNTESTABLE = "not testable here"


def graded(fully: bool, partly: bool = False) -> Verdict:
    """Return the verdict of a rule with one condition, or with a weaker one behind it.

    Example:
        >>> graded(False, partly=True).value
        'confirmed with a condition'
    """
    if fully:
        return Verdict.CONFIRMED
    return Verdict.CONDITION if partly else Verdict.NOT_CONFIRMED


@dataclass(frozen=True)
class Number:
    """One measured number.

    Attributes:
        label: What was measured.
        interval: Its value and the range it is known to; for what is deterministic a point.
        form: Format specification of the value.
        unit: Unit, if any.
    """

    label: str
    interval: Interval
    form: str = ".3g"
    unit: str = ""

    @property
    def value(self) -> float:
        """The measured value."""
        return self.interval.mean

    @property
    def low(self) -> float:
        """Lower end of the range."""
        return self.interval.low

    @property
    def high(self) -> float:
        """Upper end of the range."""
        return self.interval.high

    def __str__(self) -> str:
        """Write the value with its unit and, where it is uncertain, the range."""
        if math.isnan(self.value):
            return f"not determined{f' ({self.unit})' if self.unit else ''}"
        text = f"{self.value:{self.form}}" + (f" {self.unit}" if self.unit else "")
        if self.low == self.high:
            return text
        plain = self.form.lstrip("+")
        return f"{text} [{self.low:{plain}} to {self.high:{plain}}]"


def exact(label: str, value: float, form: str = ".3g", unit: str = "") -> Number:
    """Return a number that the experiment determines without chance.

    Example:
        >>> str(exact("gap", 2.5e-16))
        '2.5e-16'
    """
    return Number(label, Interval(value, value, value, 1), form, unit)


@dataclass(frozen=True)
class Evidence:
    """What an experiment measured: numbers by name, and what shows them."""

    numbers: Mapping[str, Number]
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()

    def __getitem__(self, name: str) -> Number:
        return self.numbers[name]


@dataclass(frozen=True)
class Claim:
    """A claim about AdamW and the experiment that puts it to the test.

    Everything here but the verdict stands before the experiment runs; what was altered after
    an earlier run had been seen is said in `revised`.

    Attributes:
        name: Short name, for `--only`.
        title: The claim in a few words.
        claim: The claim as it is made.
        source: Who makes it, or where it comes from.
        experiment: What is done, so that it can be followed without the source at hand.
        prediction: What is expected, and why.
        expected: The verdict that the prediction comes to.
        rule: How the numbers decide, in words; `judge` is the same in code. For a claim that
            is not testable, why not.
        measure: The experiment; `None` where the claim is not testable.
        judge: The rule; reads nothing but the evidence.
        readings: For each verdict that the rule can give, the sentence it comes to, with the
            numbers by name in braces.
        revised: What was changed after first numbers had been seen; empty if nothing was.
        needs: Shared experiments that it reads.
        steps: Training steps of its own, networks times steps, without quick and with.
    """

    name: str
    title: str
    claim: str
    source: str
    experiment: str
    prediction: str
    expected: Verdict
    rule: str
    measure: Callable[[Bench], Evidence] | None = None
    judge: Callable[[Evidence], Verdict] | None = None
    readings: Mapping[Verdict, str] = field(default_factory=dict)
    revised: str = ""
    needs: Sequence[str] = ()
    steps: tuple[int, int] = (0, 0)

    def reading(self, verdict: Verdict, evidence: Evidence) -> str:
        """Return the sentence of a verdict, its numbers filled in."""
        return self.readings[verdict].format_map(
            {name: str(number) for name, number in evidence.numbers.items()}
        )
