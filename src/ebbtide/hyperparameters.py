"""What a param group may hold, checked at construction and whenever a group changes.

Messages keep torch's wording where torch has one, so that a script that matches on it still works.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

from ebbtide.rules import Rule, Scalars
from ebbtide.weight_decay import DECAY_POLICIES, decay_share, l2_coefficient

__all__ = ["NONFINITE_POLICIES", "OURS", "GroupReader", "known_keys", "numbers", "validate_group"]

NONFINITE_POLICIES = ("raise", "skip", "propagate")

# Group keys that torch's classes do not have, with the value a group from torch gets.
OURS: dict[str, Any] = {
    "decay_policy": None,
    "cautious": False,
    "base_lr": None,
    "bias_correction": True,
    "seed": 0,
}
_TORCH = ("lr", "weight_decay", "maximize", "foreach", "differentiable", "fused")
_ADAM = ("betas", "eps", "amsgrad", "capturable", "decoupled_weight_decay")
_SGD = ("momentum", "dampening", "nesterov")
# What a step depends on.
_READ = ("lr", "weight_decay", "decay_policy", "base_lr", "cautious", "maximize", "seed")
_READ_ADAM = ("betas", "eps", "bias_correction")
# Written by schedulers, or kept beside the groups.
_FOREIGN = (
    "params", "param_names", "name", "names", "initial_lr", "initial_weight_decay",
    "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "state_format", "master_format",
)  # fmt: skip


def known_keys(rule: Rule) -> tuple[str, ...]:
    """Return every group key that has a meaning for the rule."""
    own = _ADAM if rule.name == "adam" else _SGD
    return (*_TORCH, *own, *OURS, *_FOREIGN)


def validate_group(rule: Rule, group: Mapping[str, Any], where: str = "") -> None:
    """Check the values of one group; tensors must have been turned into numbers before.

    Args:
        rule: The update rule that will read the group.
        group: Hyperparameters by name.
        where: Put behind each message, such as `" (param group 1)"`.

    Raises:
        ValueError: A value is out of range, a word is not one of those admitted, or a key is
            nearly a known one.
        TypeError: A number is a string, a bool or something else.
    """
    lr = _number(group, "lr", "learning rate", where)
    weight_decay = _number(group, "weight_decay", "weight_decay value", where)
    if rule.name == "adam":
        _number(group, "eps", "epsilon value", where)
        _check_betas(group["betas"], where)
    else:
        _check_momentum(group, where)
    policy = group["decay_policy"]
    if policy not in DECAY_POLICIES:
        raise ValueError(
            f"Invalid decay_policy: {policy!r}; one of {', '.join(DECAY_POLICIES)}{where}"
        )
    base_lr = _number(group, "base_lr", "base_lr", where)
    if policy in ("independent", "corrected") and base_lr == 0:
        raise ValueError(
            f"base_lr is 0, and decay_policy={policy!r} divides by it: pass base_lr, the peak "
            f"learning rate{where}"
        )
    share = decay_share(policy, lr=lr, base_lr=base_lr, weight_decay=weight_decay)
    if share >= 1:
        raise ValueError(
            f"lr={lr:g} and weight_decay={weight_decay:g} would remove {share:g} of the parameter "
            f"in one step under decay_policy={policy!r}; the share must be below 1{where}"
        )
    _check_spelling(rule, group, where)


def numbers(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the group with one-element tensors as numbers; the group itself if it has none."""
    found = {key: value.item() for key, value in group.items() if _is_tensor(value)}
    if any(_is_tensor(beta) for beta in group.get("betas", ())):
        found["betas"] = tuple(float(beta) for beta in group["betas"])
    return {**group, **found} if found else group


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "item") and getattr(value, "size", None) is not None


class GroupReader:
    """Reads one group for a step; checks and prepares anew only when the group has changed.

    Args:
        rule: The update rule.
        where: Put behind each message, such as `" (param group 1)"`.
        decays: Whether the group's weight decay reaches these parameters.
    """

    def __init__(self, rule: Rule, where: str = "", *, decays: bool = True) -> None:
        self._rule = rule
        self._where = where
        self._decays = decays
        self._values = itemgetter(*_READ, *(_READ_ADAM if rule.name == "adam" else _SGD))
        self._seen: tuple[Any, ...] | None = None
        self._prepared: Callable[[int], Scalars] | None = None

    def read(self, group: Mapping[str, Any]) -> Callable[[int], Scalars]:
        """Return the function from step count to scalars (`Rule.prepare`).

        Raises:
            TypeError, ValueError: As `validate_group`.
        """
        values = (len(group), *self._values(group))
        if self._prepared is not None and self._seen == values:
            return self._prepared
        checked = numbers(group)
        validate_group(self._rule, checked, self._where)
        policy, weight_decay = checked["decay_policy"], float(checked["weight_decay"])
        if not self._decays:
            weight_decay = 0.0
        lr, base_lr = float(checked["lr"]), float(checked["base_lr"])
        decay = decay_share(policy, lr=lr, base_lr=base_lr, weight_decay=weight_decay)
        l2 = l2_coefficient(policy, weight_decay=weight_decay)
        self._prepared = self._rule.prepare(checked, decay, l2)
        # Tensors change in place, so they must be read in every step.
        self._seen = values if checked is group else None
        return self._prepared


def _number(group: Mapping[str, Any], key: str, what: str, where: str) -> float:
    value = group[key]
    if isinstance(value, str | bool) or not isinstance(value, int | float):
        hint = f"; write {key}=float({value!r})" if isinstance(value, str) else ""
        raise TypeError(
            f"Invalid {what}: {value!r} is a {type(value).__name__}, not a number{hint}{where}"
        )
    if not 0.0 <= value < math.inf:  # NaN compares false
        raise ValueError(f"Invalid {what}: {value}{where}")
    return float(value)


def _check_betas(betas: Any, where: str) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}{where}")
    for index, beta in enumerate(betas):
        if isinstance(beta, str | bool) or not isinstance(beta, int | float):
            raise TypeError(
                f"Invalid beta parameter at index {index}: {beta!r} is a "
                f"{type(beta).__name__}, not a number{where}"
            )
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}{where}")


def _check_momentum(group: Mapping[str, Any], where: str) -> None:
    momentum = _number(group, "momentum", "momentum value", where)
    dampening = group["dampening"]
    if isinstance(dampening, str | bool) or not math.isfinite(dampening):
        raise ValueError(f"Invalid dampening value: {dampening!r}{where}")
    if group["nesterov"] and (momentum <= 0 or dampening != 0):
        raise ValueError(f"Nesterov momentum requires a momentum and zero dampening{where}")


def _check_spelling(rule: Rule, group: Mapping[str, Any], where: str) -> None:
    known = known_keys(rule)
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            raise ValueError(f"unknown group key {key!r}: did you mean {close[0]!r}?{where}")
