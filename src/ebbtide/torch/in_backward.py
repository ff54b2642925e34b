"""Stepping inside backward: each gradient is used and freed as soon as it is there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from ebbtide.plan import Bucket, Outcome, nonfinite_message
from ebbtide.reading import Lasting
from ebbtide.torch.base import Optimizer, new_backend
from ebbtide.torch.rows import Planner

if TYPE_CHECKING:
    from ebbtide.backends.triton.backend import TritonBackend

__all__ = ["InBackward", "step_in_backward"]


def step_in_backward(model: torch.nn.Module, optimizer: Optimizer) -> InBackward:
    """Let backward take each parameter's step as soon as its gradient is complete.

    The gradient is freed at once, so at small batch sizes gradients need no memory and the step
    finds them in the cache. `optimizer.step()` must still be called after each backward: it runs
    hooks, raises what backward has found, and closes the iteration.

    Args:
        model: Whose parameters the optimizer steps.
        optimizer: One of `ebbtide.torch`; of its parameters only those of the model are stepped
            inside backward, the others by `optimizer.step()` as usual.

    Returns:
        A handle; its `remove()` ends the arrangement.

    Raises:
        ValueError: What cannot be done so is asked for: clipping the global norm and
            `nonfinite="skip"` need all gradients before the first update, a model wrapped in
            DistributedDataParallel or sharded parameters need gradients that are reduced first.
            Also where the optimizer does so already, or has none of the model's parameters.

    Example:
        >>> import torch
        >>> from ebbtide.torch import AdamW, step_in_backward
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = AdamW(model.parameters(), lr=0.1)
        >>> handle = step_in_backward(model, optimizer)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.grad is None, optimizer.state[model.weight]["step"].item()
        (True, 1.0)
        >>> handle.remove()
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "step_in_backward takes a model and an optimizer of ebbtide.torch, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    if optimizer._in_backward is not None:
        raise ValueError("this optimizer steps inside backward already: remove() that handle first")
    _check_options(optimizer)
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            "DistributedDataParallel reduces gradients after the hooks that step_in_backward "
            "uses: the ranks would drift apart; step after backward instead"
        )
    return InBackward(model, optimizer)


def _check_options(optimizer: Optimizer) -> None:
    if optimizer.clip_grad_norm is not None or optimizer.nonfinite == "skip":
        raise ValueError(
            "step_in_backward updates a parameter before the other gradients are there: "
            'clip_grad_norm and nonfinite="skip" need all of them; step after backward instead'
        )


