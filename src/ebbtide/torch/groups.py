"""Parameter groups of a torch model, and the table that explains them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from ebbtide.groups import (
    Assignment,
    Grouping,
    GroupTable,
    ParamInfo,
    ParamRow,
    Rules,
    assign,
    is_embedding,
    is_embedding_of_group,
    master_format_for,
    moments_of_group,
    param_state_bytes,
    standard_rule,
    state_format_for,
)
from ebbtide.torch.walk import find_parameters, info_of_tensor

__all__ = ["ParamGroups", "explain_groups", "param_groups"]

NamedParameters: TypeAlias = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]


class ParamGroups(list[dict[str, Any]]):
    """The groups, a list that any optimizer takes, with the reasons that `explain` shows.

    Attributes:
        assignments: Of every parameter, frozen ones included, in the order of the model.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], assignments: Sequence[Assignment] = ()
    ) -> None:
        super().__init__(groups)
        self.assignments = tuple(assignments)

    def __str__(self) -> str:
        return str(explain_groups(self))


def param_groups(
    model: nn.Module | NamedParameters,
    weight_decay: float,
    *,
    lr: float | None = None,
    rules: Rules | None = None,
    layer_decay: float | None = None,
    layers: Sequence[str] | None = None,
    embeddings: str = "decay",
    standard: bool = True,
) -> ParamGroups:
    """Split the parameters of a model into groups, so that decay reaches what it should.

    The weights of linear maps decay: matrices, convolution kernels, embeddings unless told
    otherwise. Norms, biases, gains and all tensors below two dimensions do not, nor what the
    model's own `no_weight_decay()` names. The groups, one for each distinct setting, go to
    `ebbtide.torch` or `torch.optim`; `print(groups)` shows every parameter with its reason.

    Args:
        model: The model, wrapped or not, or its named parameters; with names alone, their words
            and the shapes decide. Parameters that require no gradient are left out.
        weight_decay: For the parameters that decay; at least 0.
        lr: Put into each group, scaled by `layer_decay`; None leaves it to the optimizer.
        rules: Pairs of a pattern and a dictionary of settings, before the standard rule; the first
            match wins. A pattern is a glob on whole names, a compiled regular expression, the
            class of a module, or a function of a `ParamInfo`. Without `weight_decay` among the
            settings the standard rule decides on that; `name` names the group.
        layer_decay: Factor in (0, 1] on the learning rate for each layer below the top.
        layers: Globs of the layers from the bottom to the top, where names do not tell.
        embeddings: `"decay"` or `"no_decay"`, learned positions and tokens included.
        standard: Whether the standard rule decides what the rules leave open; False makes that an
            error.

    Returns:
        Groups with `params`, pairs of a name and a tensor; `weight_decay`; `name`; `embeddings`,
        the names of its embeddings joined by commas; `lr` and other settings where they are set.

    Raises:
        ValueError: A pattern matches nothing, nothing matches a parameter, a parameter is there
            twice, or a value has no meaning.
        TypeError: What is given is no model and has no names.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        >>> for group in param_groups(model, weight_decay=0.1):
        ...     print(group["name"], group["weight_decay"], [name for name, _ in group["params"]])
        decay 0.1 ['0.weight', '2.weight']
        no_decay 0.0 ['0.bias', '1.weight', '1.bias', '2.bias']
    """
    found = find_parameters(model)
    grouping = Grouping(weight_decay, lr, rules, layer_decay, layers, embeddings, standard)
    assignments = assign([info for info, _ in found], grouping)
    members: dict[str, list[tuple[Assignment, torch.Tensor]]] = {}
    for assignment, (_, tensor) in zip(assignments, found, strict=True):
        if not assignment.info.frozen:
            members.setdefault(assignment.group, []).append((assignment, tensor))
    # What decays comes first, layer by layer from the bottom where there are layers.
    order = sorted(members, key=lambda name: (_lr(members[name]), not members[name][0][0].decays))
    return ParamGroups([_group(name, members[name]) for name in order], assignments)


