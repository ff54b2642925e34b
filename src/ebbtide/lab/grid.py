"""Read the values of a grid from the few characters a command line has room for."""

from __future__ import annotations

import math

from ebbtide.lab.errors import InputError

__all__ = ["format_value", "parse_grid"]

_MOST_POINTS = 1000


def parse_grid(text: str, *, name: str, allow_zero: bool = False) -> tuple[float, ...]:
    """Read a comma-separated list of numbers and ranges.

    A range `low..high:n` holds n points at equal ratios, both ends included.

    Args:
        text: What the user typed.
        name: What the grid is of, for the error message.
        allow_zero: Whether 0 may be a point; it makes sense for a weight decay, not for an lr.

    Returns:
        The points in increasing order, each once.

    Raises:
        InputError: A part is no number or range, a point is negative or not finite, or there
            is no point at all.

    Example:
        >>> parse_grid("0, 1e-3..1e-1:3", name="weight decay", allow_zero=True)
        (0.0, 0.001, 0.01, 0.1)
    """
    points: set[float] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        points.update(_parse_item(item, name))
    if not points:
        raise InputError(f"the {name} grid {text!r} has no point")
    for point in points:
        if not math.isfinite(point) or point < 0 or (point == 0 and not allow_zero):
            bound = "0 or more" if allow_zero else "more than 0"
            raise InputError(f"the {name} grid {text!r} holds {point:g}; it must be {bound}")
    return tuple(sorted(points))


def format_value(value: float) -> str:
    """Write a grid point with two significant digits, as short as that goes.

    Example:
        >>> [format_value(value) for value in (0.0, 0.00031622, 0.01, 0.3, 10.0, 250.0)]
        ['0', '3.2e-4', '0.01', '0.3', '10', '250']
    """
    if value == 0 or 0.01 <= value < 1000:
        return f"{value:.2g}" if value < 100 else f"{value:.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _parse_item(item: str, name: str) -> list[float]:
    if ".." not in item:
        return [_parse_number(item, item, name)]
    low_text, _, rest = item.partition("..")
    high_text, colon, count_text = rest.partition(":")
    low, high = _parse_number(low_text, item, name), _parse_number(high_text, item, name)
    if not colon or not count_text.strip().isdecimal():
        raise InputError(f"the {name} range {item!r} says no number of points; write low..high:7")
    count = int(count_text)
    if not (0 < low < high and math.isfinite(high)):
        raise InputError(f"the {name} range {item!r} must run from above 0 to something larger")
    if not 2 <= count <= _MOST_POINTS:
        raise InputError(f"the {name} range {item!r} must have 2 to {_MOST_POINTS} points")
    return _geometric(low, high, count)


def _geometric(low: float, high: float, count: int) -> list[float]:
    # Twelve digits, so that 1e-3..1e-1:3 gives 0.01 and not 0.010000000000000002.
    inner = [low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1)]
    return [low, *(float(f"{value:.12g}") for value in inner), high]


def _parse_number(text: str, item: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{item!r} in the {name} grid is no number and no range") from None
