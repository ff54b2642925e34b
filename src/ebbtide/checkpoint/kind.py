"""Whose state a checkpoint holds, told from its keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebbtide.rules import Rule

__all__ = ["kind_of", "lacking"]

# A state key, or a group key, that only one optimizer has. Torch's, then others'.
_TELLTALE = {
    "square_avg": "RMSprop or Adadelta",
    "exp_inf": "Adamax",
    "mu_product": "NAdam",
    "sum": "Adagrad",
    "ax": "ASGD",
    "prev": "Rprop",
    "old_dirs": "LBFGS",
    "exp_avg_sq_row": "Adafactor",
    "row_var": "Adafactor",
    "state1": "bitsandbytes",
    "rho": "Adadelta",
    "lr_decay": "Adagrad",
    "etas": "Rprop",
    "lambd": "ASGD",
    "momentum_decay": "NAdam",
    "tolerance_grad": "LBFGS",
}


def kind_of(state_dict: Mapping[str, Any]) -> str | None:
    """Name the optimizer that a state dict comes from.

    Returns:
        "Adam" (AdamW too), "SGD", another optimizer's name, or `None` if nothing tells.

    Example:
        >>> kind_of({"state": {0: {"momentum_buffer": [0.0]}}, "param_groups": []})
        'SGD'
    """
    states = [values for values in state_dict["state"].values() if isinstance(values, Mapping)]
    keys = {key for values in states for key, value in values.items() if value is not None}
    group_keys = {key for group in state_dict["param_groups"] for key in group}
    if "decay_policy" in group_keys:  # ours, whatever their owner keeps beside
        return "Adam" if "betas" in group_keys else "SGD"
    # A group of Adam or SGD may hold anything too: SAM's rho, a user's lr_decay.
    told = () if group_keys & {"amsgrad", "nesterov"} else sorted(group_keys)
    for telltale in (*keys, *told):
        if telltale in _TELLTALE:
            return _TELLTALE[telltale]
    if "decoupled_weight_decay" in group_keys and "amsgrad" not in group_keys:
        return "RAdam"  # whose state has Adam's keys
    if "exp_avg" in keys:
        lonely = "exp_avg_sq" not in keys and "eps" not in group_keys
        return "Lion or Muon" if lonely else "Adam"
    if "exp_avg_sq" in keys or "exp_avg_codes" in keys:
        return "Adam"
    if "momentum_buffer" in keys:
        return "Muon" if "ns_steps" in group_keys else "SGD"
    if "betas" in group_keys:
        return "Adam"
    return "SGD" if "momentum" in group_keys else None


def lacking(rule: Rule, group: Mapping[str, Any], saved: Iterable[str]) -> Sequence[str]:
    """Name the state keys that one parameter needs and the file does not have.

    A running maximum and a momentum buffer may begin later, so they are not needed.

    Args:
        rule: The update rule that will read the state.
        group: Hyperparameters it will read it with.
        saved: Keys with a value.
    """
    saved = {key.removesuffix("_codes") for key in saved}
    needed = [key for key in rule.state_keys(group) if key.startswith("exp_avg")]
    if rule.counts_steps:
        needed.insert(0, "step")
    return [key for key in needed if key not in saved]
