"""The NumPy face: AdamW, Adam and SGD over arrays, updated in place.

    optimizer = AdamW({"w": w, "b": b}, lr=1e-3, weight_decay=1e-2)
    optimizer.step({"w": dw, "b": db})

State is created at the first gradient of an array, and its steps are counted from there. Views,
Fortran order and arrays with gaps are stepped rightly; overlapping or read-only memory is refused
by name before anything is written.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ebbtide.backends.cpu import CompiledBackend, available
from ebbtide.backends.pure import PureBackend
from ebbtide.checkpoint import CheckpointError, Slot, lacking, prepare
from ebbtide.hyperparameters import (
    GroupReader,
    numbers,
    validate_group,
    validate_options,
    validate_values,
)
from ebbtide.plan import (
    Bucket,
    Field,
    Format,
    Outcome,
    Plan,
    Row,
    clip_scale,
    extents_of,
    layout_of,
    nonfinite_message,
    salt_of,
)
from ebbtide.rules import ADAM, Rule
from ebbtide.rules import SGD as SGD_RULE

__all__ = ["SGD", "Adam", "AdamW"]

Array = np.ndarray[Any, Any]
Params = Mapping[str, Array] | Sequence[Array] | Sequence[Mapping[str, Any]]
Grads = Mapping[str, Array | None] | Sequence[Array | None]
DecayMask = Mapping[str, bool] | Callable[[str, Array], bool]

_FORMATS = {"<f4": Format.FLOAT32, "<f8": Format.FLOAT64, "<f2": Format.FLOAT16}


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _strides(array: Array) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


class _Optimizer:
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
        validate_options(nonfinite, clip_grad_norm)
        validate_values(self._rule, numbers(defaults))
        self.defaults = defaults
        self.nonfinite = nonfinite
        self.clip_grad_norm = clip_grad_norm
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[str, dict[str, Array]] = {}
        self.last_grad_norm: float | None = None
        self.last_step_skipped = False
        self.skipped_steps = 0
        self._decay_mask = decay_mask
        self._backend: CompiledBackend | PureBackend = (
            CompiledBackend() if available() else PureBackend()
        )
        for group in _as_groups(params):
            self.add_param_group(group)
        if not self._names:
            raise ValueError("optimizer got an empty parameter list")
        self._check_mask()

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
        if added["base_lr"] is None:
            added["base_lr"] = added["lr"]
        validate_group(self._rule, added, f" (param group {len(self.param_groups)})")
        for name, array in added["params"].items():
            if name in self._names:
                raise ValueError(f"array {name!r} appears in more than one place")
            _check_param(name, array)
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
        """Put the arrays in the order of the plan: of each group those that decay, then the rest."""
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
            GroupReader(self._rule, f" (param group {index})", decays=decays)
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
        outcome = self._rerun(given)
        if outcome is None:
            outcome = self._plan_and_run(given)
        if outcome.untouched and self.nonfinite == "raise":
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

    @property
    def _plain(self) -> bool:
        """Whether a step needs nothing of the gradients before it begins."""
        return self.clip_grad_norm is None and self.nonfinite != "skip"

    def _rerun(self, given: list[Array | None]) -> Outcome | None:
        if not self._backend.buckets or not self._plain:
            return None
        buckets = self._buckets(self._backend.buckets)
        guard = self.nonfinite != "propagate"
        return self._backend.rerun(self._lists, given, self.state, buckets, 1.0, guard)

    def _plan_and_run(self, given: list[Array | None]) -> Outcome:
        plan, staged, created = self._plan(given)
        plan.check_overlap()
        buckets = self._buckets(self._backend.load(plan))
        scale = 1.0
        if not self._plain:
            total = self._backend.sum_squares(plan)
            self.last_grad_norm = math.sqrt(total) if total >= 0 else math.nan
            if self.nonfinite == "skip" and not math.isfinite(total):
                self.last_step_skipped = True
                self.skipped_steps += 1
                self._backend.forget()
                return Outcome([])
            if math.isfinite(total):
                scale = clip_scale(total, self.clip_grad_norm)
        self.state.update(created)
        guard = self.nonfinite != "propagate"
        outcome = self._backend.run(plan, buckets, grad_scale=scale, guard=guard)
        for array, copy in staged:
            array[...] = copy
        return outcome

    def _plan(
        self, given: list[Array | None]
    ) -> tuple[Plan, list[tuple[Array, Array]], dict[str, dict[str, Array]]]:
        """Check every gradient and describe the step as rows; writes nothing of the user's."""
        plan, staged, created = Plan(self._rule), [], {}
        for (name, array, part), grad in zip(self._order, given, strict=True):
            if grad is None:
                plan.entries.append((array, part, None, None))
                continue
            _check_grad(name, array, grad)
            group = self.param_groups[part // 2]
            state, fresh = self._state_of(name, array, group)
            if fresh:
                created[name] = state
            row, copy = _row(name, array, grad, state, self._rule.state_keys(group), fresh)
            if copy is not None:
                staged.append((array, copy))
            plan.cacheable &= not row.keep
            plan.entries.append((array, part, row, state))
        return plan, staged, created

    def _state_of(
        self, name: str, array: Array, group: Mapping[str, Any]
    ) -> tuple[dict[str, Array], bool]:
        keys = self._rule.state_keys(group)
        if name in self.state and all(key in self.state[name] for key in keys):
            return self.state[name], False
        # numpy's own 16-bit type has too little range for squares of gradients.
        dtype = np.float32 if array.dtype == np.float16 else array.dtype
        state: dict[str, Array] = dict(self.state.get(name, {}))
        if self._rule.counts_steps and "step" not in state:
            state["step"] = np.zeros((), np.float32)
        for key in keys:
            state.setdefault(key, np.zeros_like(array, dtype=dtype, subok=False))
        return state, True

    def _step_of(self, name: str) -> int:
        state = self.state.get(name, {})
        return int(state["step"]) if "step" in state else 0

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
        loading = prepare(self._rule, type(self).__name__, state_dict, slots, groups, keep, _alike)
        state: dict[str, dict[str, Array]] = {}
        for position, values in loading.states.items():
            name, number = str(slots[position].name), slots[position].group
            try:
                state[name] = _loaded(
                    self._rule, name, self._names[name], loading.groups[number], values
                )
            except CheckpointError as error:
                loading.difference.refused.append(str(error))
        if loading.refused(strict=strict):
            raise loading.refusal()
        for number, group in enumerate(loading.groups):
            validate_group(self._rule, group, f" (saved for group {number})")
        if report := loading.report():
            warnings.warn(report, stacklevel=2)
        for group, new in zip(groups, loading.groups, strict=True):
            group.update(new)
        self.state = state
        self._lay_out()


class AdamW(_Optimizer):
    """Adam with decoupled weight decay, over NumPy arrays.

    The formula is `ebbtide.reference.adam`; what `weight_decay` removes is
    `ebbtide.weight_decay.decay_share`.

    Args:
        params: Arrays by name, a list of arrays, or a list of groups, each a mapping with
            `params` and hyperparameters of its own. float16, float32 or float64, updated in place.
        lr: Learning rate, at least 0; change it in `param_groups` between steps.
        betas: Decay rates of the two moving averages, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: λ, at least 0, in the convention of `decay_policy`.
        amsgrad: Divide by the running maximum of the second moment.
        maximize: Climb instead of descend.
        decay_policy: `"l2"`, `"decoupled"`, `"independent"` or `"corrected"`.
        cautious: Decay only where the step moves a parameter towards zero.
        base_lr: Learning rate that `independent` and `corrected` divide by; the group's lr if `None`.
        bias_correction: Divide the moments by 1 - βᵗ.
        decay_mask: Which arrays decay: a mapping from every name to a bool, or a function of name
            and array. By default arrays of two dimensions or more.
        nonfinite: `"raise"` leaves elements with a non-finite gradient untouched and raises after the step;
            `"skip"` drops the whole step; `"propagate"` computes with them.
        clip_grad_norm: Clip the global norm of all gradients to this; the gradients are not written.

    Raises:
        TypeError, ValueError: Named after the array or hyperparameter at fault.

    Example:
        >>> import numpy as np
        >>> w, b = np.ones((2, 2), np.float32), np.zeros(2, np.float32)
        >>> optimizer = AdamW({"w": w, "b": b}, lr=0.1, weight_decay=0.5)
        >>> optimizer.step({"w": np.zeros((2, 2), np.float32), "b": np.ones(2, np.float32)})
        >>> w[0].round(6).tolist() == [np.float32(0.95)] * 2, (-b).round(6)
        (True, array([0.1, 0.1], dtype=float32))

    References:
        Loshchilov & Hutter 2019, arXiv:1711.05101. Deviation: the default policy multiplies λ by
        lr, as PyTorch does; `decay_policy="independent"` is the paper's.
    """

    _rule = ADAM
    _default_policy = "decoupled"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decay_policy: str | None = None,
        cautious: bool = False,
        base_lr: float | None = None,
        bias_correction: bool = True,
        decay_mask: DecayMask | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decay_policy": decay_policy or self._default_policy,
            "cautious": cautious,
            "base_lr": base_lr,
            "bias_correction": bias_correction,
            "seed": 0,
        }
        super().__init__(
            params,
            defaults,
            decay_mask=decay_mask,
            nonfinite=nonfinite,
            clip_grad_norm=clip_grad_norm,
        )


