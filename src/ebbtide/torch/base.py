"""The step, as every optimizer of the torch face takes it: groups → plan → backend → state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ebbtide.backends.cpu import CompiledBackend, available
from ebbtide.backends.pure import PureBackend
from ebbtide.backends.torch_ops import Verdict
from ebbtide.hyperparameters import (
    numbers,
    validate_group,
    validate_values,
)
from ebbtide.notice import warn
from ebbtide.plan import Bucket, Outcome, nonfinite_message
from ebbtide.reading import GroupReader, Lasting
from ebbtide.torch import ranks
from ebbtide.torch.devices import ELSEWHERE, Devices, captures, decides
from ebbtide.torch.hooks import call_with_hooks, keep_out_of_graphs, nobody_listens
from ebbtide.torch.judgement import judge_plan, loss_scale, scaler_found_inf
from ebbtide.torch.persistence import Persistent
from ebbtide.torch.rows import Planner
from ebbtide.torch.running import run_plan
from ebbtide.torch.tensors import check_group
from ebbtide.torch.validation import (
    check_dtypes,
    completed,
    listed,
    name_duplicates,
    names_of,
    warn_of_lost_decay,
)

if TYPE_CHECKING:
    from ebbtide.torch.in_backward import InBackward

__all__ = ["Optimizer", "new_backend"]

_increment_version = torch._C._increment_version
_EXCHANGE_API = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_WATCHED = ("foreach", "differentiable", "fused", "state_format", "master_format")


def new_backend() -> CompiledBackend | PureBackend:
    """Return the backend of a new optimizer: the compiled core, or the reference without it."""
    return CompiledBackend(_EXCHANGE_API) if available() else PureBackend()


def _forget(*memories: CompiledBackend | PureBackend | Devices) -> None:
    for memory in memories:
        memory.forget()


class Optimizer(Persistent):
    """What AdamW, Adam and SGD share.

    Attributes:
        last_step_skipped: Whether the last call of `step` left everything as it was, by
            `nonfinite="skip"` or because a GradScaler found a non-finite gradient and the step
            unscales itself (`fused=True`; otherwise the scaler does not call `step` at all).
        skipped_steps: How many steps were.
        last_grad_norm: Global norm of the gradients before clipping, where one was asked for by
            `clip_grad_norm` or `nonfinite="skip"`. Where elements are not finite and
            `nonfinite="raise"`, that of the others, by which those are clipped.

    With `capturable=True` the three may be tensors on the device, so that no step waits for it.
    """

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        nonfinite: str,
        clip_grad_norm: float | None,
    ) -> None:
        validate_values(self._rule, numbers(defaults))
        self.nonfinite = nonfinite
        self.clip_grad_norm = clip_grad_norm
        self._skipped_steps: int | torch.Tensor = 0
        self._reset()
        super().__init__(listed(params), defaults)

    def _reset(self) -> None:
        self._skipped: bool | torch.Tensor | None = False  # None: a GPU knows
        self._grad_norm: float | torch.Tensor | None = None
        self._backend = new_backend()
        self._devices = Devices()
        self._readers: list[GroupReader] = []
        self._stepped: list[torch.Tensor] = []
        self._meshes: list[Any] = []  # of DTensors; every rank of them takes part in a step
        self._warned_no_gradients = False
        self._calls = 0
        self._planning = False
        # Set by step_in_backward; loading state does not end the arrangement.
        self._in_backward: InBackward | None = self.__dict__.get("_in_backward")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own; see `torch.optim.Optimizer`."""
        if isinstance(param_group, dict):
            param_group = completed(param_group, self.defaults, self._rule)
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if "more than one parameter group" not in str(error):
                raise
            names = name_duplicates(self.param_groups, param_group)
            raise ValueError(f"{error}: {names}") from None
        index = len(self.param_groups) - 1
        try:
            check_dtypes(param_group, index)
            checked = numbers(param_group)
            validate_group(self._rule, checked, f" (param group {index})")
            warn_of_lost_decay({**checked, "params": param_group["params"]}, index)
        except Exception:
            self.param_groups.pop()
            raise
        _forget(self._backend, self._devices)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The loss, if there is a closure.

        Raises:
            FloatingPointError: With `nonfinite="raise"`: elements with a non-finite gradient were
                left untouched, the rest of the step is complete.
            RuntimeError, TypeError, ValueError: A parameter, its gradient, its state or a
                hyperparameter cannot be stepped with; it is named, and nothing has been written.
        """
        # Torch wraps the `step` of a subclass when one is made, and calls the hooks there; not that
        # of a class which an optimizer is given later.
        step = type(self).step
        if nobody_listens(self) or (step is not Optimizer.step and hasattr(step, "hooked")):
            return self._step(closure)
        return call_with_hooks(self, self._step, closure)

    @property
    def last_step_skipped(self) -> bool | torch.Tensor:
        """Whether the last call of `step` left everything as it was; raises what a GPU reports."""
        self._devices.report(self, wait=True)
        skipped, _ = self._unread()
        return skipped if captures(self) else bool(skipped)

    @property
    def skipped_steps(self) -> int | torch.Tensor:
        """How many steps left everything as it was."""
        return self._skipped_steps + self._devices.skipped_steps(self)

    @property
    def last_grad_norm(self) -> float | torch.Tensor | None:
        """Global norm of the gradients of the last step that asked for it, before clipping."""
        _, norm = self._unread()
        return norm if norm is None or captures(self) else float(norm)

    def _unread(self) -> tuple[bool | torch.Tensor, float | torch.Tensor | None]:
        """Return `last_step_skipped` and `last_grad_norm`, as tensors where a GPU knows them."""
        skipped = self._devices.skipped if self._skipped is None else self._skipped
        return skipped, self._devices.norm if self._devices.normed else self._grad_norm

    step.hooked = True  # type: ignore[attr-defined]
    keep_out_of_graphs(step)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._skipped = False
        self._calls += 1
        if self._in_backward is not None:
            self._in_backward.finish(self)
        outcome = self._rerun()
        if outcome is None:
            outcome = self._plan_alone()
        if self._stepped and (self._skipped is False or self._skipped is None):
            _increment_version(self._stepped)
        if outcome.untouched or self._meshes:
            self._report(outcome)
        return loss

    def _rerun(self) -> Outcome | None:
        """Run the remembered plan again, if nothing has moved: the usual step."""
        backend, scaled, scale = self._backend, hasattr(self, "found_inf"), 1.0
        limit = self._clip_grad_norm
        if limit is None and self._nonfinite == "skip":
            limit = math.inf
        if self._devices.active or (self._meshes and (scaled or limit)):
            return None
        if scaled:
            if not backend.loaded:
                return None
            if scaler_found_inf(self):
                return self._skip(Verdict(apply=False))
            scale = 1.0 / loss_scale(self)
        guard = self._nonfinite != "propagate" and not scaled
        outcome = backend.rerun(
            self.param_groups, None, None, self.state, self._read, scale, guard, limit or 0.0
        )
        if outcome is not None:
            if limit:
                self._grad_norm = backend.norm
            if backend.others:
                self._stepped = backend.stepped()
                self._warn_without_gradients()
        return outcome

    @property
    def _guards(self) -> bool:
        """Whether non-finite elements are left untouched; under a GradScaler, it decides."""
        return self._nonfinite != "propagate" and not hasattr(self, "found_inf")

    def _plan_alone(self) -> Outcome:
        if self._planning:
            raise RuntimeError("this optimizer is already stepping in another thread")
        try:
            self._planning = True
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                return self._plan_and_run()
        finally:
            self._planning = False

    def _plan_and_run(self) -> Outcome:
        again = self._devices.rerun(self)
        if again is not None:
            return Outcome([*again.untouched, *self._launched().untouched])
        self._meshes = ranks.meshes_of(p for group in self.param_groups for p in group["params"])
        planner = Planner(self._rule, self.state, decides(self))
        for index, group in enumerate(self.param_groups):
            self._reader(index).check(group)
            check_group(group)
            for name, param in zip(self._names(index), group["params"], strict=True):
                planner.add(param, name, index, group)
        planner.plan.check_overlap()
        if planner.tensors or any(planner.launched.rows()):
            self._check_capture()
        asked = self._devices.ask(self, planner)
        verdict = Verdict() if asked else judge_plan(self, planner, new_backend)
        if verdict.apply is False:
            return self._skip(verdict)
        outcome = run_plan(self, planner, verdict)
        self._note(verdict)
        plans = (planner.plan, planner.launched)
        self._stepped = [plan.entries[i][0] for plan in plans for i, *_ in plan.rows()]
        if not planner.tensors:
            self._warn_without_gradients()
        if any(planner.launched.rows()):
            outcome = Outcome([*outcome.untouched, *self._launched().untouched])
        return outcome

    def _launched(self) -> Outcome:
        """Note a step that GPUs are taking, and raise what they say of those before."""
        if self._devices.question is not None and decides(self):
            self._skipped = None
        self._devices.report(self, wait=False)
        return Outcome(self._devices.agreed(self))

    def _note(self, verdict: Verdict) -> None:
        """Keep what a verdict says, for the user to read."""
        if verdict.norm is not None:
            self._grad_norm = verdict.norm
        if isinstance(verdict.apply, torch.Tensor):
            self._skipped = ~verdict.apply
            if not isinstance(self._skipped_steps, torch.Tensor):
                total, device = self._skipped_steps, verdict.apply.device
                self._skipped_steps = torch.full((), total, device=device)
            self._skipped_steps += self._skipped
        elif not verdict.apply:
            self._skipped = True
            self._skipped_steps += 1

    def _check_capture(self) -> None:
        params = (param for group in self.param_groups for param in group["params"])
        if self._rule.name == "adam" and any(not param.is_cpu for param in params):
            self._accelerator_graph_capture_health_check()

    def _buckets(self, keys: Sequence[tuple[int, int]]) -> list[Bucket]:
        groups = self.param_groups
        return [
            Bucket(index, self._reader(index).read(groups[index])(step), groups[index])
            for index, step in keys
        ]

    def _read(self, index: int) -> Lasting | None:
        found = self._reader(index).read_lastingly(self.param_groups[index])
        return found if self._backend.loaded else None

    def _reader(self, index: int) -> GroupReader:
        readers = self._readers
        while len(readers) <= index:
            watched = (*_WATCHED, "capturable") if self._rule.name == "adam" else _WATCHED
            where = f" (param group {len(readers)})"
            # Not a method of this object: a cycle would keep it, and its state, after its last use.
            forget = partial(_forget, self._backend, self._devices)
            readers.append(GroupReader(self._rule, where, watch=watched, restructured=forget))
        return readers[index]

    def _names(self, index: int) -> Iterable[str]:
        return names_of(self.param_groups[index], index)

    def _named(self) -> list[tuple[str, torch.Tensor]]:
        return [
            (name, param)
            for index, group in enumerate(self.param_groups)
            for name, param in zip(self._names(index), group["params"], strict=True)
        ]

    def _skip(self, verdict: Verdict) -> Outcome:
        self._note(verdict)
        return Outcome([])

    def _warn_without_gradients(self) -> None:
        if self._stepped or self._warned_no_gradients or self._in_backward is not None:
            return
        self._warned_no_gradients = True
        warn("step() saw no gradients: nothing was updated. Was backward() called?")

    def _report(self, outcome: Outcome) -> None:
        """Raise where elements were left untouched, on this rank or on another."""
        meshes = [] if self._devices.alone else self._meshes  # GPUs let ranks agree later
        if self._nonfinite == "raise" and ranks.any_rank(bool(outcome.untouched), meshes):
            self._raise_nonfinite(outcome)

    def _raise_nonfinite(self, outcome: Outcome) -> None:
        flat = self._named()
        if not outcome.untouched:
            raise FloatingPointError(ELSEWHERE)
        rows = [(flat[i][0], count, flat[i][1].numel()) for i, count in outcome.untouched]
        # SGD keeps no count; where it has none, that of the calls since it was made or loaded.
        step = self.state.get(flat[outcome.untouched[0][0]][1], {}).get("step", self._calls)
        raise FloatingPointError(nonfinite_message(rows, int(step)))
