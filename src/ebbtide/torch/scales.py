"""The gradient scale √v̂ of an Adam that has run, from the optimizer or from its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ebbtide.torch.storage import is_coded, plain

__all__ = ["gradient_scales", "gradient_scales_of_file"]

# As many weights of a group are looked at; a percentile of that many is known to a percent.
_SAMPLES = 20_000


def gradient_scales(optimizer: torch.optim.Optimizer | Mapping[str, Any]) -> list[list[float]]:
    """Return √v̂ = √(v/(1 - β2ᵗ)) of up to about 20,000 weights of every group.

    `convert.adam_l2_to_adamw` takes the list of one group.

    Args:
        optimizer: An Adam that has stepped, or its `state_dict()`.

    Returns:
        A list for each group, empty where there is no second moment in plain numbers.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.Adam([weight], weight_decay=0.0)
        >>> weight.grad = torch.tensor([3.0, 0.5])
        >>> optimizer.step()
        >>> [round(scale, 4) for scale in gradient_scales(optimizer)[0]]
        [3.0, 0.5]
    """
    if isinstance(optimizer, Mapping):
        state, groups = optimizer["state"], optimizer["param_groups"]
    else:
        state, groups = optimizer.state, optimizer.param_groups
    return [
        _scales([state[key] for key in group["params"] if key in state], group) for group in groups
    ]


def gradient_scales_of_file(path: str | Path) -> list[list[float]]:
    """Return √v̂ of every group from a file that holds the `state_dict()` of an Adam.

    Args:
        path: File written by `torch.save`: the state itself, or a dictionary with it somewhere.

    Raises:
        ValueError: The file holds no such state, or its state no second moment.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"not a checkpoint of plain tensors ({type(error).__name__})") from error
    for candidate in _mappings(content):
        if "state" in candidate and "param_groups" in candidate:
            found = gradient_scales(candidate)
            if any(found):
                return [scales for scales in found if scales]
            raise ValueError("its optimizer state has no exp_avg_sq")
    raise ValueError("it holds no optimizer state (a dictionary with state and param_groups)")


def _mappings(content: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(content, Mapping):
        yield content
        for value in content.values():
            yield from _mappings(value)


def _scales(states: list[Mapping[str, Any]], group: Mapping[str, Any]) -> list[float]:
    seconds = [state for state in states if _has_second_moment(state)]
    total = sum(state.get("exp_avg_sq", state.get("exp_avg_sq_codes")).numel() for state in seconds)
    stride = max(1, total // _SAMPLES)
    found: list[float] = []
    for state in seconds:
        sampled = plain(state)["exp_avg_sq"].detach().flatten()[::stride].double()
        bias_correction2 = 1.0 - float(group["betas"][1]) ** float(state["step"])
        found += (sampled / bias_correction2).sqrt().tolist()
    return found


def _has_second_moment(state: Mapping[str, Any]) -> bool:
    if is_coded(state):
        return float(state["step"]) > 0
    exp_avg_sq = state.get("exp_avg_sq")
    return (
        isinstance(exp_avg_sq, torch.Tensor)
        and exp_avg_sq.is_floating_point()
        and float(state["step"]) > 0
    )
