"""A state dict as one flat mapping of arrays, and back: for `.npz` and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["flatten", "unflatten"]

GROUPS = "param_groups"


def flatten(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a state dict out flat: arrays by "NAME/KEY", the groups as JSON under "param_groups".

    Works on the state dicts of both faces and of `torch.optim`. The arrays are those of the state
    dict, not copies, except where they do not lie row by row.

    Args:
        state_dict: From `Optimizer.state_dict`.

    Returns:
        A mapping that `numpy.savez(file, **flat)` writes. safetensors wants the text apart:
        `save_file(flat, path, metadata={"param_groups": flat.pop("param_groups")})`.

    Raises:
        ValueError: The state holds something that is no array.

    Example:
        >>> group = {"lr": 0.1, "betas": (0.9, 0.999), "params": [0], "param_names": ["w"]}
        >>> flat = flatten({"state": {0: {"exp_avg": [1.0]}}, "param_groups": [group]})
        >>> list(flat)
        ['w/exp_avg', 'param_groups']
        >>> unflatten(flat)["param_groups"][0]["betas"]
        (0.9, 0.999)
    """
    groups = [dict(group) for group in state_dict["param_groups"]]
    names = _names(groups)
    flat: dict[str, Any] = {}
    for index, values in state_dict["state"].items():
        if not isinstance(values, Mapping):
            raise ValueError(f"state {index!r} belongs to no parameter: it cannot be laid out flat")
        flat |= {
            f"{names[index]}/{key}": _in_row_order(value)
            for key, value in values.items()
            if value is not None
        }
    return {**flat, GROUPS: json.dumps(groups, default=_number)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Put a mapping of `flatten` together again.

    Args:
        flat: What `flatten` gave, `numpy.load` of an `.npz` file, or the tensors of a safetensors
            file with its metadata entry "param_groups".

    Raises:
        ValueError: An array belongs to no parameter of the groups, or there are no groups.
    """
    if GROUPS not in flat:
        raise ValueError('there is no entry "param_groups": this was not written by flatten()')
    groups = [
        {key: _restored(key, value) for key, value in group.items()}
        for group in json.loads(str(flat[GROUPS]))
    ]
    index_of = {name: index for index, name in _names(groups).items()}
    state: dict[Any, dict[str, Any]] = {}
    for entry in flat:
        if entry == GROUPS:
            continue
        name, _, key = entry.rpartition("/")
        if name not in index_of:
            raise ValueError(f"array {entry!r} belongs to no parameter of the groups")
        state.setdefault(index_of[name], {})[key] = flat[entry]
    return {"state": state, "param_groups": groups}


def _names(groups: list[dict[str, Any]]) -> dict[Any, str]:
    return {
        index: str(name)
        for group in groups
        for index, name in zip(
            group["params"], group.get("param_names", group["params"]), strict=True
        )
    }


def _in_row_order(value: Any) -> Any:
    """Return an array whose memory is its elements row by row.

    safetensors 0.8 writes NumPy memory as it lies: from Fortran order it makes another array.
    """
    flags = getattr(value, "flags", None)
    if flags is not None:
        return value if flags["C_CONTIGUOUS"] else value.copy(order="C")
    return value.contiguous() if hasattr(value, "contiguous") else value


def _number(value: Any) -> Any:
    """Turn an array or tensor of one element into a number, for JSON."""
    return value.item()


def _restored(key: str, value: Any) -> Any:
    return (
        tuple(value) if isinstance(value, list) and key not in ("params", "param_names") else value
    )
