"""The forecast as a value: it prints itself, becomes JSON and draws its picture."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebbtide.forecast.plot import Curve, plot_curves
from ebbtide.forecast.settings import DecaySettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DecayForecast", "Duration", "Equilibrium", "Moment", "RunForecast"]

# More groups than this are printed as a table, a line each.
_FULL_REPORTS = 3
_COLUMNS = ("group", "lr", "weight decay", "timescale", "κ", "kept", "verdict")


class Moment(NamedTuple):
    """The settings in force at one step, and the share of a weight that it removes."""

    step: float
    lr: float
    weight_decay: float
    share: float | None


class Duration(NamedTuple):
    """A length in steps, in epochs (None where their length is not known), of the run."""

    steps: float
    epochs: float | None
    of_run: float


class Equilibrium(NamedTuple):
    """Where the noise of the gradient and the decay balance.

    Attributes:
        rms: RMS of the weights there, under Adam.
        approach: How much of the way there the RMS² of a weight goes in this run.
        rotation_per_step: Angle in radians by which a weight vector turns each step.
        weight_bound: Size that no weight exceeds for long under AdamW, 1/λ.
    """

    rms: float | None
    approach: float
    rotation_per_step: float | None
    weight_bound: float | None


@dataclass(frozen=True)
class DecayForecast:
    """What decay does to one group over a run. None stands for what cannot be known.

    Attributes:
        settings: The settings it was computed from.
        total_steps: Length of the run.
        steps_per_epoch: Steps of an epoch, where given.
        largest_share: Largest share of a weight that a step removes.
        timescale: How far back the weights remember, 1/largest_share.
        half_life: Time in which decay alone, at the largest share, halves a weight.
        total_decay: κ, the sum of the shares of all steps.
        total_decay_lr_alone: κ if the weight decay had no schedule of its own.
        kept_share: What decay leaves of an initial weight.
        equilibrium: Where noise and decay balance.
        default_warmup_steps: Warmup to begin with under Adam, 2/(1 - β2).
        verdict: One of `VERDICTS`.
        reason: The reason of the verdict, in one sentence.
        notes: Further sentences worth knowing.
        moments: The settings in force at five steps of the run.
        curve: The same at 500 steps, for the picture.
    """

    settings: DecaySettings
    total_steps: int
    steps_per_epoch: float | None
    largest_share: float | None
    timescale: Duration | None
    half_life: Duration | None
    total_decay: float | None
    total_decay_lr_alone: float | None
    kept_share: float | None
    equilibrium: Equilibrium | None
    default_warmup_steps: float | None
    verdict: str
    reason: str
    notes: tuple[str, ...]
    moments: tuple[Moment, ...]
    curve: tuple[Moment, ...] = dataclasses.field(repr=False)

    def rows(self) -> list[tuple[str, str]]:
        """Return the report as pairs of a name and a text."""
        equilibrium = self.equilibrium
        rows = [
            ("removed by a step, at most", _number(self.largest_share)),
            ("timescale τ", _duration(self.timescale)),
            ("half-life of a weight", _duration(self.half_life)),
            ("total decay κ", _number(self.total_decay, 5)),
            ("kept of an initial weight", _percent(self.kept_share)),
        ]
        if equilibrium is not None:
            if equilibrium.rms is not None:
                approach = f", {equilibrium.approach:.0%} of the way there in squares"
                rows.append(("equilibrium RMS", _number(equilibrium.rms) + approach))
            if equilibrium.rotation_per_step is not None:
                rotation = f"{_number(equilibrium.rotation_per_step)} rad a step"
                rows.append(("equilibrium rotation", rotation))
            if equilibrium.weight_bound is not None:
                rows.append(("bound on a weight", _number(equilibrium.weight_bound)))
        if self.default_warmup_steps is not None:
            rows.append(("default warmup 2/(1 - β2)", f"{self.default_warmup_steps:,.0f} steps"))
        rows.append(("verdict", f"{self.verdict}. {self.reason}"))
        rows += [("note", note) for note in self.notes]
        return rows

    def title(self) -> str:
        """Return the settings in one line."""
        settings = self.settings
        cautious = ", cautious" if settings.cautious else ""
        name = f"{settings.name}: " if settings.name else ""
        return (
            f"{name}lr {settings.lr:g}, weight decay {settings.weight_decay:g} "
            f"({settings.decay_policy}{cautious}), {self.total_steps:,} steps"
        )

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        lines = [self.title(), *(f"  {name:<{width}}  {text}" for name, text in rows)]
        header = f"  {'step':>10}  {'lr':>10}  {'weight decay':>12}  {'removed':>10}"
        lines.append(header)
        lines += [
            f"  {moment.step:>10,.0f}  {moment.lr:>10.3g}  {moment.weight_decay:>12.3g}"
            f"  {_number(moment.share):>10}"
            for moment in self.moments
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, texts and numbers; what is infinite becomes None."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields.pop("curve")
        plain: dict[str, Any] = _plain(fields)
        return plain

    def to_json(self) -> str:
        """Return the forecast as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


