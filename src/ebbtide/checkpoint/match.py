"""Which saved parameter is which of ours: by name where both sides have names, else by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Difference", "Match", "Slot", "match", "saved_slots", "unwrapped"]

# Components that wrappers put into a parameter's name (DDP, torch.compile, FSDP, checkpointing).
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

GROUP_COUNT = "loaded state dict has a different number of parameter groups"
GROUP_SIZE = (
    "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
)


class Slot(NamedTuple):
    """One parameter as one side knows it.

    Attributes:
        index: What the state is found by: the id in the file, the position on our side.
        name: `None` where there are no names.
        group: Position of its group.
        shape: `None` where it is not known: no state was saved.
    """

    index: Any
    name: str | None
    group: int
    shape: tuple[int, ...] | None = None


@dataclass
class Difference:
    """What keeps two sides apart, in lists of readable entries.

    Attributes:
        missing: Parameters of ours that the file does not know.
        unexpected: Parameters of the file that we do not have.
        reshaped: Parameters saved with another shape.
        refused: State that cannot be used, with the reason.
        moved: Parameters whose group is another one; alone this keeps nothing from loading.
        unmatched: Why no parameter at all could be matched.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    unmatched: str = ""

    def __bool__(self) -> bool:
        """Whether something cannot be loaded as it is."""
        lists = (self.missing, self.unexpected, self.reshaped, self.refused)
        return bool(self.unmatched) or any(lists)

    def __str__(self) -> str:
        """Show every list that is not empty, a line each."""
        lines = [self.unmatched] if self.unmatched else []
        for title, entries in (
            ("missing in the file", self.missing),
            ("unexpected in the file", self.unexpected),
            ("shape changed", self.reshaped),
            ("refused", self.refused),
            ("moved between groups", self.moved),
        ):
            if entries:
                more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
                lines.append(f"  {title} ({len(entries)}): {', '.join(entries[:8])}{more}")
        return "\n".join(lines)


@dataclass
class Match:
    """Pairs of parameters, and what is left over.

    Attributes:
        pairs: Our position → id in the file, for parameters on both sides with one shape.
        sources: For each group of ours, the saved groups its parameters come from.
        same_grouping: Each group of ours is one saved group with the same parameters.
        by_name: Names decided, not positions.
        difference: What is left over; also what moved.
    """

    pairs: dict[int, Any]
    sources: list[list[int]]
    same_grouping: bool
    by_name: bool
    difference: Difference


def saved_slots(state_dict: Mapping[str, Any]) -> list[Slot]:
    """List the parameters of a state dict.

    Names are the groups' `param_names`, or the ids where these are strings, as distributed
    checkpoints write them.
    """
    slots = []
    for number, group in enumerate(state_dict["param_groups"]):
        ids = list(group["params"])
        names = list(group.get("param_names", ())) or ids
        if ids and all(isinstance(each, str) for each in ids):
            names = ids
        for index, name in zip(ids, names, strict=True):
            values = state_dict["state"].get(index)
            known = str(name) if isinstance(name, str) else None
            slots.append(Slot(index, known, number, _shape_of(values)))
    return slots


def match(saved: Sequence[Slot], mine: Sequence[Slot], groups: tuple[int, int]) -> Match:
    """Match the parameters of a file with ours.

    Args:
        saved: From `saved_slots`.
        mine: Ours, in the order of the groups, with shapes.
        groups: Number of groups in the file and here.

    Example:
        Order and grouping may differ where there are names:

        >>> saved = [Slot(0, "w", 0, (2, 3)), Slot(1, "b", 0, (3,))]
        >>> mine = [Slot(0, "b", 0, (3,)), Slot(1, "w", 1, (2, 3))]
        >>> found = match(saved, mine, (1, 2))
        >>> found.pairs, found.sources, found.same_grouping
        ({0: 1, 1: 0}, [[0], [0]], False)
    """
    aligned = groups[0] == groups[1] and [s.group for s in saved] == [s.group for s in mine]
    by_name = _named(saved) and _named(mine)
    if by_name:
        name_of = _naming(saved, mine)
        at = {name_of(slot): slot for slot in saved}
        found = {slot.index: at[name_of(slot)] for slot in mine if name_of(slot) in at}
        # Two languages: the names of a distributed checkpoint, or plain positions, against others.
        foreign = any(isinstance(slot.index, str) for slot in saved) or (
            _positions(saved) or _positions(mine)
        )
        by_name = bool(found) or not (foreign and aligned)
    if not by_name:
        pairs = zip(mine, saved, strict=True) if aligned else ()
        found = {slot.index: other for slot, other in pairs}
    return _result(saved, mine, groups, found, by_name=by_name)


