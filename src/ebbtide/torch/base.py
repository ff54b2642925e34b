"""The step, as every optimizer of the torch face takes it: groups → plan → backend → state."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import optimizer as torch_optimizer

from ebbtide.backends.cpu import CompiledBackend, available
from ebbtide.backends.pure import PureBackend
from ebbtide.hyperparameters import NONFINITE_POLICIES, OURS, GroupReader, numbers, validate_group
from ebbtide.plan import Bucket, Outcome, Plan, clip_scale, nonfinite_message
from ebbtide.rules import Rule
from ebbtide.torch import ranks
from ebbtide.torch.checkpoint import load_state_dict
from ebbtide.torch.rows import Planner

if TYPE_CHECKING:
    from ebbtide.torch.in_backward import InBackward

__all__ = ["Optimizer", "new_backend"]

_EXCHANGE_API = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_pre_hooks = torch_optimizer._global_optimizer_pre_hooks
_post_hooks = torch_optimizer._global_optimizer_post_hooks


def new_backend() -> CompiledBackend | PureBackend:
    return CompiledBackend(_EXCHANGE_API) if available() else PureBackend()


class Optimizer(torch.optim.Optimizer):
    """What AdamW, Adam and SGD share."""

    _rule: Rule
    _default_policy: str
    # What survives pickling and copying beside torch's defaults, state and param_groups.
    _options = ("nonfinite", "clip_grad_norm", "skipped_steps")

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        nonfinite: str,
        clip_grad_norm: float | None,
    ) -> None:
        if nonfinite not in NONFINITE_POLICIES:
            raise ValueError(
                f"Invalid nonfinite: {nonfinite!r}; one of {', '.join(NONFINITE_POLICIES)}"
            )
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise ValueError(f"Invalid clip_grad_norm: {clip_grad_norm}; above 0, or None")
        self.nonfinite = nonfinite
        self.clip_grad_norm = clip_grad_norm
        self.skipped_steps = 0
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        self.last_step_skipped = False
        self.last_grad_norm: float | None = None
        self._backend = new_backend()
        self._readers: list[GroupReader] = []
        self._stepped: list[torch.Tensor] = []
        self._meshes: list[Any] = []  # of DTensors; every rank of them takes part in a step
        self._warned_no_gradients = False
        self._in_backward: InBackward | None = None  # set by step_in_backward

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with hyperparameters of their own; see `torch.optim.Optimizer`."""
        if isinstance(param_group, dict):
            param_group = self._completed(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_dtypes(group)
            validate_group(
                self._rule, numbers(group), f" (param group {len(self.param_groups) - 1})"
            )
        except Exception:
            self.param_groups.pop()
            raise
        self._backend.forget()

    def _completed(self, group: dict[str, Any]) -> dict[str, Any]:
        """Fill in the keys that are derived from others: policy, base_lr."""
        group = dict(group)
        decoupled = group.get("decoupled_weight_decay")
        policy = group.get("decay_policy")
        if policy is None:
            default = self.defaults["decay_policy"]
            policy = default if decoupled is None else ("decoupled" if decoupled else "l2")
        elif decoupled is not None and decoupled != (policy != "l2"):
            raise ValueError(
                f"decoupled_weight_decay={decoupled} contradicts decay_policy={policy!r}; "
                "pass one of them"
            )
        group["decay_policy"] = policy
        if self._rule.name == "adam":
            group["decoupled_weight_decay"] = policy != "l2"
        if group.get("base_lr") is None:
            base_lr = self.defaults.get("base_lr")
            group["base_lr"] = (
                float(group.get("lr", self.defaults["lr"])) if base_lr is None else base_lr
            )
        return group

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The loss, if there is a closure.

        Raises:
            FloatingPointError: With `nonfinite="raise"`: elements with a non-finite gradient were
                left untouched, the rest of the step is complete.
        """
        if self._is_bare():
            return self._step(closure)
        return self._step_with_hooks(closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _is_bare(self) -> bool:
        """Whether torch's wrapper around `step` (hooks, profiler range) has nothing to do.

        torch wraps `step` of every class at a cost of some microseconds; ours is marked as wrapped
        and does the same only where somebody listens. A subclass that overrides `step` is wrapped by torch.
        """
        return type(self).step is not Optimizer.step or not (
            _pre_hooks
            or _post_hooks
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch.autograd._profiler_enabled()
        )

    def _step_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        arguments: tuple[Any, ...] = (self, *args)
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            for pre_hook in chain(_pre_hooks.values(), self._optimizer_step_pre_hooks.values()):
                result = pre_hook(self, arguments, kwargs)  # type: ignore[arg-type]
                if result is not None:
                    if not isinstance(result, tuple) or len(result) != 2:
                        raise RuntimeError(
                            f"{pre_hook} must return None or a tuple of (new_args, new_kwargs), "
                            f"but got {result}."
                        )
                    arguments, kwargs = result  # type: ignore[assignment]
            loss = self._step(*arguments[1:], **kwargs)
            self._optimizer_step_code()
            for post_hook in chain(self._optimizer_step_post_hooks.values(), _post_hooks.values()):
                post_hook(self, arguments, kwargs)  # type: ignore[arg-type]
        return loss

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last_step_skipped = False
        if self._in_backward is not None:
            self._in_backward.finish(self)
        outcome = self._rerun()
        if outcome is None:
            with torch.no_grad():
                outcome = self._plan_and_run()
        if self._stepped and not self.last_step_skipped:
            torch._C._increment_version(self._stepped)
        if self.nonfinite == "raise" and ranks.any_rank(bool(outcome.untouched), self._meshes):
            self._raise_nonfinite(outcome)
        return loss

    def _rerun(self) -> Outcome | None:
        """Run the remembered plan again, if nothing has moved: the usual step."""
        backend = self._backend
        if not backend.buckets:
            return None
        params = [group["params"] for group in self.param_groups]
        scale, guard = 1.0, self.nonfinite != "propagate"
        if self._plain:
            buckets = self._buckets(backend.buckets)
            return backend.rerun(params, None, self.state, buckets, scale, guard)
        if self._meshes:
            return None
        if self._scaler_found_inf():
            return self._skip()
        scale = 1.0 / self._loss_scale()
        buckets = self._buckets(backend.buckets)
        if not self._looks_first:
            return backend.rerun(params, None, self.state, buckets, scale, guard)
        total = backend.look(params, None, self.state)
        if total is None:
            return None
        clipped = self._clipped(total, scale)
        if clipped is None:
            return self._skip()
        return backend.rerun(None, None, self.state, buckets, clipped, guard)

    @property
    def _looks_first(self) -> bool:
        """Whether a step must have seen all gradients before it begins."""
        return self.clip_grad_norm is not None or self.nonfinite == "skip"

    @property
    def _plain(self) -> bool:
        """Whether a step needs nothing but the gradients."""
        return not self._looks_first and not hasattr(self, "found_inf")

    def _clipped(self, total: float, scale: float) -> float | None:
        """Return what to multiply the gradients by, given their sum of squares; `None` to skip."""
        total *= scale * scale
        self.last_grad_norm = math.sqrt(total) if total >= 0 else math.nan
        if math.isfinite(total):
            return scale * clip_scale(total, self.clip_grad_norm)
        return None if self.nonfinite == "skip" else scale

    def _plan_and_run(self) -> Outcome:
        self._meshes = ranks.meshes_of(p for group in self.param_groups for p in group["params"])
        if self._scaler_found_inf():
            return self._skip()
        planner = Planner(self._rule, self.state)
        seen: set[torch.Tensor] = set()
        for index, group in enumerate(self.param_groups):
            for name, param in zip(self._names(index), group["params"], strict=True):
                if param in seen:
                    planner.plan.entries.append((param, index, None, None))
                    planner.plan.cacheable = False
                    continue
                seen.add(param)
                planner.add(param, name, index, group)
        plan = planner.plan
        plan.check_overlap()
        buckets = self._buckets(self._backend.load(plan))
        scale = 1.0 / self._loss_scale()
        if self._looks_first:
            clipped = self._clipped(self._sum_squares(plan), scale)
            if clipped is None:
                self._backend.forget()  # the plan's new state was never taken over
                return self._skip()
            scale = clipped
        for param, state in planner.created:
            self.state[param] = state
        guard = self.nonfinite != "propagate"
        outcome = self._backend.run(plan, buckets, grad_scale=scale, guard=guard)
        for target, copy in planner.staged:
            target.copy_(copy)
        self._stepped = [plan.entries[i][0] for i, _, _ in plan.rows()]
        self._warn_without_gradients()
        return outcome

    def _sum_squares(self, plan: Plan) -> float:
        if not self._meshes:
            return self._backend.sum_squares(plan)

        def of_part(part: Plan) -> float:
            backend = new_backend()
            backend.load(part)
            return backend.sum_squares(part)

        return ranks.sum_squares(plan, of_part)

    def _buckets(self, keys: Sequence[tuple[int, int]]) -> list[Bucket]:
        groups = self.param_groups
        while len(self._readers) < len(groups):
            where = f" (param group {len(self._readers)})"
            self._readers.append(GroupReader(self._rule, where))
        return [
            Bucket(index, self._readers[index].read(groups[index])(step), groups[index])
            for index, step in keys
        ]

    def _names(self, index: int) -> Iterable[str]:
        group = self.param_groups[index]
        if "param_names" in group:
            return [str(name) for name in group["param_names"]]
        return [f"param_groups[{index}]['params'][{i}]" for i in range(len(group["params"]))]

    def _loss_scale(self) -> float:
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else float(scale)

    def _scaler_found_inf(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return False
        return ranks.any_rank(bool(found_inf != 0), self._meshes)

    def _skip(self) -> Outcome:
        self.last_step_skipped = True
        self.skipped_steps += 1
        return Outcome([])

    def _warn_without_gradients(self) -> None:
        if self._stepped or self._warned_no_gradients or self._in_backward is not None:
            return
        self._warned_no_gradients = True
        import warnings

        warnings.warn(
            "step() saw no gradients: nothing was updated. Was backward() called?", stacklevel=5
        )

    def _raise_nonfinite(self, outcome: Outcome) -> None:
        flat = [
            (name, param)
            for index, group in enumerate(self.param_groups)
            for name, param in zip(self._names(index), group["params"], strict=True)
        ]
        if not outcome.untouched:
            raise FloatingPointError("non-finite gradient on another rank, which names it")
        rows = [(flat[i][0], count, flat[i][1].numel()) for i, count in outcome.untouched]
        step = self.state[flat[outcome.untouched[0][0]][1]].get("step", 0)
        raise FloatingPointError(nonfinite_message(rows, int(step)))

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        *,
        strict: bool = True,
        keep: Collection[str] = (),
    ) -> None:
        """Load state and hyperparameters, from ours or from torch's class of the same name.

        Parameters are matched by name where both sides have names, whatever their order and
        grouping; else by position. State keeps the dtype it was saved in. How a step is computed
        (`foreach`, `fused`, `capturable`, `differentiable`) is not taken from the file. All or
        nothing: where this raises, nothing has changed.

        Args:
            state_dict: From `state_dict` here or of `torch.optim`; it is copied.
            strict: Refuse a state that lacks parameters, has others, other shapes or unusable
                values. With `False` what fits is loaded, the rest starts anew, and a warning lists
                it.
            keep: Group keys whose values here are kept, such as `("lr", "weight_decay")`. Keeping
                `lr` keeps `initial_lr` and `base_lr` with it.

        Raises:
            CheckpointError: A `ValueError`; it lists what is missing, unexpected, of another shape,
                moved between groups or unusable.
        """
        load_state_dict(self, state_dict, strict=strict, keep=keep)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickling keeps: torch's three entries and our options."""
        return {**super().__getstate__(), **{key: getattr(self, key) for key in self._options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a checkpoint; keys that older files lack get their defaults."""
        super().__setstate__(state)
        for key, value in (("nonfinite", "raise"), ("clip_grad_norm", None), ("skipped_steps", 0)):
            self.__dict__.setdefault(key, value)
        self._reset()
        for group in self.param_groups:
            policy = group.get("decay_policy")
            for key, value in {**self.defaults, **OURS}.items():
                group.setdefault(key, value)
            if policy is None:
                group["decay_policy"] = self._default_policy
            if group["base_lr"] is None:
                group["base_lr"] = float(group.get("initial_lr", group["lr"]))
            self._restore_steps(group)

    def _restore_steps(self, group: dict[str, Any]) -> None:
        """Turn step counts that very old checkpoints hold as numbers into tensors."""
        for param in group["params"]:
            state = self.state.get(param)
            if state and "step" in state and not torch.is_tensor(state["step"]):
                state["step"] = torch.tensor(float(state["step"]))


def _check_dtypes(group: dict[str, Any]) -> None:
    names = group.get("param_names", range(len(group["params"])))
    for name, param in zip(names, group["params"], strict=True):
        if not (param.is_floating_point() or param.is_complex()):
            raise TypeError(f"parameter {name!r} has dtype {param.dtype}: it cannot be optimized")
