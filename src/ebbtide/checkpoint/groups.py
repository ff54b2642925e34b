"""Which hyperparameters of a file a group takes over, and which it keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ebbtide.checkpoint.match import Match

__all__ = ["IMPLEMENTATION", "merged_groups"]

# The run's choices, which say how a step is computed and kept, not what it is.
IMPLEMENTATION = (
    "foreach", "fused", "capturable", "differentiable", "state_format", "master_format",
)  # fmt: skip

# Keys that stand or fall with another: a schedule's base and the decay's base follow the rate.
_FOLLOW = {"lr": ("initial_lr", "base_lr"), "weight_decay": ("initial_weight_decay",)}
_OWN = ("params", "param_names", "decay_policy", "decoupled_weight_decay")


def merged_groups(
    saved: Sequence[Mapping[str, Any]],
    mine: Sequence[Mapping[str, Any]],
    match: Match,
    keep: Collection[str] = (),
    convert: Callable[[Any, Any], Any] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Give each of our groups the hyperparameters of the file.

    Where the grouping is another one, a key is taken over only if it is not what the new or the old
    grouping sets apart: splitting one group into decayed and undecayed parameters keeps our two
    weight decays and takes the file's learning rate.

    Args:
        saved: Groups of the file.
        mine: Our groups; they are not changed.
        match: From `ebbtide.checkpoint.match`.
        keep: Keys that keep our values. Keeping `lr` keeps `initial_lr` and `base_lr` with it.
        convert: Makes a saved value of the kind of ours; called with ours and the saved one.

    Returns:
        The new groups, and sentences about what was kept against the file.

    Raises:
        ValueError: A key of `keep` is in no group.
    """
    kept = _kept(keep, mine, saved)
    merged: list[dict[str, Any]] = []
    notes: list[str] = []
    apart: set[str] = set()
    for number, group in enumerate(mine):
        new = dict(group)
        sources = [saved[source] for source in match.sources[number]]
        if sources:
            for key in dict.fromkeys(key for source in sources for key in source):
                if key in kept or key in _OWN:
                    continue
                if match.same_grouping or _agreed(key, number, saved, mine, match):
                    if key in sources[0]:
                        value = copy.deepcopy(sources[0][key])
                        new[key] = convert(group.get(key), value) if convert else value
                else:
                    apart.add(key)
            _take_policy(new, sources, number, notes, kept, exact=match.same_grouping)
        merged.append(new)
    if apart:
        notes.append(
            f"the grouping changed: {', '.join(sorted(apart))} kept as here, where groups differ"
        )
    return merged, notes


def _kept(
    keep: Collection[str], mine: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> set[str]:
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    known = {key for group in (*mine, *saved) for key in group} - {"params", "param_names"}
    for key in keep:
        if key not in known:
            raise ValueError(f"keep={key!r}: no group has this key; they have {sorted(known)}")
    return {*IMPLEMENTATION, *keep, *(each for key in keep for each in _FOLLOW.get(key, ()))}


def _agreed(
    key: str,
    number: int,
    saved: Sequence[Mapping[str, Any]],
    mine: Sequence[Mapping[str, Any]],
    match: Match,
) -> bool:
    """Whether neither the old nor the new grouping sets groups apart by this key."""
    sources = match.sources[number]
    related = [group for group, found in enumerate(match.sources) if set(found) & set(sources)]
    return _alike([saved[source] for source in sources], key) and _alike(
        [mine[group] for group in related], key
    )


def _alike(groups: Sequence[Mapping[str, Any]], key: str) -> bool:
    first, *rest = [_plain(group.get(key)) for group in groups]
    return all(value == first for value in rest)


def _plain(value: Any) -> Any:
    """Return a number for a tensor or array of one element."""
    if isinstance(value, tuple | list):
        return tuple(_plain(each) for each in value)
    return value.item() if hasattr(value, "item") else value


def _take_policy(
    new: dict[str, Any],
    sources: Sequence[Mapping[str, Any]],
    number: int,
    notes: list[str],
    kept: Collection[str],
    *,
    exact: bool,
) -> None:
    """Take over the decay policy, but never turn a decoupled optimizer into an L2 one or back."""
    mine = new.get("decay_policy")
    if "decay_policy" in kept or mine is None:
        return
    policies = {_policy_of(source) for source in sources} - {None}
    if len(policies) != 1 or not (exact or len(sources) == 1):
        return
    (policy,) = policies
    if (policy == "l2") != (mine == "l2"):
        notes.append(
            f"group {number} was saved with weight decay of the kind {policy!r} and keeps {mine!r}"
        )
    elif any(source.get("decay_policy") == policy for source in sources):
        new["decay_policy"] = policy


def _policy_of(group: Mapping[str, Any]) -> str | None:
    """Return the policy of a saved group; torch's say only whether decay is decoupled."""
    policy = group.get("decay_policy")
    if policy is not None:
        return str(policy)
    decoupled = group.get("decoupled_weight_decay")
    return None if decoupled is None else ("decoupled" if decoupled else "l2")
