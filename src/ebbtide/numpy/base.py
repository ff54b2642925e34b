"""What AdamW, Adam and SGD over arrays share: groups, plan, step, state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ebbtide.backends.cpu import CompiledBackend, available
from ebbtide.backends.pure import PureBackend
from ebbtide.checkpoint import CheckpointError, Slot, prepare
from ebbtide.hyperparameters import (
    Options,
    as_pair,
    numbers,
    validate_group,
    validate_values,
)
from ebbtide.notice import warn
from ebbtide.numpy.loading import alike, loaded
from ebbtide.numpy.rows import Array, Planner, check_param, finite_sum_squares
from ebbtide.plan import (
    Bucket,
    Outcome,
    clip_scale,
    nonfinite_message,
)
from ebbtide.reading import GroupReader, Lasting
from ebbtide.rules import Rule

__all__ = ["DecayMask", "Grads", "Optimizer", "Params"]

Params = Mapping[str, Array] | Sequence[Array] | Sequence[Mapping[str, Any]]
Grads = Mapping[str, Array | None] | Sequence[Array | None]
DecayMask = Mapping[str, bool] | Callable[[str, Array], bool]

_OF_THE_PLAN = ("_backend", "_readers", "_order", "_lists")


class Optimizer(Options):
    """What AdamW, Adam and SGD share: groups, plan, step, state."""

    _rule: Rule

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        decay_mask: DecayMask | None,
        nonfinite: str,
        clip_grad_norm: float | None,
    ) -> None:
        validate_values(self._rule, numbers(defaults))
        self.defaults = defaults
        self.nonfinite = nonfinite
        self.clip_grad_norm = clip_grad_norm
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[str, dict[str, Array]] = {}
        self.last_grad_norm: float | None = None
        self.last_step_skipped = False
        self.skipped_steps = 0
        if not (decay_mask is None or callable(decay_mask) or isinstance(decay_mask, Mapping)):
            raise TypeError(
                "decay_mask must be a mapping from names to bools, or a function of name and "
                f"array, got {decay_mask!r}"
            )
        self._decay_mask = decay_mask
        self._reset()
        for group in _as_groups(params):
            self.add_param_group(group)
        if not self._names:
            raise ValueError("optimizer got an empty parameter list")
        self._check_mask()

    def _reset(self) -> None:
        self._backend = _new_backend()
        self._calls = 0
        self._warned_no_gradients = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles keep: all but the remembered plan."""
        return {key: value for key, value in vars(self).items() if key not in _OF_THE_PLAN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle; its arrays are its own."""
        vars(self).update(state)
        self._reset()
        self._lay_out()

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add arrays with hyperparameters of their own.

        Args:
            group: `params` (a mapping or list of arrays) and any of the constructor's
                hyperparameters.

        Raises:
            TypeError: An array is not a writable NumPy array of floats.
            ValueError: A name is taken, memory overlaps, or a hyperparameter is out of range.
        """
        added = {**self.defaults, **group}
        added["params"] = _named(group["params"], start=len(self._names))
        if "betas" in added:
            added["betas"] = as_pair(added["betas"])
        if added["base_lr"] is None:
            added["base_lr"] = added["lr"]
        validate_group(self._rule, added, f" (param group {len(self.param_groups)})")
        for key in ("state_format", "master_format"):
            if added.get(key) is not None:
                raise ValueError(f"{key} is for ebbtide.torch; state here has the array's dtype")
        for name, array in added["params"].items():
            if name in self._names:
                raise ValueError(f"array {name!r} appears in more than one place")
            check_param(name, array)
        self.param_groups.append(added)
        self._lay_out()

    @property
    def _names(self) -> dict[str, Array]:
        return {n: a for group in self.param_groups for n, a in group["params"].items()}

    def _decays(self, name: str, array: Array) -> bool:
        if self._decay_mask is None:
            return array.ndim >= 2
        if callable(self._decay_mask):
            return bool(self._decay_mask(name, array))
        return bool(self._decay_mask[name])

    def _check_mask(self) -> None:
        if isinstance(self._decay_mask, Mapping) and set(self._decay_mask) != set(self._names):
            differing = sorted(set(self._decay_mask) ^ set(self._names))
            raise ValueError(f"decay_mask and params name different arrays: {differing}")
        wanted = any(group["weight_decay"] != 0 for group in self.param_groups)
        if wanted and not any(self._decays(n, a) for n, a in self._names.items()):
            raise ValueError(
                "weight_decay reaches no array: by default only arrays of two dimensions or more "
                "decay; pass decay_mask= to say which do, or weight_decay=0"
            )

    def _lay_out(self) -> None:
        """Order the arrays as the plan does: of each group those that decay, then the rest."""
        self._order: list[tuple[str, Array, int]] = []
        for index, group in enumerate(self.param_groups):
            decays = {
                name: (isinstance(self._decay_mask, Mapping) and name not in self._decay_mask)
                or self._decays(name, array)
                for name, array in group["params"].items()
            }
            for part in (0, 1):
                self._order += [
                    (name, array, 2 * index + part)
                    for name, array in group["params"].items()
                    if decays[name] == (part == 0)
                ]
        self._readers = [
            GroupReader(
                self._rule,
                f" (param group {index})",
                decays=decays,
                restructured=self._backend.forget,
            )
            for index in range(len(self.param_groups))
            for decays in (True, False)
        ]
        self._lists: list[list[Array]] = [[] for _ in range(2 * len(self.param_groups))]
        for _, array, part in self._order:
            self._lists[part].append(array)
        self._backend.forget()

    def step(self, grads: Grads) -> None:
        """Update the arrays in place.

        Args:
            grads: Gradients by name, or in the order of the arrays. An array whose gradient is
                missing or `None` is skipped: no decay, no state, no count.

        Raises:
            TypeError, ValueError: A gradient has another dtype or shape than its array, or an
                unknown name; nothing has been written.
            FloatingPointError: With `nonfinite="raise"`: elements with a non-finite gradient were
                left untouched, the rest of the step is complete.
        """
        given = self._aligned(grads)
        self.last_step_skipped = False
        self._calls += 1
        outcome = self._rerun(given)
        if outcome is None:
            outcome = self._plan_and_run(given)
        if outcome.untouched and self._nonfinite == "raise":
            rows = [(self._order[i][0], n, self._order[i][1].size) for i, n in outcome.untouched]
            raise FloatingPointError(nonfinite_message(rows, self._step_of(rows[0][0])))

    def _aligned(self, grads: Grads) -> list[Array | None]:
        if isinstance(grads, Mapping):
            unknown = grads.keys() - self._names.keys() if len(grads) else set()
            if unknown:
                raise ValueError(f"gradients for unknown arrays: {sorted(unknown)}")
            return [grads.get(name) for name, _, _ in self._order]
        if len(grads) != len(self._order):
            raise ValueError(f"{len(grads)} gradients for {len(self._order)} arrays")
        by_name = dict(zip(self._names, grads, strict=True))
        return [by_name[name] for name, _, _ in self._order]

    def _buckets(self, keys: Sequence[tuple[int, int]]) -> list[Bucket]:
        return [
            Bucket(part, self._readers[part].read(group)(step), group)
            for part, step in keys
            for group in (self.param_groups[part // 2],)
        ]

    def _read(self, part: int) -> Lasting | None:
        found = self._readers[part].read_lastingly(self.param_groups[part // 2])
        return found if self._backend.loaded else None

    @property
    def _looks_first(self) -> bool:
        """Whether a step must have seen all gradients before it begins."""
        return self._clip_grad_norm is not None or self._nonfinite == "skip"

    def _rerun(self, given: list[Array | None]) -> Outcome | None:
        """Run the remembered plan again, if nothing has moved: the usual step."""
        backend, state, lists = self._backend, self.state, self._lists
        guard = self._nonfinite != "propagate"
        limit = self._clip_grad_norm or (math.inf if self._nonfinite == "skip" else 0.0)
        parts = [group for group in self.param_groups for _ in (0, 1)]
        outcome = backend.rerun(parts, lists, given, state, self._read, 1.0, guard, limit)
        if outcome is not None and limit:
            self.last_grad_norm = backend.norm
        if outcome is not None and backend.others and not backend.stepped():
            self._warn_without_gradients(given)
        return outcome

    def _judge(self, total: float) -> float:
        """Return what to multiply the gradients by, given their sum of squares; or skip."""
        self.last_grad_norm = math.sqrt(total) if total >= 0 else math.nan
        if self.nonfinite == "skip" and not math.isfinite(total):
            self.last_step_skipped = True
            self.skipped_steps += 1
        return clip_scale(total, self.clip_grad_norm)

    def _plan_and_run(self, given: list[Array | None]) -> Outcome:
        planner, scale = Planner(self._rule, self.state), 1.0
        for part, reader in enumerate(self._readers):
            reader.check(self.param_groups[part // 2])
        for (name, array, part), grad in zip(self._order, given, strict=True):
            planner.add(name, array, grad, part, self.param_groups[part // 2])
        planner.plan.check_overlap()
        if self._looks_first:
            scale = self._judge(self._sum_squares(planner, given))
            if self.last_step_skipped:
                return Outcome([])
        planner.commit()
        buckets = self._buckets(self._backend.load(planner.plan))
        guard = self.nonfinite != "propagate"
        outcome = self._backend.run(planner.plan, buckets, grad_scale=scale, guard=guard)
        for array, copy in planner.staged:
            array[...] = copy
        self._warn_without_gradients(given)
        return outcome

    def _sum_squares(self, planner: Planner, given: list[Array | None]) -> float:
        backend = _new_backend()  # one that knows nothing of the state, which is not there yet
        backend.load(planner.plan)
        total = backend.sum_squares(planner.plan)
        if self.nonfinite == "raise" and not math.isfinite(total):
            return finite_sum_squares(given)  # the others are clipped by their own norm
        return total

    def _warn_without_gradients(self, given: list[Array | None]) -> None:
        if self._warned_no_gradients or any(grad is not None for grad in given):
            return
        self._warned_no_gradients = True
        warn("step() saw no gradients: nothing was updated")

    def _step_of(self, name: str) -> int:
        state = self.state.get(name, {})
        return int(state["step"]) if "step" in state else self._calls

    def state_dict(self) -> dict[str, Any]:
        """Return state and hyperparameters as plain arrays, in torch's arrangement.

        `ebbtide.torch` loads it, and `load_state_dict` here loads what torch's classes give.
        """
        index = {name: i for i, name in enumerate(self._names)}
        groups = []
        for group in self.param_groups:
            names = list(group["params"])
            rest = {key: value for key, value in group.items() if key != "params"}
            groups.append({**rest, "params": [index[n] for n in names], "param_names": names})
        state = {index[name]: dict(values) for name, values in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], *, strict: bool = True, keep: Collection[str] = ()
    ) -> None:
        """Load state and hyperparameters, all or nothing.

        Arrays are matched by name where both sides have names, whatever their order and grouping;
        else by position. State keeps the dtype it was saved in.

        Args:
            state_dict: From `state_dict` here, of `ebbtide.torch` or of torch's class of the same
                name; from a file by way of `ebbtide.checkpoint.unflatten`. It is copied.
            strict: Refuse a state that lacks arrays, has others, other shapes or unusable values.
                With `False` what fits is loaded, the rest starts anew, and a warning lists it.
            keep: Group keys whose values here are kept, such as `("lr", "weight_decay")`.

        Raises:
            CheckpointError: A `ValueError` that lists what does not fit; nothing has changed.
        """
        groups = self.param_groups
        slots = [
            Slot(position, name, number, array.shape)
            for position, (name, array, number) in enumerate(
                (name, array, number)
                for number, group in enumerate(groups)
                for name, array in group["params"].items()
            )
        ]
        loading = prepare(self._rule, type(self).__name__, state_dict, slots, groups, keep, alike)
        state: dict[str, dict[str, Array]] = {}
        for position, values in loading.states.items():
            name, number = str(slots[position].name), slots[position].group
            try:
                state[name] = loaded(
                    self._rule, name, self._names[name], loading.groups[number], values
                )
            except CheckpointError as error:
                loading.difference.refused.append(str(error))
        if loading.refused(strict=strict):
            raise loading.refusal()
        for number, group in enumerate(loading.groups):
            validate_group(self._rule, group, f" (saved for group {number})")
        if report := loading.report():
            warn(report)
        for group, new in zip(groups, loading.groups, strict=True):
            group.update(new)
        self.state = state
        self._lay_out()


def _as_groups(params: Params) -> list[Mapping[str, Any]]:
    if isinstance(params, Mapping | np.ndarray):
        return [{"params": params}]
    listed = list(params)
    if listed and all(isinstance(item, Mapping) for item in listed):
        return [item for item in listed if isinstance(item, Mapping)]
    return [{"params": listed}]


def _named(params: Any, *, start: int) -> dict[str, Array]:
    if isinstance(params, np.ndarray):
        raise TypeError("params must be a mapping or a list of arrays, got a single array")
    if isinstance(params, Mapping):
        for name in params:
            if not isinstance(name, str):
                raise TypeError(f"the name of an array must be a string, got {name!r}")
        return dict(params)
    return {str(start + i): array for i, array in enumerate(params)}


def _new_backend() -> CompiledBackend | PureBackend:
    return CompiledBackend() if available() else PureBackend()
