"""Reads the hyperparameters of a param group for a step, anew only when the group has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from ebbtide.hyperparameters import numbers, validate_group
from ebbtide.notice import warn
from ebbtide.rules import Recipe, Rule
from ebbtide.weight_decay import decay_share, l2_coefficient

__all__ = ["GroupReader", "Lasting"]

# What a step depends on.
_READ = ("lr", "weight_decay", "decay_policy", "base_lr", "cautious", "maximize", "seed")
_READ_ADAM = ("betas", "eps", "bias_correction", "amsgrad")
_READ_SGD = ("momentum", "dampening", "nesterov")
_BETAS = len(_READ)  # where they are among what is read


class Lasting(NamedTuple):
    """What was read of a group, and for how long it holds.

    Attributes:
        recipe: What the scalars are computed from.
        steady: Whether that holds as long as the group's values are the same objects.
        decay_per_lr: What the learning rate is multiplied by to give the share that decays; NaN
            where it is not as simple. With it a learning rate may change without reading anew.
    """

    recipe: Recipe
    steady: bool
    decay_per_lr: float


class GroupReader:
    """Reads one group for a step; checks and prepares anew only when the group has changed.

    Args:
        rule: The update rule.
        where: Put behind each message, such as `" (param group 1)"`.
        decays: Whether the group's weight decay reaches these parameters.
        watch: Further keys that decide how the group is stepped.
        restructured: Called when one of those, or which state there is, has changed.

    Attributes:
        structure: What all that was when the group was last checked.
    """

    def __init__(
        self,
        rule: Rule,
        where: str = "",
        *,
        decays: bool = True,
        watch: tuple[str, ...] = (),
        restructured: Callable[[], None] | None = None,
    ) -> None:
        self._rule = rule
        self._where = where
        self._decays = decays
        self._watch = watch
        self._restructured = restructured
        own = _READ_ADAM if rule.name == "adam" else _READ_SGD
        self._items = itemgetter(*_READ, *own, *watch)
        self._seen: tuple[Any, ...] | None = None
        self._checked: tuple[Any, ...] | None = None
        self.structure: tuple[Any, ...] | None = None
        self._prepared: Recipe | None = None
        self._warned = False

    def read(self, group: Mapping[str, Any]) -> Recipe:
        """Return what gives the scalars of the group's steps (`Rule.prepare`).

        Raises:
            TypeError, ValueError: As `validate_group`.
        """
        values = self._values(group)
        if self._prepared is not None and _same(self._seen, values):
            return self._prepared
        known = self._prepared if self._rates_alone(values) else None
        checked = group if known is not None else self._check(group, values)
        policy, weight_decay = checked["decay_policy"], float(checked["weight_decay"])
        if not self._decays:
            weight_decay = 0.0
        lr, base_lr = float(checked["lr"]), float(checked["base_lr"])
        decay = decay_share(policy, lr=lr, base_lr=base_lr, weight_decay=weight_decay)
        l2 = l2_coefficient(policy, weight_decay=weight_decay)
        if known is not None:
            self._prepared = known.at_rates(lr, decay, l2)
        else:
            self._prepared = self._rule.prepare(checked, decay, l2)
        # Tensors change in place, so they must be read in every step.
        self._seen = values if checked is group else None
        return self._prepared

    def read_lastingly(self, group: Mapping[str, Any]) -> Lasting:
        """Read the group, and tell how long that lasts."""
        recipe = self.read(group)
        steady = self._seen is not None and type(group) is dict
        steady = steady and not isinstance(group.get("betas"), list)
        policy, decay_per_lr = group["decay_policy"], math.nan
        if policy == "l2" or not self._decays:
            decay_per_lr = 0.0
        elif policy == "decoupled" and steady:
            decay_per_lr = float(group["weight_decay"])
        return Lasting(recipe, steady, decay_per_lr)

    def _values(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        values = (*self._items(group), len(group))
        betas = values[_BETAS]
        if isinstance(betas, tuple | list):  # a list may change in place, a tensor take a place
            values = (*values[:_BETAS], *betas, *values[_BETAS + 1 :])
        return values

    def _rates_alone(self, values: tuple[Any, ...]) -> bool:
        """Whether only lr and weight decay have changed, to plain numbers that are in range.

        A schedule changes nothing else, in every step of every group; the whole check would
        take longer than the step of a small model.
        """
        seen = self._seen
        if seen is None or not _same(seen[2:], values[2:]):
            return False
        lr, weight_decay, policy = values[:3]
        if not (type(lr) is float is type(weight_decay)) or policy not in ("l2", "decoupled"):
            return False
        share = lr * weight_decay if policy == "decoupled" else 0.0
        if not (0.0 <= lr < math.inf and 0.0 <= weight_decay < math.inf and share < 1.0):
            return False
        self._checked = values
        return True

    def check(self, group: Mapping[str, Any]) -> None:
        """Check the group if it has changed, without reading tensors that were checked before."""
        values = self._values(group)
        if not _same(self._checked, values):
            self._check(group, values)

    def _check(self, group: Mapping[str, Any], values: tuple[Any, ...]) -> Mapping[str, Any]:
        checked = numbers(group, self._where)
        if checked is group and _same(self._checked, values):  # a tensor may hold another number
            return checked
        validate_group(self._rule, checked, self._where)
        flags = [group[key] for key in self._watch]
        structure = (self._rule.state_keys(checked), checked is group, *flags)
        if self.structure not in (None, structure) and self._restructured is not None:
            self._restructured()
        self.structure, self._checked = structure, values
        self._warn_of_peak(checked)
        return checked

    def _warn_of_peak(self, group: Mapping[str, Any]) -> None:
        """Warn once where OneCycleLR's peak is not what the decay is relative to."""
        peak = group.get("max_lr")
        needs = group["decay_policy"] in ("independent", "corrected")
        if needs and not self._warned and isinstance(peak, float) and peak != group["base_lr"]:
            self._warned = True
            warn(
                f"decay_policy={group['decay_policy']!r} is relative to base_lr="
                f"{group['base_lr']:g}, but a schedule's max_lr is {peak:g}{self._where}; if that "
                "is the peak, pass base_lr=max_lr to the optimizer",
            )


def _same(old: tuple[Any, ...] | None, new: tuple[Any, ...]) -> bool:
    """Tell whether all is equal and of the same type: a tensor of equal value will change."""
    try:
        return old is not None and old == new and [*map(type, old)] == [*map(type, new)]
    except (RuntimeError, ValueError):  # a tensor of several elements has no truth
        return False
