"""What can become of a cell, and its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

__all__ = ["FAULTS", "Outcome", "Record"]


class Outcome:
    """Names of what can become of a cell; each of them is final but `INTERRUPTED`."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    PRUNED = "pruned"
    FAILED = "failed"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"


FAULTS = (Outcome.FAILED, Outcome.TIMEOUT)
"""Outcomes that the command's exit status tells of, and that `--retry-failed` runs again."""


@dataclass(frozen=True)
class Record:
    """The record of one cell.

    Attributes:
        outcome: What became of it, a name in `Outcome`.
        value: What it is judged by; NaN or infinite where it diverged, None where there is none.
        numbers: Everything the function returned, by name.
        metric: Which of them `value` is.
        curve: The values reported on the way, as (step, value), thinned out.
        seconds: How long it ran.
        error: One line that says what went wrong, if something did.
        traceback: The traceback, if there is one.
        output: The end of what it printed.
        sha256: Of the user's file.
        where: Machine it ran on.
    """

    outcome: str
    value: float | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    metric: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""
    output: str = ""
    sha256: str = ""
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON would hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Return the record that `to_dict` gave."""
        curve = tuple((int(step), float(value)) for step, value in content["curve"])
        return cls(**{**content, "curve": curve})

    @property
    def is_reusable(self) -> bool:
        """Whether it would come out the same in another sweep."""
        return self.outcome in (Outcome.FINISHED, Outcome.DIVERGED)

    @property
    def is_number(self) -> bool:
        """Whether the cell came to a finite value."""
        return (
            self.outcome == Outcome.FINISHED
            and self.value is not None
            and math.isfinite(self.value)
        )
