"""What a param group may hold, checked at construction and whenever a group changes.

Messages keep torch's wording where torch has one, so that a script that matches on it still works.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from ebbtide.codecs import MASTER_FORMATS, STATE_FORMATS
from ebbtide.rules import Rule
from ebbtide.weight_decay import DECAY_POLICIES, decay_share

__all__ = [
    "NONFINITE_POLICIES",
    "OURS",
    "Options",
    "as_pair",
    "known_keys",
    "numbers",
    "validate_group",
    "validate_values",
]

NONFINITE_POLICIES = ("raise", "skip", "propagate")

# Group keys that torch's classes do not have, with the value a group from torch gets.
OURS: dict[str, Any] = {
    "decay_policy": None,
    "cautious": False,
    "base_lr": None,
    "bias_correction": True,
    "seed": 0,
    "state_format": None,
    "master_format": None,
}
_TORCH = ("lr", "weight_decay", "maximize", "foreach", "differentiable", "fused")
_ADAM = ("betas", "eps", "amsgrad", "capturable", "decoupled_weight_decay")
_SGD = ("momentum", "dampening", "nesterov")
_SWITCHES = (
    "maximize", "foreach", "differentiable", "fused", "amsgrad", "capturable", "nesterov",
    "cautious", "bias_correction", "decoupled_weight_decay",
)  # fmt: skip
# What may be a tensor; betas may hold two.
_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "dampening", "base_lr")
# What else is typed beside them.
_BESIDE = ("params", "param_names", "name", "names", "initial_lr")
# Written by schedulers; nobody types them, so nobody mistypes them.
_WRITTEN = (
    "initial_weight_decay", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr",
)  # fmt: skip

# By how much a schedule that ends at lr 0 may miss it: that of LinearLR does, by its rounding.
_MISSED_ZERO = 1e-12

# Other libraries' words.
_SYNONYMS = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "beta1": "betas",
    "beta2": "betas",
}


def known_keys(rule: Rule) -> tuple[str, ...]:
    """Return every group key that has a meaning for the rule."""
    own = _ADAM if rule.name == "adam" else _SGD
    return (*_TORCH, *own, *OURS, *_BESIDE, *_WRITTEN)


def as_pair(betas: Any) -> Any:
    """Return betas as a tuple where they are a sequence of a configuration library."""
    of_another = isinstance(betas, Sequence) and not isinstance(betas, tuple | list | str)
    return tuple(betas) if of_another else betas


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
    validate_values(rule, group, where, least_lr=-_MISSED_ZERO)
    lr = float(group["lr"])
    if lr < 0 and group["base_lr"] == lr:  # where no schedule has led it
        raise ValueError(f"Invalid learning rate: {lr}{where}")
    base_lr = _number(group, "base_lr", "base_lr", where)
    policy, weight_decay = group["decay_policy"], float(group["weight_decay"])
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


def validate_values(
    rule: Rule, group: Mapping[str, Any], where: str = "", *, least_lr: float = 0.0
) -> None:
    """Check each value by itself; what a constructor can say before it has seen a parameter.

    Args:
        rule: As `validate_group`, like those below.
        group: Hyperparameters by name.
        where: Put behind each message.
        least_lr: Least learning rate.

    Raises:
        ValueError, TypeError: As `validate_group`.
    """
    _number(group, "lr", "learning rate", where, least=least_lr)
    if rule.name == "adam":
        _number(group, "eps", "epsilon value", where)
        _check_betas(group["betas"], where)
    else:
        _check_momentum(group, where)
    _number(group, "weight_decay", "weight_decay value", where)
    policy = group["decay_policy"]
    if policy not in DECAY_POLICIES:
        raise ValueError(
            f"Invalid decay_policy: {policy!r}; one of {', '.join(DECAY_POLICIES)}{where}"
        )
    _check_flags(group, where)
    _check_formats(rule, group, where)


class Options:
    """What holds for a whole optimizer, checked whenever it is set.

    A step of a few µs reads `_nonfinite` and `_clip_grad_norm` themselves.
    """

    _nonfinite: str
    _clip_grad_norm: float | None

    @property
    def nonfinite(self) -> str:
        """What becomes of gradients that are not finite: `"raise"`, `"skip"`, `"propagate"`."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, nonfinite: str) -> None:
        if nonfinite not in NONFINITE_POLICIES:
            raise ValueError(
                f"Invalid nonfinite: {nonfinite!r}; one of {', '.join(NONFINITE_POLICIES)}"
            )
        self._nonfinite = nonfinite

    @property
    def clip_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to, if any."""
        return self._clip_grad_norm

    @clip_grad_norm.setter
    def clip_grad_norm(self, norm: float | None) -> None:
        if norm is not None and (isinstance(norm, str | bool) or not isinstance(norm, Real)):
            raise TypeError(
                f"Invalid clip_grad_norm: {norm!r} is a {type(norm).__name__}, not a number"
            )
        if norm is not None and not float(norm) > 0:
            raise ValueError(f"Invalid clip_grad_norm: {norm}; above 0, or None")
        self._clip_grad_norm = norm


def numbers(group: Mapping[str, Any], where: str = "") -> Mapping[str, Any]:
    """Return the group with one-element tensors as numbers; the group itself if it has none.

    Betas that are a sequence of a configuration library become a tuple.

    Raises:
        ValueError: A hyperparameter is a tensor of several elements.
    """
    found = {key: _item(key, group[key], where) for key in _NUMBERS if _is_tensor(group.get(key))}
    betas = as_pair(group.get("betas"))
    if betas is not group.get("betas"):
        found["betas"] = betas
    if isinstance(betas, tuple | list) and any(_is_tensor(beta) for beta in betas):
        found["betas"] = tuple(
            _item(f"betas[{i}]", beta, where) if _is_tensor(beta) else beta
            for i, beta in enumerate(betas)
        )
    return {**group, **found} if found else group


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "item") and getattr(value, "size", None) is not None


def _item(key: str, value: Any, where: str) -> Any:
    try:
        return (value.detach() if hasattr(value, "detach") else value).item()
    except (RuntimeError, ValueError):
        raise ValueError(f"Tensor {key} must be 1-element{where}") from None


def _number(
    group: Mapping[str, Any], key: str, what: str, where: str, *, least: float = 0.0
) -> float:
    value = group[key]
    if isinstance(value, str | bool) or not isinstance(value, Real):
        hint = f"; write {key}=float({value!r})" if isinstance(value, str) else ""
        raise TypeError(
            f"Invalid {what}: {value!r} is a {type(value).__name__}, not a number{hint}{where}"
        )
    if not least <= float(value) < math.inf:  # NaN compares false
        raise ValueError(f"Invalid {what}: {value}{where}")
    return float(value)


def _check_betas(betas: Any, where: str) -> None:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}{where}")
    for index, beta in enumerate(betas):
        if isinstance(beta, str | bool) or not isinstance(beta, Real):
            raise TypeError(
                f"Invalid beta parameter at index {index}: {beta!r} is a "
                f"{type(beta).__name__}, not a number{where}"
            )
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}{where}")


def _check_momentum(group: Mapping[str, Any], where: str) -> None:
    momentum = _number(group, "momentum", "momentum value", where)
    dampening = group["dampening"]
    if isinstance(dampening, str | bool) or not isinstance(dampening, Real):
        raise TypeError(
            f"Invalid dampening value: {dampening!r} is a {type(dampening).__name__}, not a "
            f"number{where}"
        )
    if not math.isfinite(dampening):
        raise ValueError(f"Invalid dampening value: {dampening}{where}")
    if group["nesterov"] and (momentum <= 0 or dampening != 0):
        raise ValueError(f"Nesterov momentum requires a momentum and zero dampening{where}")


def _check_flags(group: Mapping[str, Any], where: str) -> None:
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 53:
        raise ValueError(f"Invalid seed: {seed!r}; an integer from 0 to 2⁵³ - 1{where}")
    for key in _SWITCHES:
        if isinstance(group.get(key), str):  # "false" would be true
            raise TypeError(f"Invalid {key}: {group[key]!r} is a str, not a bool{where}")


def _check_formats(rule: Rule, group: Mapping[str, Any], where: str) -> None:
    for key, known in (("state_format", STATE_FORMATS), ("master_format", MASTER_FORMATS)):
        if group.get(key) not in (None, *known):
            raise ValueError(f"Invalid {key}: {group[key]!r}; one of {', '.join(known)}{where}")
    if rule.name == "sgd" and group.get("state_format") == "8bit":
        raise ValueError(
            "state_format='8bit' is for the two moments of Adam: momentum of SGD loses small "
            f"updates in eight bits; pass 'bfloat16' or 'float32'{where}"
        )


def _check_spelling(rule: Rule, group: Mapping[str, Any], where: str) -> None:
    known = known_keys(rule)
    typed = [key for key in known if key not in _WRITTEN]
    for key in group:
        if key in known or not isinstance(key, str):
            continue
        meant = _SYNONYMS.get(key.lower()) or next((k for k in typed if _nearly(key, k)), None)
        if meant in typed:
            raise ValueError(f"unknown group key {key!r}: did you mean {meant!r}?{where}")


def _nearly(key: str, known: str) -> bool:
    """Whether a key differs from a known one by case, separators or as little as a typo does."""
    key, known = (word.lower().replace("-", "_").replace(" ", "_") for word in (key, known))
    if key.replace("_", "") == known.replace("_", ""):
        return True
    # Two letters may be a word: base_wd is not base_lr, and initial_wd not initial_lr.
    short = len(known) < 8 or known.endswith("_lr")
    allowed = 0 if len(known) < 3 else 1 if short else 2
    return abs(len(key) - len(known)) <= allowed and _distance(key, known) <= allowed


def _distance(a: str, b: str) -> int:
    """Count insertions, deletions, replacements and swaps of neighbours that turn a into b."""
    above: list[int] = []
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, above, row = above, row, [i]
        for j, right in enumerate(b, 1):
            cost = min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right))
            if i > 1 and j > 1 and left == b[j - 2] and a[i - 2] == right:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
    return row[-1]