def _result(
    saved: Sequence[Slot],
    mine: Sequence[Slot],
    groups: tuple[int, int],
    found: Mapping[int, Slot],
    *,
    by_name: bool,
) -> Match:
    difference, pairs = Difference(), {}
    sources: list[list[int]] = [[] for _ in range(groups[1])]
    for slot in mine:
        other = found.get(slot.index)
        if other is None:
            if by_name:
                difference.missing.append(_label(slot))
            continue
        if other.group not in sources[slot.group]:
            sources[slot.group].append(other.group)
        if other.shape is not None and other.shape != slot.shape:
            difference.reshaped.append(f"{_label(slot)} saved {other.shape}, here {slot.shape}")
        else:
            pairs[slot.index] = other.index
    same = _one_to_one(sources)
    _match_empty_groups(sources, saved, mine, groups)
    if by_name:
        taken = {other.index for other in found.values()}
        difference.unexpected += [_label(slot) for slot in saved if slot.index not in taken]
    elif not found and mine:
        difference.unmatched = _sizes(saved, mine, groups)
    if not same:
        difference.moved += [
            f"{_label(slot)} {found[slot.index].group} → {slot.group}"
            for slot in mine
            if slot.index in found and found[slot.index].group != slot.group
        ]
    return Match(pairs, sources, same, by_name, difference)


def _one_to_one(sources: Sequence[Sequence[int]]) -> bool:
    """Whether each group of ours comes from one saved group, and no two from the same."""
    flat = [source for found in sources for source in found]
    return all(len(found) <= 1 for found in sources) and len(set(flat)) == len(flat)


def _match_empty_groups(
    sources: list[list[int]], saved: Sequence[Slot], mine: Sequence[Slot], groups: tuple[int, int]
) -> None:
    """Let a group without parameters correspond to the saved one at its place, if empty too."""
    filled = [{slot.group for slot in side} for side in (saved, mine)]
    for group in range(groups[1] if groups[0] == groups[1] else 0):
        if group not in filled[0] and group not in filled[1]:
            sources[group].append(group)


def _sizes(saved: Sequence[Slot], mine: Sequence[Slot], groups: tuple[int, int]) -> str:
    """Word a difference in sizes as torch does, and add the sizes."""
    words = GROUP_COUNT if groups[0] != groups[1] else GROUP_SIZE
    counts = [
        [sum(slot.group == group for slot in side) for group in range(number)]
        for side, number in ((saved, groups[0]), (mine, groups[1]))
    ]
    return (
        f"{words}: saved groups of {counts[0]} parameters, here {counts[1]}, and no names on both "
        "sides that would tell which is which; AdamW(model.named_parameters()) keeps names"
    )


def _named(slots: Sequence[Slot]) -> bool:
    return bool(slots) and all(slot.name is not None for slot in slots)


def _positions(slots: Sequence[Slot]) -> bool:
    """Whether the names are no more than positions, as arrays given in a list have them."""
    return all(slot.name == str(position) for position, slot in enumerate(slots))


def _naming(*sides: Sequence[Slot]) -> Callable[[Slot], str]:
    """Return how slots are called: without wrappers' components, unless that is ambiguous."""
    for side in sides:
        plain = {str(slot.name) for slot in side}
        if len({unwrapped(name) for name in plain}) != len(plain):
            return lambda slot: str(slot.name)
    return lambda slot: unwrapped(str(slot.name))


def unwrapped(name: str) -> str:
    """Return a parameter's name without the components that wrappers put into it.

    Example:
        >>> unwrapped("module._orig_mod.fc.weight")
        'fc.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name


def _label(slot: Slot) -> str:
    if slot.name is not None:
        return repr(slot.name)
    return f"parameter {slot.index} (group {slot.group})"


def _shape_of(values: Any) -> tuple[int, ...] | None:
    """Return the shape of the first state array that is shaped like its parameter."""
    if not isinstance(values, Mapping):
        return None
    for key in ("exp_avg", "exp_avg_codes", "exp_avg_sq", "momentum_buffer", "max_exp_avg_sq"):
        shape = getattr(values.get(key), "shape", None)
        if shape is not None:
            return tuple(shape)
    return None
