"""What a checkpoint holds, for `ebbtide inspect`: plain numbers and words, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ebbtide.checkpoint.kind import kind_of
from ebbtide.checkpoint.match import saved_slots

__all__ = ["Facts", "find_states", "summarize"]


class Facts(NamedTuple):
    """What is told of one array.

    Attributes:
        shape: Extent of each dimension.
        dtype: Name of the element type.
        bytes: Of memory.
        problem: What is wrong with the values, such as "2 NaN", or empty.
        value: The number, where there is one element.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    problem: str = ""
    value: float | None = None


def find_states(content: Any, where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Find the optimizers' state dicts in whatever a file holds, with the path to each.

    Example:
        >>> content = {"epoch": 3, "optimizers": [{"state": {}, "param_groups": []}]}
        >>> [where for where, _ in find_states(content)]
        ['optimizers.0']
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("state"), Mapping) and isinstance(
            content.get("param_groups"), list
        ):
            yield where, content
            return
        entries = list(content.items())
    elif isinstance(content, list | tuple):
        entries = list(enumerate(content))
    else:
        return
    for key, value in entries:
        yield from find_states(value, f"{where}.{key}" if where else str(key))


def summarize(
    state_dict: Mapping[str, Any], facts_of: Callable[[str, Any], Facts | None]
) -> dict[str, Any]:
    """Describe an optimizer's state dict.

    Args:
        state_dict: `state` and `param_groups`, as torch arranges them.
        facts_of: Tells the facts of a state value, given its key; `None` for what is no array.

    Returns:
        `kind`, `groups` (hyperparameters and number of parameters), `parameters` (name, group,
        step, state arrays), `bytes`, `steps` (least and most), `problems`.
    """
    parameters: list[dict[str, Any]] = []
    problems: list[str] = []
    for slot in saved_slots(state_dict):
        name = slot.name if slot.name is not None else str(slot.index)
        values = state_dict["state"].get(slot.index) or {}
        arrays, step = {}, None
        for key, value in values.items():
            facts = facts_of(key, value)
            if facts is None:
                continue
            if key == "step":
                step = facts.value
                if step is not None and step < 0:
                    problems.append(f"{name}: has taken {step:g} steps")
            arrays[key] = {"shape": list(facts.shape), "dtype": facts.dtype, "bytes": facts.bytes}
            if facts.problem:
                problems.append(f"{name}: {key} holds {facts.problem}")
        parameters.append({"name": name, "group": slot.group, "step": step, "state": arrays})
    counted = [each["step"] for each in parameters if each["step"] is not None]
    return {
        "kind": kind_of(state_dict),
        "groups": [_group(group) for group in state_dict["param_groups"]],
        "parameters": parameters,
        "bytes": sum(a["bytes"] for each in parameters for a in each["state"].values()),
        "steps": [min(counted), max(counted)] if counted else None,
        "problems": problems,
    }


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")
    }
    return {"parameters": len(group["params"]), "named": "param_names" in group, **settings}


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