class InBackward:
    """The arrangement between one model and one optimizer; made by `step_in_backward`."""

    def __init__(self, model: torch.nn.Module, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        wanted = set(model.parameters())
        self._slots = [
            _Slot(param, str(name), index)
            for index, group in enumerate(optimizer.param_groups)
            for name, param in zip(optimizer._names(index), group["params"], strict=True)
            if param in wanted and param.requires_grad
        ]
        if not self._slots:
            raise ValueError("the optimizer steps no parameter of this model that takes a gradient")
        for slot in self._slots:
            if hasattr(slot.param, "_local_tensor"):
                raise ValueError(
                    f"parameter {slot.name!r} is sharded: its gradient is reduced after the hooks "
                    "that step_in_backward uses; step after backward instead"
                )
        self._handles: list[RemovableHandle] = [
            slot.param.register_post_accumulate_grad_hook(_hook(weakref.ref(self), index))
            for index, slot in enumerate(self._slots)
        ]
        optimizer._in_backward = self

    def remove(self) -> None:
        """Step after backward again."""
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._in_backward = None

    def take(self, index: int) -> None:
        """Step one parameter and free its gradient."""
        optimizer, slot = self._optimizer(), self._slots[index]
        if optimizer is None:
            return
        _check_options(optimizer)  # which can be set at any time
        if slot.stepped:
            raise RuntimeError(
                f"parameter {slot.name!r} got a second gradient before optimizer.step(): "
                "gradients cannot be accumulated while backward takes the steps"
            )
        slot.step(optimizer)
        slot.param.grad = None

    def finish(self, optimizer: Optimizer) -> None:
        """Close the iteration: raise what the steps have found.

        Raises:
            FloatingPointError: As `Optimizer.step`.
            RuntimeError: A GradScaler's fused step, which would have to come before the updates.
        """
        for slot in self._slots:
            slot.collect()
        untouched = [(slot, slot.untouched) for slot in self._slots if slot.untouched]
        for slot in self._slots:
            slot.stepped, slot.untouched = False, 0
        if hasattr(optimizer, "found_inf"):
            raise RuntimeError(
                "a GradScaler decides after backward, when step_in_backward has already updated "
                "the parameters: use bfloat16 without a scaler, or step after backward"
            )
        if untouched and optimizer.nonfinite == "raise":
            rows = [(slot.name, count, slot.param.numel()) for slot, count in untouched]
            step = optimizer.state[untouched[0][0].param].get("step", 0)
            raise FloatingPointError(nonfinite_message(rows, int(step)))


class _Slot:
    """One parameter with a table of its own."""

    def __init__(self, param: torch.Tensor, name: str, group: int) -> None:
        self.param = param
        self.name = name
        self.group = group
        self._held: dict[str, Any] | None = None  # the group, when it was last looked for
        self.stepped = False
        self.untouched = 0
        self._backend = new_backend()
        self._gpu: TritonBackend | None = None
        self._params = [[param]]
        self._structure: object = None  # of the group, when this was planned

    def collect(self) -> None:
        """Add what a GPU is known to have left untouched."""
        if self._gpu is not None and self._gpu.alarmed:
            self.untouched += sum(count for _, count, _ in self._gpu.spoilt())

    def step(self, optimizer: Optimizer) -> None:
        """Take the step of this parameter alone."""
        guard = optimizer.nonfinite != "propagate"
        backend = self._backend
        group = self._find_group(optimizer)
        outcome = backend.rerun(
            [group],
            self._params,
            None,
            optimizer.state,
            lambda _: self._read(optimizer),
            1.0,
            guard,
        )
        if outcome is None:
            with torch.no_grad():
                planner = Planner(optimizer._rule, optimizer.state)
                planner.add(self.param, self.name, 0, group)
                planner.plan.check_overlap()
                if planner.tensors:
                    raise RuntimeError(
                        f"parameter {self.name!r} is not one for the kernels: it cannot be "
                        "stepped inside backward; step after backward instead"
                    )
                planner.commit()
                if any(planner.launched.rows()):
                    outcome = self._launch(optimizer, planner, guard=guard)
                else:
                    (_, step), *_ = backend.load(planner.plan)
                    buckets = self._buckets(optimizer, step)
                    outcome = backend.run(planner.plan, buckets, grad_scale=1.0, guard=guard)
                for target, copy in planner.staged:
                    target.copy_(copy)
        self.stepped = True
        self.untouched = outcome.total
        torch._C._increment_version([self.param])

    def _find_group(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the group of the parameter, which may have been moved or replaced."""
        groups = optimizer.param_groups
        if self.group < len(groups) and groups[self.group] is self._held:
            return groups[self.group]
        for index, group in enumerate(groups):
            if any(param is self.param for param in group["params"]):
                self.group, self._held = index, group
                return group
        raise RuntimeError(f"parameter {self.name!r} is in no param group any more")

    def _launch(self, optimizer: Optimizer, planner: Planner, *, guard: bool) -> Outcome:
        if self._gpu is None:
            from ebbtide.backends.triton.backend import TritonBackend

            self._gpu = TritonBackend()
        keys = self._gpu.load(planner.launched)
        buckets = [each for _, step in keys for each in self._buckets(optimizer, step)]
        groups = [optimizer.param_groups[self.group]]
        return self._gpu.run(planner.launched, buckets, grad_scale=1.0, guard=guard, groups=groups)

    def _read(self, optimizer: Optimizer) -> Lasting | None:
        reader = optimizer._reader(self.group)
        found = reader.read_lastingly(optimizer.param_groups[self.group])
        return found if reader.structure == self._structure else None

    def _buckets(self, optimizer: Optimizer, step: int) -> list[Bucket]:
        buckets = optimizer._buckets([(self.group, step)])
        self._structure = optimizer._reader(self.group).structure
        return [each._replace(group=0) for each in buckets]


def _hook(owner: weakref.ref[InBackward], index: int) -> Callable[[torch.Tensor], Any]:
    """Return a hook that does not keep the optimizer alive: the parameter keeps its hooks."""

    def take(_: torch.Tensor) -> None:
        arrangement = owner()
        if arrangement is not None:
            arrangement.take(index)

    return take
