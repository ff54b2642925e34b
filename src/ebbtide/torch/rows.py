"""From tensors to rows: state created, layouts checked, copies staged, addresses taken."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from ebbtide.backends.torch_ops import TensorRow
from ebbtide.backends.triton.support import interprets
from ebbtide.checkpoint import unwrapped
from ebbtide.plan import BLOCK, Plan, Row, salt_of
from ebbtide.rules import Rule
from ebbtide.torch import eight_bits
from ebbtide.torch.fitting import fitted, fitted_step, is_staged, lies_as_it_reads
from ebbtide.torch.ranks import distributed, local_grad, local_of, shard_offset
from ebbtide.torch.storage import (
    Storage,
    conversion,
    fields_of,
    shape_of,
    storage_of,
    zeros,
)
from ebbtide.torch.tensors import (
    FORMATS,
    LOW_PRECISION,
    check,
    check_memory,
    extents,
    field_of,
    has_device_numbers,
    kernel_takes,
    launches,
    region_of,
    shows_memory,
)

__all__ = ["FORMATS", "Planner"]

State = dict[str, Any]


@dataclass
class Planner:
    """Builds the plan of one step. Writes nothing until `commit`.

    Attributes:
        rule: The update rule.
        state: The optimizer's state.
        counts_on_device: A GPU may drop the step, so it has to count the steps.
        plan: What the kernels of the CPU step.
        launched: What Triton's kernels step, on GPUs.
        tensors: What torch operations step: whatever no kernel takes.
        grads: Gradients of what is launched or stepped by torch operations, by entry.
        staged: (tensor, copy) pairs to write back after the step.
    """

    rule: Rule
    state: MutableMapping[torch.Tensor, State]
    counts_on_device: bool = False
    plan: Plan = field(init=False)
    launched: Plan = field(init=False)
    tensors: list[TensorRow] = field(default_factory=list)
    grads: dict[int, torch.Tensor] = field(default_factory=dict)
    staged: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    # By parameter: its state dict, what will be put into it, what will be taken out.
    _changes: dict[torch.Tensor, tuple[State, State, list[str]]] = field(default_factory=dict)
    _counters: set[int] = field(default_factory=set)
    _interprets: bool = field(default_factory=interprets)

    def __post_init__(self) -> None:
        self.plan = Plan(self.rule)
        self.launched = Plan(self.rule)

    def add(self, param: torch.Tensor, name: str, index: int, group: Mapping[str, Any]) -> None:
        """Add one parameter, with its row if it has a gradient.

        Raises:
            AssertionError, RuntimeError, TypeError, ValueError: The parameter, its gradient or its
                state cannot be stepped; it is named.
        """
        grad = param.grad
        if grad is None or param in self._changes:  # one that is listed twice is stepped once
            self.plan.cacheable &= grad is None
            self._enter(param, index)
            return
        check(name, param, grad, group, rule=self.rule.name)
        keys = self.rule.state_keys(group)
        if grad.is_sparse and (keys or not _is_plain(group)):
            grad = grad.to_dense()
        launched = (self._interprets or not param.is_cpu) and launches(param, grad, group)
        kernels = launched or _is_for_kernels(param, grad, group)
        forced = launched and (self.counts_on_device or has_device_numbers(group))
        storage = storage_of(name, param, group)
        _check_storage(name, param, storage, kernels=kernels)
        state = self.state.get(param, {})
        count = 1 if all(key in state for key in keys) else 0
        changes, gone = conversion(param, state, keys, storage)
        known = {key: value for key, value in {**state, **changes}.items() if key not in gone}
        changes |= self._missing(param, known, keys, name, group, storage, counts=forced)
        home: torch.device | None = None  # where the step count must be
        if launched:
            home = param.device if forced or _steps_on_device(group) else None
        elif kernels:
            home = torch.device("cpu")
        arrays = storage.arrays(keys)
        self._fit(param, {**known, **changes}, changes, name, arrays, storage, home, kernels)
        self._changes[param] = (state, changes, gone)
        merged = {**known, **changes}
        for tensor in map(local_of, (param, *(merged[key] for key in arrays))):
            if shows_memory(tensor):
                self.plan.regions.append(region_of(name, tensor))
        if kernels:
            plan = self.launched if launched else self.plan
            row = self._row(param, grad, name, keys, merged, storage, count)
            if launched:
                row.device = str(param.device)
                step = merged.get("step")
                row.counts_on_device = step is not None and (home is not None or not step.is_cpu)
                self.grads[len(plan.entries)] = local_grad(name, param, grad)
            plan.cacheable &= not row.keep
            self._enter(param, index, row, state, plan)
        else:
            _check_differentiable(name, param, merged, group)
            stochastic = storage.stochastic
            self._add_tensors(param, grad, name, keys, index, group, state, count, stochastic)

    def _enter(
        self,
        param: torch.Tensor,
        index: int,
        row: Row | None = None,
        state: State | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Give a parameter its entry: the same place in both plans, its row in one of them."""
        for each in (self.plan, self.launched):
            mine = (row, state) if each is plan else (None, None)
            if row is not None and each is not plan:
                each.elsewhere.add(len(each.entries))
            each.entries.append((param, index, *mine))

    def commit(self) -> None:
        """Put new and converted state where the optimizer keeps it."""
        for param, (state, changes, gone) in self._changes.items():
            for key in gone:
                del state[key]
            state.update(changes)
            if state:
                self.state[param] = state

    def _missing(
        self,
        param: torch.Tensor,
        state: State,
        keys: tuple[str, ...],
        name: str,
        group: Mapping[str, Any],
        storage: Storage,
        *,
        counts: bool,
    ) -> State:
        """Create the state that the parameter lacks, in torch's order of keys."""
        missing: State = {}
        had = [
            key for key in keys if state.get(f"{key}_codes" if storage.coded else key) is not None
        ]
        lone = [key for key in had if storage.coded and state.get(f"{key}_scale") is None]
        if lone:
            raise RuntimeError(
                f"the state of parameter {name!r} holds {lone[0]}_codes without {lone[0]}_scale, "
                "so the codes mean nothing; clear it"
            )
        if self.rule.name == "adam" and state and len(had) < 2:
            raise RuntimeError(
                f"the state of parameter {name!r} holds {sorted(state)}: not that of Adam; clear it"
            )
        device = param.device if counts or _steps_on_device(group) else torch.device("cpu")
        counts = counts or self.rule.counts_steps or param.dtype in LOW_PRECISION
        if counts and "step" not in state:
            # A momentum buffer without a count comes from an optimizer that keeps none.
            missing["step"] = torch.full((), bool(had), dtype=_step_dtype(group), device=device)
        for key in storage.arrays(keys):
            if state.get(key) is None:
                missing[key] = zeros(key, param, storage)
        return missing

    def _fit(
        self,
        param: torch.Tensor,
        state: State,
        changes: State,
        name: str,
        arrays: tuple[str, ...],
        storage: Storage,
        home: torch.device | None,
        kernels: bool,
    ) -> None:
        """Convert what lies elsewhere or otherwise than a step needs; note it in `changes`."""
        for key in arrays:
            value = state[key]
            shape = shape_of(key, param, storage.residual_bits)
            kind = value.is_complex() == param.is_complex() and storage.takes(key, value.dtype)
            if value.shape != shape or not kind:
                raise RuntimeError(
                    f"state {key!r} of parameter {name!r} is {value.dtype} of shape "
                    f"{tuple(value.shape)}, the parameter {param.dtype} of {tuple(param.shape)}"
                )
            check_memory(f"state {key!r} of parameter {name!r}", value)
            fit = fitted(key, value, param, storage, kernels=kernels)
            if fit is not value:
                changes[key] = fit
        if "step" in state:
            step = state["step"]
            if isinstance(step, torch.Tensor):  # old checkpoints hold numbers
                check_memory(f"state 'step' of parameter {name!r}", step)
            fit = fitted_step(step, home)
            if shows_memory(fit):
                if fit.data_ptr() in self._counters:  # one counter for several parameters
                    fit = fit.clone()
                self._counters.add(fit.data_ptr())
            if fit is not step:
                changes["step"] = fit

    def _row(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        name: str,
        keys: tuple[str, ...],
        state: State,
        storage: Storage,
        count: int,
    ) -> Row:
        mine, theirs = local_of(param.detach()), local_grad(name, param, grad)
        # What is not the parameter's gradient itself (a dense copy of a sparse one, partial sums
        # added up) must live until the step is taken, and is not what the next one will see.
        own = grad is param.grad and theirs is local_of(grad)
        keep: list[object] = [] if own else [theirs]
        if is_staged(mine, storage):
            target, mine = mine, mine.clone(memory_format=torch.contiguous_format)
            mine = mine.resolve_conj().resolve_neg()
            self.staged.append((target, mine))
            keep.append(mine)
        dtype = mine.dtype if torch.float64 in (mine.dtype, theirs.dtype) else theirs.dtype
        alike = theirs.dtype == dtype and extents(theirs) == extents(mine)
        if not (alike and lies_as_it_reads(theirs)):
            theirs = torch.empty_like(mine, dtype=dtype).copy_(theirs)
            keep.append(theirs)
        step = state.get("step")
        numel = mine.numel() * (2 if mine.is_complex() else 1)
        run_length, lead, first_block = _blocks(param, storage, numel)
        if storage.coded:
            fields = fields_of(state, keys)
        else:
            fields = tuple(field_of(local_of(state[key])) for key in keys)
        residual = local_of(state["residual"]).data_ptr() if storage.residual_bits else 0
        return Row(
            name=name,
            numel=numel,
            param=field_of(mine),
            grad=field_of(theirs),
            state=fields,
            extents=extents(mine),
            residual=residual,
            residual_bits=storage.residual_bits,
            stochastic=storage.stochastic,
            run_length=run_length,
            lead=lead,
            first_block=first_block,
            salt=salt_of(unwrapped(name)),
            step_address=0 if step is None else step.data_ptr(),
            step_is_double=step is not None and step.dtype == torch.float64,
            count=count,
            local=distributed(param),
            # A negative of several elements has gaps: it is the imaginary part of a conjugate.
            lazy_grad=mine.is_complex() or mine.numel() == 1,
            keep=tuple(keep),
        )

    def _add_tensors(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        name: str,
        keys: tuple[str, ...],
        index: int,
        group: Mapping[str, Any],
        state: State,
        count: int,
        stochastic: bool,
    ) -> None:
        self.tensors.append(
            TensorRow(
                entry=len(self.plan.entries),
                group=index,
                name=name,
                param=local_of(param),
                grad=local_grad(name, param, grad),
                state=state,
                keys=keys,
                count=count,
                differentiable=_is_differentiable(group),
                # A tensor that only stands for another has no numbers to read either.
                capturable=bool(group.get("capturable")) or is_fake(local_of(param)),
                salt=salt_of(unwrapped(name)),
                offset=shard_offset(param) if param.dtype in LOW_PRECISION else 0,
                stochastic=stochastic,
            )
        )
        self.plan.cacheable = False
        self.grads[len(self.plan.entries)] = self.tensors[-1].grad
        self._enter(param, index)