def explain_groups(groups: Any, model: nn.Module | NamedParameters | None = None) -> GroupTable:
    """Return every parameter with its group, the weight decay in force and the reason.

    Args:
        groups: From `param_groups`, the `param_groups` of any optimizer, or the optimizer. Of the
            last two only names and shapes are known, unless the model is given.
        model: The model, for reasons by its modules, for frozen and tied parameters and for those
            that are in no group.

    Returns:
        A table that prints itself, with `to_json()` and `decayed_below_2d`.

    Example:
        >>> norm = nn.LayerNorm(4)
        >>> print(explain_groups(param_groups(nn.Sequential(nn.Linear(3, 4), norm), 0.1)))
        parameter  shape  group     decay  reason            state
        ─────────  ─────  ────────  ─────  ────────────────  ─────────────
        0.weight   4×3    decay     0.1    2-D               float32 100 B
        0.bias     4      no_decay  0      bias              float32 36 B
        1.weight   4      no_decay  0      norm (LayerNorm)  float32 36 B
        1.bias     4      no_decay  0      norm (LayerNorm)  float32 36 B
        <BLANKLINE>
        decay     weight decay 0.1: 1 tensor, 12 elements, state 100 B
        no_decay  weight decay 0: 3 tensors, 12 elements, state 108 B
        all       state 208 B
        decayed below 2-D: none
    """
    groups = getattr(groups, "param_groups", groups)
    if not (isinstance(groups, Sequence) and all(isinstance(group, Mapping) for group in groups)):
        raise TypeError(
            "explain takes an optimizer or what param_groups returned, got "
            f"{type(groups).__name__}; of a model: explain(param_groups(model, weight_decay=...))"
        )
    known = {assignment.info.name: assignment for assignment in getattr(groups, "assignments", ())}
    in_model = {id(tensor): info for info, tensor in find_parameters(model)} if model else {}
    rows: dict[str, ParamRow] = {}
    grouped: set[int] = set()
    for index, group in enumerate(groups):
        label = str(group.get("name", f"group {index}"))
        for name, tensor in _named(group, index):
            grouped.add(id(tensor))
            info = in_model.get(id(tensor)) or _info(name, tensor, known)
            rows[info.name] = (
                _row_without_group(info)
                if info.frozen
                else _row(info, group, label, known.get(info.name))
            )
    left_out = [info for key, info in in_model.items() if key not in grouped]
    left_out += [a.info for a in known.values() if a.info.frozen and not in_model]
    for info in left_out:
        rows.setdefault(info.name, _row_without_group(info))
    order = [info.name for info in in_model.values()] or list(known)
    places = {name: place for place, name in enumerate(order)}
    return GroupTable(
        rows=tuple(sorted(rows.values(), key=lambda row: places.get(row.name, len(places)))),
        missing=tuple(info.name for info in left_out if not info.frozen),
    )


def _lr(members: Sequence[tuple[Assignment, torch.Tensor]]) -> float:
    return float(members[0][0].settings.get("lr", 0.0))


def _group(name: str, members: Sequence[tuple[Assignment, torch.Tensor]]) -> dict[str, Any]:
    # Plain texts and numbers only: distributed checkpoints store a group's values beside each of
    # its parameters.
    embeddings = [a.info.name for a, _ in members if is_embedding(a.info)]
    return {
        "params": [(assignment.info.name, tensor) for assignment, tensor in members],
        **members[0][0].settings,
        "name": name,
        "embeddings": ",".join(embeddings),
    }


def _named(group: Mapping[str, Any], index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of a group, before or after an optimizer took it."""
    params = group["params"]
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    names = group.get("param_names") or [f"{index}.{place}" for place in range(len(params))]
    for name, param in zip(names, params, strict=True):
        yield param if isinstance(param, tuple) else (name, param)


def _info(name: str, tensor: torch.Tensor, known: Mapping[str, Assignment]) -> ParamInfo:
    info = info_of_tensor(name, tensor)
    if name not in known:
        return info
    return replace(known[name].info, frozen=info.frozen, dtype=info.dtype)


def _row(
    info: ParamInfo, group: Mapping[str, Any], label: str, assignment: Assignment | None
) -> ParamRow:
    weight_decay = float(group.get("weight_decay", 0.0))
    if assignment is not None:
        expected, reason = assignment.settings["weight_decay"], assignment.reason
        if weight_decay != expected:
            reason = f"changed from {expected:g} ({reason})"
    else:
        decays, reason = standard_rule(info)
        if decays != bool(weight_decay):
            standard = "decay" if decays else "no decay"
            reason = f"set by its group (standard rule: {standard}, {reason})"
    embedding = (
        is_embedding(info) if info.owners else is_embedding_of_group(info.name, info.shape, group)
    )
    state_format = state_format_for(
        info.shape, requested=group.get("state_format"), dtype=info.dtype, embedding=embedding
    )
    held = param_state_bytes(
        info,
        state_format=state_format,
        master_format=master_format_for(info.dtype, group.get("master_format")),
        moments=moments_of_group(group),
    )
    return ParamRow(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        group=label,
        weight_decay=weight_decay,
        lr=float(group["lr"]) if "lr" in group else None,
        reason=reason,
        state_format=state_format,
        state_bytes=held,
        tied=info.tied,
        frozen=info.frozen,
    )


def _row_without_group(info: ParamInfo) -> ParamRow:
    reason = "takes no gradient" if info.frozen else "in no group"
    return ParamRow(
        info.name, info.shape, info.dtype, "", None, None, reason, "", 0, info.tied, info.frozen
    )
