"""What a param group and a model must fulfil; every refusal names the parameter or the key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ebbtide.hyperparameters import as_pair
from ebbtide.notice import warn
from ebbtide.rules import Rule
from ebbtide.torch.ranks import local_of
from ebbtide.torch.tensors import FORMATS
from ebbtide.weight_decay import decay_share

__all__ = [
    "check_dtypes",
    "check_model",
    "completed",
    "listed",
    "name_duplicates",
    "names_of",
    "warn_of_lost_decay",
]

# θ·(1 - decay) equals θ for half of all float32 numbers below this share, and for all below half.
_LOST_IN_FLOAT32 = 2.0**-24


def listed(params: Any) -> Any:
    """Return the parameters as a list; hint at a generator that was used up.

    Raises:
        ValueError: There are none.
    """
    if isinstance(params, torch.Tensor | dict):
        return params
    items = list(params)
    if not items:
        raise ValueError(
            "optimizer got an empty parameter list (a generator such as model.parameters() can be "
            "read only once: was it used before?)"
        )
    return items


def completed(group: Mapping[str, Any], defaults: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """Return a copy of a group with the keys that are derived from others: policy, base_lr.

    Raises:
        ValueError: `decoupled_weight_decay` and `decay_policy` contradict each other.
    """
    group = dict(group)
    decoupled = group.get("decoupled_weight_decay")
    policy = group.get("decay_policy")
    if policy is None:
        default = defaults["decay_policy"]
        policy = default if decoupled is None else ("decoupled" if decoupled else "l2")
    elif decoupled is not None and decoupled != (policy != "l2"):
        raise ValueError(
            f"decoupled_weight_decay={decoupled} contradicts decay_policy={policy!r}; "
            "pass one of them"
        )
    group["decay_policy"] = policy
    if "betas" in group:
        group["betas"] = as_pair(group["betas"])
    if rule.name == "adam":
        group["decoupled_weight_decay"] = policy != "l2"
    if group.get("base_lr") is None:
        lr = group.get("lr", defaults["lr"])
        base_lr = defaults.get("base_lr")
        group["base_lr"] = _number(lr) if base_lr is None else base_lr
    return group


def _number(lr: Any) -> Any:
    """Return a tensor's number; whatever else it is, the group's check judges it."""
    return lr.detach().item() if isinstance(lr, torch.Tensor) and lr.numel() == 1 else lr


def names_of(group: Mapping[str, Any], index: int) -> list[str]:
    """Return what the parameters of a group are called in errors."""
    if "param_names" in group:
        return [str(name) for name in group["param_names"]]
    return [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]


def check_dtypes(group: Mapping[str, Any], index: int) -> None:
    """Refuse parameters that are not real or complex floating-point numbers of 16 bits or more.

    Those that a model keeps frozen pass, quantised weights for example: they get no gradient.
    """
    for name, param in zip(names_of(group, index), group["params"], strict=True):
        frozen = isinstance(param, torch.nn.Parameter) and not param.requires_grad
        if param.dtype not in FORMATS and not frozen:
            raise TypeError(f"parameter {name!r} has dtype {param.dtype}: it cannot be optimized")


def name_duplicates(groups: list[dict[str, Any]], group: Mapping[str, Any]) -> str:
    """List the parameters of a group that other groups have already."""
    mine = {id(param) for param in group["params"] if not isinstance(param, tuple)}
    mine |= {id(param[1]) for param in group["params"] if isinstance(param, tuple)}
    return ", ".join(
        name
        for index, other in enumerate(groups)
        for name, param in zip(names_of(other, index), other["params"], strict=True)
        if id(param) in mine
    )


def warn_of_lost_decay(group: Mapping[str, Any], index: int) -> None:
    """Warn where the decay of a step is lost in the rounding of float32.

    Args:
        group: With numbers for hyperparameters.
        index: Of the group.
    """
    share = decay_share(
        group["decay_policy"],
        lr=float(group["lr"]),
        base_lr=float(group["base_lr"]),
        weight_decay=float(group["weight_decay"]),
    )
    float32 = any(local_of(p).dtype in (torch.float32, torch.complex64) for p in group["params"])
    if float32 and 0 < share < _LOST_IN_FLOAT32:
        warn(
            f"weight decay of param group {index} removes {share:.3g} of a parameter in a step, "
            f"less than half a unit in the last place of float32 ({_LOST_IN_FLOAT32:.3g}): most of "
            "it is lost in rounding. Raise lr or weight_decay, or set weight_decay=0",
        )


def check_model(
    groups: list[dict[str, Any]],
    model: torch.nn.Module | Iterable[tuple[str, torch.Tensor]],
    *,
    partial: bool,
) -> None:
    """Compare the parameters of the groups with those of a model; see `Optimizer.check`."""
    found = model.named_parameters() if isinstance(model, torch.nn.Module) else model
    theirs = {id(param): (name, param) for name, param in found}
    mine = {
        id(param): name
        for index, group in enumerate(groups)
        for name, param in zip(names_of(group, index), group["params"], strict=True)
    }
    stale = [name for key, name in mine.items() if key not in theirs]
    missing = [
        name for key, (name, param) in theirs.items() if key not in mine and param.requires_grad
    ]
    problems = []
    if stale:
        problems.append(
            f"no longer in the model: {', '.join(stale)} (replaced after the optimizer was made, "
            "by load_state_dict(assign=True) for example: steps do not reach the new parameters)"
        )
    if missing and not partial:
        problems.append(f"in the model but not in the optimizer: {', '.join(missing)}")
    if problems:
        raise ValueError("; ".join(problems))
