"""What a param group may hold, checked at construction and whenever a group changes.

Messages keep torch's wording where torch has one, so that a script that matches on it still works.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from ebbtide.rules import Rule
from ebbtide.weight_decay import DECAY_POLICIES, decay_share

__all__ = ["NONFINITE_POLICIES", "OURS", "known_keys", "signature", "validate_group"]

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
# Written by torch's schedulers, or kept beside the groups.
_FOREIGN = (
    "params", "param_names", "name", "names", "initial_lr", "max_lr", "min_lr", "max_momentum",
    "base_momentum", "swa_lr", "state_format", "master_format",
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


def signature(rule: Rule, group: Mapping[str, Any]) -> tuple[object, ...]:
    """Return what `validate_group` looks at, to see cheaply whether a group has changed."""
    own = ("betas", "eps") if rule.name == "adam" else _SGD
    keys = ("lr", "weight_decay", "decay_policy", "base_lr", *own)
    return (len(group), *[group[key] for key in keys])


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
