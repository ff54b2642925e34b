"""The result of a conversion, and the checks that conversions share."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Conversion:
    """A converted weight decay and how it came about.

    Attributes:
        value: The weight decay in the target's convention.
        rule: Name of the rule.
        formula: The rule as a formula.
        exact: Whether both settings take the same steps.
        note: What to know before using it; empty if nothing.
    """

    value: float
    rule: str
    formula: str
    exact: bool
    note: str = ""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        accuracy = "exact" if self.exact else "approximate"
        lines = [f"{self.value:.6g}", f"  {self.rule}: {self.formula} ({accuracy})"]
        return "\n".join([*lines, f"  {self.note}"] if self.note else lines)

    def to_json(self) -> str:
        """Return the conversion as JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def check_range(
    name: str, value: float, *, above: float = -math.inf, at_least: float = -math.inf
) -> None:
    """Refuse a number that is not finite or outside its range."""
    if not (at_least <= value < math.inf and value > above):
        bound = f"above {above:g}" if above > -math.inf else f"at least {at_least:g}"
        raise ValueError(f"{name} must be a finite number {bound}, got {value}")


def check_rate(name: str, value: float) -> None:
    """Refuse a rate outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
