"""The decision: which settings each parameter gets, in as few groups as there are settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ebbtide.groups.kinds import EMBEDDING_CHOICES, standard_rule
from ebbtide.groups.layers import depths_below_top
from ebbtide.groups.records import Assignment, ParamInfo
from ebbtide.groups.rules import GroupRule, Rules, check_number, find_rules

__all__ = ["Grouping", "assign"]


@dataclass(frozen=True)
class Grouping:
    """What `param_groups` was asked for; its arguments are described there."""

    weight_decay: float
    lr: float | None = None
    rules: Rules | None = None
    layer_decay: float | None = None
    layers: Sequence[str] | None = None
    embeddings: str = "decay"
    standard: bool = True

    def check(self) -> None:
        """Complain about arguments that have no meaning."""
        check_number(self.weight_decay, "weight_decay")
        if self.lr is not None:
            check_number(self.lr, "lr")
        if self.embeddings not in EMBEDDING_CHOICES:
            choices = " or ".join(map(repr, EMBEDDING_CHOICES))
            raise ValueError(f"embeddings must be {choices}, got {self.embeddings!r}")
        if self.layer_decay is None:
            if self.layers is not None:
                raise ValueError("layers are given without a layer_decay")
            return
        if not 0 < check_number(self.layer_decay, "layer_decay") <= 1:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay!r}")
        if self.lr is None:
            raise ValueError("layer_decay scales the learning rate: pass lr too")


def assign(infos: Sequence[ParamInfo], grouping: Grouping) -> list[Assignment]:
    """Return the settings, the group and the reason of each parameter, in the same order.

    Raises:
        ValueError: There is nothing to group, a pattern or a layer matches nothing, nothing matches
            a parameter, two parameters have one name, or a value has no meaning.

    Example:
        >>> infos = [ParamInfo("fc.weight", (4, 4)), ParamInfo("fc.bias", (4,))]
        >>> [(a.info.name, a.group, a.reason) for a in assign(infos, Grouping(0.1))]
        [('fc.weight', 'decay', '2-D'), ('fc.bias', 'no_decay', 'bias')]
    """
    grouping.check()
    _check_names(infos)
    rules = find_rules(grouping.rules, infos)
    depths: list[int] | list[None] = [None] * len(infos)
    bottom = 0
    if grouping.layer_decay not in (None, 1):
        depths, bottom = depths_below_top(infos, grouping.layers)
    assignments = []
    labels = []
    for info, rule, depth in zip(infos, rules, depths, strict=True):
        assignment = _decide(info, rule, grouping, depth)
        layer = None if depth is None else bottom - depth
        labels.append("" if info.frozen else _label(assignment, rule, grouping, layer))
        assignments.append(assignment)
    return _name_groups(assignments, labels)


def _check_names(infos: Sequence[ParamInfo]) -> None:
    if not infos:
        raise ValueError(
            "there are no parameters to group; was the generator already consumed? "
            "Pass the model, or list(model.named_parameters())"
        )
    twice = [name for name, count in Counter(info.name for info in infos).items() if count > 1]
    if twice:
        raise ValueError(f"two parameters are called {twice[0]!r}")
    if all(info.frozen for info in infos):
        raise ValueError(f"all {len(infos)} parameters are frozen: none requires a gradient")


def _decide(
    info: ParamInfo, rule: GroupRule | None, grouping: Grouping, depth: int | None
) -> Assignment:
    settings: dict[str, Any] = {}
    if grouping.lr is not None:
        layer_decay = grouping.layer_decay
        scale = 1.0 if layer_decay is None or depth is None else layer_decay**depth
        settings["lr"] = grouping.lr * scale
    own = {} if rule is None else rule.settings
    if "weight_decay" in own:
        return Assignment(info, {**settings, **own}, f"rule {rule}")
    if not grouping.standard:
        if not info.frozen:
            what = f"the rule {rule} sets no weight_decay for" if rule else "no rule matches"
            raise ValueError(f"{what} {info.name!r}, and standard=False leaves it to the rules")
        return Assignment(info, {**settings, "weight_decay": 0.0, **own}, "no rule")
    decays, reason = standard_rule(info, grouping.embeddings)
    weight_decay = grouping.weight_decay if decays else 0.0
    reason += f"; rule {rule}" if rule else ""
    return Assignment(info, {**settings, "weight_decay": float(weight_decay), **own}, reason)


def _label(
    assignment: Assignment, rule: GroupRule | None, grouping: Grouping, layer: int | None
) -> str:
    settings = assignment.settings
    decay = "decay" if assignment.decays else "no_decay"
    if assignment.decays and settings["weight_decay"] != grouping.weight_decay:
        decay = f"decay_{settings['weight_decay']:g}"
    own = rule.settings if rule is not None else {}
    parts = [] if layer is None or "lr" in own else [f"layer_{layer}"]
    if "name" in own:
        parts.append(str(own["name"]))
        if "weight_decay" not in own:
            parts.append(decay)
        return ".".join(parts)
    extras = [f"{key}_{value}" for key, value in own.items() if key != "weight_decay"]
    return ".".join([*parts, decay, *extras])


def _name_groups(assignments: list[Assignment], labels: list[str]) -> list[Assignment]:
    """Give the same settings one group, unless a rule names it, and other settings other names."""
    names: dict[str, str] = {}
    result = []
    for assignment, label in zip(assignments, labels, strict=True):
        if assignment.info.frozen:
            result.append(assignment)
            continue
        key = repr(sorted(assignment.settings.items()))
        if key not in names:
            taken, name, number = set(names.values()), label, 2
            while name in taken:
                name, number = f"{label}_{number}", number + 1
            names[key] = name
        result.append(replace(assignment, group=names[key]))
    return result
