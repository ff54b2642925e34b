"""The axes of a sweep: what the options say, an optimizer at a time.

The second axis is the weight decay itself, or one of two combinations of it with the lr along
which the best settings may move less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from ebbtide.lab.errors import InputError
from ebbtide.lab.grid import parse_grid
from ebbtide.lab.optimizers import OPTIMIZERS

__all__ = ["AXES", "axis_points", "axis_value", "check_timescale", "split_optimizers"]

AXES = {"weight_decay": "weight decay", "ratio": "weight decay / lr", "timescale": "timescale"}
"""What the second axis can be, and its name in a picture."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*")
_L2_OPTIMIZERS = ("adam", "sgd")


def split_optimizers(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, each once and in the order given.

    Names that Ebbtide does not know are the function's own affair.

    Raises:
        InputError: There is no name, or one that cannot stand in an option.

    Example:
        >>> split_optimizers("AdamW, sgdw, Lion")
        ('adamw', 'sgdw', 'Lion')
    """
    names = [_name(name) for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("no optimizer named")
    for name in names:
        if not _NAME.fullmatch(name):
            raise InputError(f"{name!r} is no name of an optimizer")
    return tuple(dict.fromkeys(names))


def _name(text: str) -> str:
    """Return a name as the sweep knows it: those of Ebbtide in small letters."""
    name = text.strip()
    return name.lower() if name.lower() in OPTIMIZERS else name


def axis_points(
    options: Sequence[str], optimizers: Sequence[str], *, name: str, option: str, sampled: bool
) -> Mapping[str, tuple[float, ...]]:
    """Return the points of an axis for each optimizer.

    Args:
        options: `GRID` for all optimizers, `OPTIMIZER=GRID` for one.
        optimizers: Those of the sweep.
        name: What the axis is, for messages.
        option: What it is called on the command line.
        sampled: Whether points are drawn from a range, of which only the two ends are returned.

    Raises:
        InputError: A grid cannot be read, names another optimizer, or is missing.

    Example:
        >>> axis_points(["1e-3,1e-2", "sgd=0.1"], ["adamw", "sgd"], name="lr", option="--lr",
        ...             sampled=False)
        {'adamw': (0.001, 0.01), 'sgd': (0.1,)}
    """
    found: dict[str, tuple[float, ...]] = {}
    for text in options:
        named, equals, grid = text.rpartition("=")
        optimizer = _name(named)
        if equals and optimizer not in optimizers:
            raise InputError(
                f"{option} {text!r} is for an optimizer that --optimizer does not name"
            )
        if optimizer in found:
            raise InputError(f"{option} is given twice for {optimizer or 'all'}: write one grid")
        found[optimizer] = _points(grid, name, sampled)
    missing = [optimizer for optimizer in optimizers if optimizer not in found]
    if missing and "" not in found:
        raise InputError(f"{option} says nothing for {missing[0]}")
    return {optimizer: found.get(optimizer) or found[""] for optimizer in optimizers}


def axis_value(axis: str, lr: float, value: float) -> float:
    """Return the weight decay at a point of the second axis.

        weight_decay  λ = y
        ratio         λ = y·lr
        timescale     λ = 1/(lr·y), so that 1/(lr·λ) is y steps

    Example:
        >>> axis_value("ratio", 1e-3, 100.0), axis_value("timescale", 1e-3, 10_000.0)
        (0.1, 0.1)
    """
    if axis == "weight_decay":
        return value
    product = lr * value if axis == "ratio" else 1 / (lr * value)
    # Twelve digits, so that it reads 0.1 and not 0.10000000000000002.
    return float(f"{product:.12g}")


def check_timescale(optimizers: Sequence[str]) -> None:
    """Refuse a timescale for optimizers that have none.

    Raises:
        InputError: One of them adds its decay to the gradient.
    """
    for optimizer in optimizers:
        if optimizer in _L2_OPTIMIZERS:
            raise InputError(
                f"{optimizer} adds its weight decay to the gradient and so has no timescale "
                "1/(lr·λ); sweep --weight-decay or --ratio, or take adamw or sgdw"
            )


def _points(text: str, name: str, sampled: bool) -> tuple[float, ...]:
    if not sampled:
        return parse_grid(text, name=name, allow_zero=name == AXES["weight_decay"])
    low_text, dots, rest = text.partition("..")
    try:
        low, high = float(low_text), float(rest.partition(":")[0] if dots else low_text)
    except ValueError:
        raise InputError(f"the {name} range {text!r} is not of the form low..high") from None
    if not 0 < low <= high < math.inf:
        raise InputError(f"the {name} range {text!r} must run from above 0 to something larger")
    return low, high
