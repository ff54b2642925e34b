"""From arrays to rows: what can be stepped, layouts, copies to write back, addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebbtide.memory import Region, extents_of, layout_of
from ebbtide.plan import Field, Format, Plan, Row, salt_of
from ebbtide.rules import Rule

__all__ = ["FORMATS", "Array", "Planner", "check_grad", "check_param", "finite_sum_squares"]

Array = np.ndarray[Any, Any]

FORMATS = {"<f4": Format.FLOAT32, "<f8": Format.FLOAT64, "<f2": Format.FLOAT16}


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def _strides(array: Array) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _extents(array: Array) -> tuple[int, ...]:
    return extents_of(array.shape, _strides(array))


def check_param(name: str, array: Any) -> None:
    """Refuse what cannot be updated in place, by name."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array {name!r} is a {type(array).__name__}, not a NumPy array")
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"array {name!r} is masked: a step would not see the mask; pass its data")
    if array.dtype.str not in FORMATS:
        raise TypeError(
            f"array {name!r} has dtype {array.dtype}; float16, float32 and float64 can be stepped"
        )
    if not array.flags.writeable:
        raise ValueError(f"array {name!r} is read-only: it is updated in place; pass a copy")
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(
            f"array {name!r} has strides {array.strides} that are no multiple of its "
            f"{array.itemsize} bytes an element, as a field of a structured array has; pass a copy"
        )
    if layout_of(array.shape, _strides(array)) == "overlapping":
        raise ValueError(
            f"elements of array {name!r} share memory (strides {array.strides}): a step would "
            "update them more than once; pass a copy"
        )


def check_grad(name: str, array: Array, grad: Any) -> None:
    """Refuse a gradient that is not of the array's shape and dtype, by name."""
    check_param(name, array)  # flags can change after construction
    if not isinstance(grad, np.ndarray):
        raise TypeError(f"gradient of {name!r} is a {type(grad).__name__}, not a NumPy array")
    if isinstance(grad, np.ma.MaskedArray):
        raise TypeError(f"gradient of {name!r} is masked: a step would not see the mask")
    if grad.dtype != array.dtype:
        raise TypeError(
            f"gradient of {name!r} has dtype {grad.dtype}, the array {array.dtype}; convert it"
        )
    if grad.shape != array.shape:
        raise ValueError(f"gradient of {name!r} has shape {grad.shape}, the array {array.shape}")


@dataclass
class Planner:
    """Builds the plan of one step. Writes nothing until `commit`.

    Attributes:
        rule: The update rule.
        state: The optimizer's state by name.
        plan: What will be stepped.
        staged: (array, copy) pairs to write back after the step.
    """

    rule: Rule
    state: dict[str, dict[str, Array]]
    plan: Plan = field(init=False)
    staged: list[tuple[Array, Array]] = field(default_factory=list)
    # By name: its state, and what will be put into it.
    _changes: dict[str, tuple[dict[str, Array], dict[str, Array]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan = Plan(self.rule)

    def add(
        self, name: str, array: Array, grad: Array | None, part: int, group: Mapping[str, Any]
    ) -> None:
        """Add one array, with its row if it has a gradient.

        Raises:
            TypeError, ValueError: The array, its gradient or its state cannot be stepped.
        """
        if grad is None:
            self.plan.entries.append((array, part, None, None))
            return
        # NumPy's functions return scalars where the result has no dimensions.
        given = np.asarray(grad) if isinstance(grad, np.generic) else grad
        check_grad(name, array, given)
        keys = self.rule.state_keys(group)
        state = self.state.get(name, {})
        changes = self._missing(name, array, state, keys)
        count = 0 if any(key in changes for key in keys) else 1
        mine = array
        if not array.flags.aligned or layout_of(array.shape, _strides(array)) != "dense":
            mine = np.array(array, order="C", subok=False)
            self.staged.append((array, mine))
        merged = {**state, **changes}
        for key in keys:
            merged[key] = _fitted(name, key, merged[key], mine)
            if merged[key] is not state.get(key):
                changes[key] = merged[key]
        self._changes[name] = (state, changes)
        for each in (array, *(merged[key] for key in keys)):
            region = Region(name, _address(each), each.itemsize, _extents(each))
            self.plan.regions.append(region)
        fits = _extents(given) == _extents(mine) and given.flags.aligned
        theirs = given if fits else _like(mine, given)
        keep = tuple(each for each in (mine, theirs) if each is not array and each is not grad)
        self.plan.cacheable &= not keep
        row = _row(name, mine, theirs, [merged[key] for key in keys], merged.get("step"), count)
        row.keep = keep
        self.plan.entries.append((array, part, row, state))

    def commit(self) -> None:
        """Put new and converted state where the optimizer keeps it."""
        for name, (state, changes) in self._changes.items():
            state.update(changes)
            if state:
                self.state[name] = state

    def _missing(
        self, name: str, array: Array, state: Mapping[str, Array], keys: tuple[str, ...]
    ) -> dict[str, Array]:
        had = [key for key in keys if key in state]
        if self.rule.name == "adam" and state and len(had) < 2:
            raise ValueError(f"the state of {name!r} holds {sorted(state)}: not that of Adam")
        missing: dict[str, Array] = {}
        if "step" not in state and (self.rule.counts_steps or array.dtype == np.float16):
            # A momentum buffer without a count comes from an optimizer that keeps none.
            missing["step"] = np.array(float(bool(had)), np.float32)
        elif "step" in state and not state["step"].flags.writeable:
            missing["step"] = state["step"].copy()
        # NumPy's own 16-bit type has too little range for squares of gradients.
        dtype = np.float32 if array.dtype == np.float16 else array.dtype
        for key in keys:
            if key not in had:
                missing[key] = np.zeros_like(array, dtype=dtype, subok=False)
        return missing


def finite_sum_squares(grads: list[Array | None]) -> float:
    """Return the sum of squares of the gradients' finite elements."""
    given = [np.square(grad, dtype=np.float64) for grad in grads if grad is not None]
    return float(sum(squares[np.isfinite(squares)].sum() for squares in given))


def _fitted(name: str, key: str, value: Array, mine: Array) -> Array:
    """Return a state array that can be stepped: itself where it is writable and laid out alike."""
    if value.shape != mine.shape:
        raise ValueError(
            f"state {key!r} of {name!r} has shape {value.shape}, the array {mine.shape}"
        )
    dtype = mine.dtype if np.float64 in (value.dtype, mine.dtype) else value.dtype
    if value.dtype == np.float64 and dtype == np.float16:  # where small squares would vanish
        dtype = np.dtype(np.float32)
    fits = value.dtype == dtype and _extents(value) == _extents(mine)
    if fits and value.flags.aligned and value.flags.writeable:
        return value
    return _like(mine, value, dtype)


def _like(mine: Array, value: Array, dtype: Any = None) -> Array:
    """Copy an array into the layout of another one."""
    copy = np.empty_like(mine, dtype=dtype or mine.dtype, subok=False)
    copy[...] = value
    return copy


def _row(
    name: str, mine: Array, theirs: Array, state: list[Array], step: Array | None, count: int
) -> Row:
    return Row(
        name=name,
        numel=mine.size,
        param=_field(mine),
        grad=_field(theirs),
        state=tuple(_field(each) for each in state),
        extents=_extents(mine),
        stochastic=mine.dtype == np.float16,
        run_length=mine.size,
        salt=salt_of(name),
        step_address=0 if step is None else _address(step),
        count=count,
    )


def _field(array: Array) -> Field:
    return Field(_address(array), 0, FORMATS[array.dtype.str])