@dataclass(frozen=True)
class RunForecast:
    """The forecasts of all parameter groups of an optimizer."""

    groups: tuple[DecayForecast, ...]

    def __str__(self) -> str:
        if len(self.groups) <= _FULL_REPORTS:
            return "\n\n".join(str(group) for group in self.groups)
        rows = [_COLUMNS, *(_row(group) for group in self.groups)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        reasons = {f"{group.verdict}: {group.reason}": None for group in self.groups}
        notes = {f"note: {note}": None for group in self.groups for note in group.notes}
        return "\n".join([*lines, "", *reasons, *notes])

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, lists, texts and numbers."""
        return {"groups": [group.to_dict() for group in self.groups]}

    def to_json(self) -> str:
        """Return the forecasts as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw learning rate, weight decay and removed share over the run.

        Args:
            path: File to write; its ending decides the format. None to return the figure only.
        """
        curves = [
            curve for number, group in enumerate(self.groups) for curve in _curves(group, number)
        ]
        figure = plot_curves(curves, title="Learning rate and decay over the run")
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def _row(group: DecayForecast) -> tuple[str, ...]:
    settings = group.settings
    return (
        settings.name,
        f"{settings.lr:g}",
        f"{settings.weight_decay:g}",
        _number(group.timescale.steps if group.timescale else None),
        _number(group.total_decay),
        _percent(group.kept_share),
        group.verdict,
    )


def _curves(group: DecayForecast, number: int) -> list[Curve]:
    label = group.settings.name or f"group {number}"
    steps = [moment.step for moment in group.curve]
    panels = {
        "learning rate": [moment.lr for moment in group.curve],
        "weight decay λ": [moment.weight_decay for moment in group.curve],
    }
    if group.total_decay is not None:
        panels["removed by a step"] = [moment.share or 0.0 for moment in group.curve]
        decayed, kept = 0.0, []
        stride = group.total_steps / len(steps)
        for moment in group.curve:
            decayed += (moment.share or 0.0) * stride
            kept.append(math.exp(-decayed))
        panels["kept of a weight"] = kept
    return [Curve(panel, label, steps, values) for panel, values in panels.items()]


def _plain(value: Any) -> Any:
    if isinstance(value, DecaySettings):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "not known"
    return f"{value:.{digits}g}" if math.isfinite(value) else "no limit"


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2%}"


def _duration(value: Duration | None) -> str:
    if value is None:
        return "not known"
    if not math.isfinite(value.steps):
        return "no limit"
    epochs = "" if value.epochs is None else f" = {value.epochs:,.4g} epochs"
    of_run = value.of_run
    share = f"{of_run:.1%} of the run" if of_run <= 1 else f"{of_run:,.3g} times the run"
    steps = f"{value.steps:,.0f}" if value.steps >= 10 else f"{value.steps:.2g}"
    return f"{steps} steps{epochs} = {share}"
