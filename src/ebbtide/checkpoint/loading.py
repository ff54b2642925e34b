"""What both faces do to load a state dict: look, match, merge the groups, word the result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ebbtide.checkpoint.files import CheckpointError
from ebbtide.checkpoint.groups import merged_groups
from ebbtide.checkpoint.kind import kind_of
from ebbtide.checkpoint.match import Difference, Match, Slot, match, saved_slots
from ebbtide.rules import Rule

__all__ = ["Loading", "prepare"]


@dataclass
class Loading:
    """A state dict on its way into an optimizer; nothing has changed yet.

    Attributes:
        optimizer: Name of the class, for messages.
        match: Which saved parameter is which; what a face refuses is added to its difference.
        groups: The new groups.
        notes: Sentences about what the new groups keep against the file.
        states: State by our position, as saved; parameters without state are left out.
        rest: Entries of the state that belong to no parameter.
    """

    optimizer: str
    match: Match
    groups: list[dict[str, Any]]
    notes: list[str]
    states: dict[int, Mapping[str, Any]]
    rest: dict[Any, Any]

    @property
    def difference(self) -> Difference:
        """What keeps the two sides apart."""
        return self.match.difference

    def refused(self, *, strict: bool) -> bool:
        """Tell whether the state must not be loaded."""
        return bool(self.difference) and (strict or not self.match.pairs)

    def refusal(self) -> CheckpointError:
        """Return the error that says why nothing was loaded."""
        if self.difference.unmatched:
            return CheckpointError(f"{self.difference.unmatched}. Nothing was loaded")
        if not self.difference:
            return CheckpointError(
                "another rank refuses the saved state, and says why: nothing was loaded"
            )
        return CheckpointError(
            f"the saved state does not fit this optimizer:\n{self.difference}\nNothing was loaded. "
            "load_state_dict(..., strict=False) takes over what fits and starts the rest anew"
        )

    def report(self, *, lost: bool = False) -> str:
        """Say what was left out or differs; empty where the state simply fits.

        Args:
            lost: Moments there were, here or in the file's past, are gone.
        """
        notes = list(self.notes)
        if self.difference or self.difference.moved:
            what = "except for what does not fit" if self.difference else "although groups differ"
            notes.insert(0, f"loaded, {what}:\n{self.difference}")
        if lost:
            notes.append("the saved state holds no moments: the optimizer starts at its first step")
        return f"{self.optimizer}: " + "\n".join(notes) if notes else ""


def prepare(
    rule: Rule,
    optimizer: str,
    state_dict: Mapping[str, Any],
    mine: Sequence[Slot],
    groups: Sequence[Mapping[str, Any]],
    keep: Collection[str] = (),
    convert: Callable[[Any, Any], Any] | None = None,
) -> Loading:
    """Match a state dict with an optimizer.

    Args:
        rule: The optimizer's rule.
        optimizer: Name of its class.
        state_dict: As saved.
        mine: The optimizer's parameters.
        groups: Its groups.
        keep: As in `ebbtide.checkpoint.merged_groups`, `convert` too.
        convert: Makes a saved hyperparameter of the kind of ours.

    Raises:
        CheckpointError: This is no optimizer's state, or another optimizer's.
    """
    _check_kind(rule, optimizer, state_dict)
    saved_groups = state_dict["param_groups"]
    found = match(saved_slots(state_dict), mine, (len(saved_groups), len(groups)))
    merged, notes = merged_groups(saved_groups, groups, found, keep, convert)
    state = state_dict["state"]
    states = {at: state[index] for at, index in found.pairs.items() if state.get(index) is not None}
    ids = {index for group in saved_groups for index in group["params"]}
    rest = {key: value for key, value in state.items() if key not in ids}
    return Loading(optimizer, found, merged, notes, states, rest)


def _check_kind(rule: Rule, optimizer: str, state_dict: Mapping[str, Any]) -> None:
    if not isinstance(state_dict, Mapping):
        what = type(state_dict).__name__
        raise CheckpointError(f"this is no optimizer's state but a {what}; a file is read first")
    if "param_groups" not in state_dict or "state" not in state_dict:
        raise CheckpointError(
            "this is no optimizer's state: it has no 'state' and 'param_groups', but "
            f"{sorted(map(str, state_dict))[:8]}"
        )
    kind = kind_of(state_dict)
    if kind is not None and kind.lower() != rule.name:
        raise CheckpointError(
            f"this is {kind} state, and this optimizer is {optimizer}: nothing was loaded"
        )