class Adam(AdamW):
    """Adam; its weight decay is L2 unless `decay_policy` says otherwise. Arguments as in `AdamW`.

    Example:
        >>> import numpy as np
        >>> w = np.ones(3)
        >>> Adam([w], lr=0.1).step([np.full(3, 7.0)])
        >>> w.round(6).tolist()
        [0.9, 0.9, 0.9]

    References:
        Kingma & Ba 2015, arXiv:1412.6980.
    """

    _default_policy = "l2"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class SGD(_Optimizer):
    """Stochastic gradient descent; with `decay_policy="decoupled"` it is SGDW.

    The formula is `ebbtide.reference.sgd`.

    Args:
        params: As in `AdamW`.
        lr: Learning rate, at least 0.
        momentum: Share of the buffer kept, at least 0; 0 keeps no buffer.
        dampening: Share of the gradient left out of the buffer, not applied at the first step.
        weight_decay: λ, at least 0, in the convention of `decay_policy`.
        nesterov: Look ahead by one more share of the buffer.
        maximize: Climb instead of descend.
        decay_policy: As in `AdamW`; `"l2"` by default.
        cautious: As in `AdamW`.
        base_lr: As in `AdamW`.
        decay_mask: As in `AdamW`.
        nonfinite: As in `AdamW`.
        clip_grad_norm: As in `AdamW`.

    Example:
        >>> import numpy as np
        >>> w = np.ones((1, 2))
        >>> SGD([w], lr=0.1, weight_decay=0.5, decay_policy="decoupled").step([np.ones((1, 2))])
        >>> w.round(6).tolist()
        [[0.85, 0.85]]
    """

    _rule = SGD_RULE

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decay_policy: str = "l2",
        cautious: bool = False,
        base_lr: float | None = None,
        decay_mask: DecayMask | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decay_policy": decay_policy,
            "cautious": cautious,
            "base_lr": base_lr,
            "bias_correction": True,
            "seed": 0,
        }
        super().__init__(
            params,
            defaults,
            decay_mask=decay_mask,
            nonfinite=nonfinite,
            clip_grad_norm=clip_grad_norm,
        )


