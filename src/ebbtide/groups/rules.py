"""Rules of the user: a pattern for parameters, and the settings they get."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from ebbtide.groups.records import ParamInfo
from ebbtide.notice import warn

__all__ = ["GroupRule", "Pattern", "Rules", "check_number", "find_rules", "matches"]

Pattern: TypeAlias = str | re.Pattern[str] | type | Callable[[ParamInfo], bool]
Rules: TypeAlias = Mapping[Pattern, Mapping[str, Any]] | Iterable[tuple[Pattern, Mapping[str, Any]]]

_KEYS = (
    "name", "lr", "weight_decay", "betas", "eps", "amsgrad", "momentum", "dampening", "nesterov",
    "maximize", "decay_policy", "cautious", "base_lr", "bias_correction", "state_format",
    "master_format", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class GroupRule:
    """A pattern and the settings of the parameters it matches."""

    pattern: Pattern
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return _text(self.pattern)


def matches(pattern: Pattern, info: ParamInfo) -> bool:
    """Return whether a pattern matches a parameter.

    Args:
        pattern: A glob that matches one of its whole names, as `*.bias`; a compiled regular
            expression that is found in one of them; the class of a module it is in; or a function
            of the `ParamInfo`.
        info: The parameter.

    Example:
        >>> head = ParamInfo("head.weight", (10, 64))
        >>> matches("head.*", head), matches("head", head), matches(re.compile("ead"), head)
        (True, False, True)
    """
    if isinstance(pattern, str):
        return any(fnmatchcase(name, pattern) for name in info.names)
    if isinstance(pattern, re.Pattern):
        return any(pattern.search(name) for name in info.names)
    if isinstance(pattern, type):
        return f"{pattern.__module__}.{pattern.__qualname__}" in info.inside
    return bool(pattern(info))


def find_rules(rules: Rules | None, infos: Sequence[ParamInfo]) -> list[GroupRule | None]:
    """Return for each parameter the first rule that matches it.

    Raises:
        ValueError: A pattern matches nothing, or a setting has no meaning.
        TypeError: A rule is not a pattern with settings.
    """
    parsed = _parse(rules)
    matched = [[rule for rule in parsed if matches(rule.pattern, info)] for info in infos]
    useful = {id(rule) for found in matched for rule in found}
    for rule in parsed:
        if id(rule) not in useful:
            raise ValueError(f"the rule {rule} matches no parameter{_hint(rule.pattern, infos)}")
    winners = [found[0] if found else None for found in matched]
    winning = {id(rule) for rule in winners}
    for rule in parsed:
        if id(rule) not in winning:
            warn(f"the rule {rule} has no effect: earlier rules match all its parameters")
    return winners


def check_number(value: Any, name: str, where: str = "") -> float:
    """Return the value as a float; complain by name unless it is a finite number ≥ 0."""
    if isinstance(value, str | bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}{where}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value!r}{where}")
    return float(value)


def _parse(rules: Rules | None) -> list[GroupRule]:
    if rules is None:
        return []
    if isinstance(rules, str):
        raise TypeError(f"rules are pairs of a pattern and its settings, got {rules!r}")
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    return [_parse_one(pair) for pair in pairs]


def _parse_one(pair: Any) -> GroupRule:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Mapping):
        raise TypeError(
            "a rule is a pair of a pattern and a dictionary of settings, "
            f"as ('head.*', {{'weight_decay': 0}}), got {pair!r}"
        )
    pattern, settings = pair
    if not (isinstance(pattern, str | re.Pattern) or callable(pattern)):
        raise TypeError(
            "a pattern is a glob, a compiled regular expression, a module class or a function, "
            f"got {pattern!r}"
        )
    where = f" in the rule {_text(pattern)}"
    for key in settings:
        if key in _KEYS:
            continue
        close = difflib.get_close_matches(str(key), _KEYS, n=1, cutoff=0.7)
        hint = f": did you mean {close[0]!r}?" if close else f"; known are {', '.join(_KEYS)}"
        raise ValueError(f"unknown setting {key!r}{where}{hint}")
    checked = {
        key: check_number(settings[key], key, where)
        for key in ("lr", "weight_decay")
        if key in settings
    }
    return GroupRule(pattern, {**settings, **checked})


def _hint(pattern: Pattern, infos: Sequence[ParamInfo]) -> str:
    """Return what may have been meant, or which names there are."""
    names = [info.name for info in infos]
    if isinstance(pattern, type) and not any(info.owners for info in infos):
        return ": the class of a module needs the model, not its named parameters"
    if isinstance(pattern, str):
        inside = [name for name in names if fnmatchcase(name, f"*{pattern}*")]
        if inside:
            return f": a glob matches whole names, such as {inside[0]!r}"
        close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.6)
        if close:
            return f": did you mean {close[0]!r}?"
    shown = ", ".join(repr(name) for name in names[:3])
    return f"; the parameters are {shown}{', ...' if len(names) > 3 else ''}"


def _text(pattern: Pattern) -> str:
    if isinstance(pattern, re.Pattern):
        return f"re.compile({pattern.pattern!r})"
    return (
        repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
    )