def _is_differentiable(group: Mapping[str, Any]) -> bool:
    return bool(group.get("differentiable")) and torch.is_grad_enabled()


def _check_differentiable(
    name: str, param: torch.Tensor, state: State, group: Mapping[str, Any]
) -> None:
    if not _is_differentiable(group):
        return
    if "step" in state and state["step"].requires_grad:
        raise RuntimeError("`requires_grad` is not supported for `step` in differentiable mode")
    if distributed(param):
        raise RuntimeError(f"parameter {name!r} is a DTensor: differentiable needs plain ones")


def _is_for_kernels(param: torch.Tensor, grad: torch.Tensor, group: Mapping[str, Any]) -> bool:
    return (
        not group.get("differentiable")
        and kernel_takes(local_of(param))
        and kernel_takes(local_of(grad))
    )


def _is_plain(group: Mapping[str, Any]) -> bool:
    """Whether a sparse gradient stays sparse: nothing but θ ← θ·(1 - decay) - lr·g."""
    l2 = group["decay_policy"] == "l2" and group["weight_decay"] != 0
    return not (l2 or group["cautious"] or group["differentiable"])


def _check_storage(name: str, param: torch.Tensor, storage: Storage, *, kernels: bool) -> None:
    """Refuse what cannot be stored as the group asks.

    Raises:
        RuntimeError: The kernels do not take the parameter, or it is sharded by other than rows.
    """
    obstacle = storage.obstacle(param)
    if not kernels and (storage.coded or storage.residual_bits):
        obstacle = "it is stepped by torch operations, which keep no 8-bit state and no residual"
    if obstacle:
        raise RuntimeError(
            f"parameter {name!r} cannot be kept with state_format and master_format as asked: "
            f"{obstacle}; put it into a group with state_format=None, master_format=None"
        )


def _blocks(param: torch.Tensor, storage: Storage, numel: int) -> tuple[int, int, int]:
    """Return (run_length, lead, first_block) of a row."""
    rounds = storage.coded or storage.residual_bits or param.dtype in LOW_PRECISION
    offset = shard_offset(param) if rounds else 0
    if not storage.coded:
        return numel, offset % BLOCK, offset // BLOCK
    if numel == 0:
        return 0, 0, 0
    run_length = numel // local_of(param).shape[0]
    _, blocks = eight_bits.blocks_of(param.shape)
    return run_length, 0, offset // run_length * blocks


def _steps_on_device(group: Mapping[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))


def _step_dtype(group: Mapping[str, Any]) -> torch.dtype:
    if group.get("fused") or torch.get_default_dtype() != torch.float64:
        return torch.float32
    return torch.float64