def _as_groups(params: Params) -> list[Mapping[str, Any]]:
    if isinstance(params, Mapping):
        return [{"params": params}]
    if isinstance(params, np.ndarray):
        raise TypeError("params must be a mapping or a list of arrays, got a single array")
    listed = list(params)
    if listed and all(isinstance(item, Mapping) for item in listed):
        return [item for item in listed if isinstance(item, Mapping)]
    return [{"params": listed}]


def _named(params: Any, *, start: int) -> dict[str, Array]:
    if isinstance(params, Mapping):
        return dict(params)
    return {str(start + i): array for i, array in enumerate(params)}


def _check_param(name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array {name!r} is a {type(array).__name__}, not a NumPy array")
    if array.dtype.str not in _FORMATS:
        raise TypeError(
            f"array {name!r} has dtype {array.dtype}; float16, float32 and float64 can be stepped"
        )
    if not array.flags.writeable:
        raise ValueError(f"array {name!r} is read-only: it is updated in place; pass a copy")
    if layout_of(array.shape, _strides(array)) == "overlapping":
        raise ValueError(
            f"elements of array {name!r} share memory (strides {array.strides}): a step would "
            "update them more than once; pass a copy"
        )


def _check_grad(name: str, array: Array, grad: Any) -> None:
    _check_param(name, array)  # flags can change after construction
    if not isinstance(grad, np.ndarray):
        raise TypeError(f"gradient of {name!r} is a {type(grad).__name__}, not a NumPy array")
    if grad.dtype != array.dtype:
        raise TypeError(
            f"gradient of {name!r} has dtype {grad.dtype}, the array {array.dtype}; convert it"
        )
    if grad.shape != array.shape:
        raise ValueError(f"gradient of {name!r} has shape {grad.shape}, the array {array.shape}")


def _row(
    name: str,
    array: Array,
    grad: Array,
    state: Mapping[str, Array],
    keys: Sequence[str],
    fresh: bool,
) -> tuple[Row, Array | None]:
    """Describe one array as a row; a copy to write back where the array has gaps."""
    copy = None
    if layout_of(array.shape, _strides(array)) != "dense":
        copy = array = np.ascontiguousarray(array)
    keep: list[object] = [] if copy is None else [copy]
    for each in (grad, *(state[key] for key in keys)):
        if extents_of(each.shape, _strides(each)) != extents_of(array.shape, _strides(array)):
            keep.append(each)
    if keep:  # something lies differently: work on copies in the array's layout
        relaid = np.empty_like(array)
        relaid[...] = grad
        grad = relaid
        keep.append(relaid)
    row = Row(
        name=name,
        numel=array.size,
        param=_field(array),
        grad=_field(grad),
        state=tuple(_field(state[key]) for key in keys),
        extents=extents_of(array.shape, _strides(array)),
        stochastic=array.dtype == np.float16,
        run_length=array.size,
        salt=salt_of(name),
        step_address=_address(state["step"]) if "step" in state else 0,
        count=0 if fresh else 1,
        keep=tuple(keep),
    )
    return row, copy


def _field(array: Array) -> Field:
    return Field(_address(array), 0, _FORMATS[array.dtype.str])


def _alike(mine: Any, saved: Any) -> Any:
    """Turn a saved hyperparameter into the kind that ours is: a number or a tuple."""
    if isinstance(mine, tuple) and isinstance(saved, list | tuple):
        return tuple(_alike(each, value) for each, value in zip(mine, saved, strict=False))
    return saved.item() if hasattr(saved, "item") else saved


def _loaded(
    rule: Rule, name: str, array: Array, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Array]:
    saved = {key: value for key, value in saved.items() if value is not None}
    missing = lacking(rule, group, saved)
    if missing:
        raise CheckpointError(f"{name!r} lacks {', '.join(missing)}")
    state = {}
    for key, value in saved.items():
        values = _as_array(value)
        if key == "step":
            state[key] = values.astype(np.float32).reshape(()).copy()
        else:
            _check_state(name, key, values, array)
            state[key] = np.empty_like(array, dtype=_state_dtype(key, values, array), subok=False)
            state[key][...] = values
    return state


def _as_array(value: Any) -> Array:
    """Return an array of a saved value; a bfloat16 tensor becomes float32, as NumPy lacks it."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _check_state(name: str, key: str, values: Array, array: Array) -> None:
    if values.shape != array.shape:
        raise CheckpointError(f"{name!r} has {key} of shape {values.shape}")
    if values.dtype.str not in _FORMATS:
        raise CheckpointError(f"{name!r} has {key} of dtype {values.dtype}")
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name!r} has {key} that holds NaN or infinity")
    if key.endswith("_sq") and (values < 0).any():
        raise CheckpointError(f"{name!r} has {key} that holds the negative value {values.min():g}")


def _state_dtype(key: str, values: Array, array: Array) -> str:
    """Return the saved dtype, where a step can work with it; see `ebbtide.torch.checkpoint`."""
    if np.float64 in (values.dtype, array.dtype):
        return str(array.dtype.str)
    if key.endswith("_sq") and values.dtype == np.float16:
        return "<f4"
    return str(values.dtype.str)
