"""Sentences chosen by intervals: each says what the data allow, "no difference" among them."""

from __future__ import annotations

from collections.abc import Mapping

from ebbtide.lab.statistics import Interval

__all__ = ["advantages", "difference_words", "effects", "join", "range_words"]


def join(parts: list[str]) -> str:
    """Join phrases as a sentence would.

    Example:
        >>> join(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def range_words(interval: Interval, *, decimals: int = 1) -> str:
    """Write the two ends of an interval.

    Example:
        >>> range_words(Interval(0.1, -0.25, 0.5, 10))
        '-0.2 to 0.5'
    """
    return f"{interval.low:z.{decimals}f} to {interval.high:z.{decimals}f}"


def difference_words(interval: Interval, *, unit: str, decimals: int = 1) -> str:
    """Write a difference with its sign and interval.

    Example:
        >>> difference_words(Interval(4.81, 4.0, 5.5, 10), unit="points")
        '+4.8 points (4.0 to 5.5)'
    """
    return f"{interval.mean:+z.{decimals}f} {unit} ({range_words(interval, decimals=decimals)})"


def advantages(
    subject: str,
    quantity: str,
    differences: Mapping[str, Interval],
    *,
    unit: str,
    decimals: int = 1,
) -> str:
    """Say where a subject stands against others.

    Args:
        subject: Whose number is compared.
        quantity: What the number is.
        differences: Subject minus other, by the other's name.
        unit: Unit of the differences.
        decimals: Digits after the point.

    Example:
        >>> found = {"Adam + L2": Interval(4.8, 4.0, 5.5, 10), "SGD": Interval(0.1, -0.3, 0.5, 10)}
        >>> advantages("AdamW", "test accuracy", found, unit="points")
        "AdamW's test accuracy is 4.8 points above Adam + L2's (4.0 to 5.5); between AdamW and SGD \
(-0.3 to 0.5) no difference can be seen."
    """
    apart = [
        f"{abs(d.mean):.{decimals}f} {unit} {'above' if d.mean > 0 else 'below'} {name}'s "
        f"({_span(d, decimals)})"
        for name, d in differences.items()
        if d.excludes_zero
    ]
    level = [
        f"{name} ({range_words(d, decimals=decimals)})"
        for name, d in differences.items()
        if not d.excludes_zero
    ]
    sentences = [f"{subject}'s {quantity} is {join(apart)}"] if apart else []
    if level:
        opening = "between" if apart else "Between"
        sentences.append(f"{opening} {subject} and {join(level)} no difference can be seen")
    return "; ".join(sentences) + "."


def effects(
    cause: str, quantity: str, differences: Mapping[str, Interval], *, unit: str, decimals: int = 1
) -> str:
    """Say what one change did to each subject.

    Args:
        cause: What was changed, as the beginning of a sentence.
        quantity: What it may have changed.
        differences: With minus without the change, by subject.
        unit: Unit of the differences.
        decimals: Digits after the point.

    Example:
        >>> found = {"AdamW": Interval(4.8, 4.0, 5.5, 10), "Adam": Interval(0.1, -0.3, 0.5, 10)}
        >>> effects("Weight decay", "test accuracy", found, unit="points")
        'Weight decay raises the test accuracy of AdamW by 4.8 points (4.0 to 5.5); for Adam \
(-0.3 to 0.5) it makes no difference that can be seen.'
    """
    sentences: list[str] = []
    for verb, sign in (("raises", 1), ("lowers", -1)):
        changed = [
            f"{name} by {abs(d.mean):.{decimals}f} {unit} ({_span(d, decimals)})"
            for name, d in differences.items()
            if d.excludes_zero and d.mean * sign > 0
        ]
        if changed:
            opening = cause if not sentences else "it"
            sentences.append(f"{opening} {verb} the {quantity} of {join(changed)}")
    level = [
        f"{name} ({range_words(d, decimals=decimals)})"
        for name, d in differences.items()
        if not d.excludes_zero
    ]
    if level and sentences:
        sentences.append(f"for {join(level)} it makes no difference that can be seen")
    elif level:
        sentences.append(f"{cause} makes no difference that can be seen for {join(level)}")
    return "; ".join(sentences) + "."


def _span(interval: Interval, decimals: int) -> str:
    """Write an interval that excludes zero by its distances from zero."""
    near, far = sorted((abs(interval.low), abs(interval.high)))
    return f"{near:.{decimals}f} to {far:.{decimals}f}"
