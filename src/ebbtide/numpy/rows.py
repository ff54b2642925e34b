"""From arrays to rows: what can be stepped, layouts, copies to write back, addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ebbtide.plan import (
    Field,
    Format,
    Row,
    extents_of,
    layout_of,
    salt_of,
)

__all__ = ["FORMATS", "Array", "check_grad", "check_param", "row_of", "strides_of"]

Array = np.ndarray[Any, Any]

FORMATS = {"<f4": Format.FLOAT32, "<f8": Format.FLOAT64, "<f2": Format.FLOAT16}


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def strides_of(array: Array) -> tuple[int, ...]:
    """Return the strides in elements."""
    return tuple(stride // array.itemsize for stride in array.strides)


def check_param(name: str, array: Any) -> None:
    """Refuse what cannot be updated in place, by name."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"array {name!r} is a {type(array).__name__}, not a NumPy array")
    if array.dtype.str not in FORMATS:
        raise TypeError(
            f"array {name!r} has dtype {array.dtype}; float16, float32 and float64 can be stepped"
        )
    if not array.flags.writeable:
        raise ValueError(f"array {name!r} is read-only: it is updated in place; pass a copy")
    if layout_of(array.shape, strides_of(array)) == "overlapping":
        raise ValueError(
            f"elements of array {name!r} share memory (strides {array.strides}): a step would "
            "update them more than once; pass a copy"
        )


def check_grad(name: str, array: Array, grad: Any) -> None:
    """Refuse a gradient that is not of the array's shape and dtype, by name."""
    check_param(name, array)  # flags can change after construction
    if not isinstance(grad, np.ndarray):
        raise TypeError(f"gradient of {name!r} is a {type(grad).__name__}, not a NumPy array")
    if grad.dtype != array.dtype:
        raise TypeError(
            f"gradient of {name!r} has dtype {grad.dtype}, the array {array.dtype}; convert it"
        )
    if grad.shape != array.shape:
        raise ValueError(f"gradient of {name!r} has shape {grad.shape}, the array {array.shape}")


def row_of(
    name: str,
    array: Array,
    grad: Array,
    state: Mapping[str, Array],
    keys: Sequence[str],
    fresh: bool,
) -> tuple[Row, Array | None]:
    """Describe one array as a row; a copy to write back where the array has gaps."""
    copy = None
    if layout_of(array.shape, strides_of(array)) != "dense":
        copy = array = np.ascontiguousarray(array)
    keep: list[object] = [] if copy is None else [copy]
    own = extents_of(array.shape, strides_of(array))
    others = (grad, *(state[key] for key in keys))
    keep += [each for each in others if extents_of(each.shape, strides_of(each)) != own]
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
        extents=extents_of(array.shape, strides_of(array)),
        stochastic=array.dtype == np.float16,
        run_length=array.size,
        salt=salt_of(name),
        step_address=_address(state["step"]) if "step" in state else 0,
        count=0 if fresh else 1,
        keep=tuple(keep),
    )
    return row, copy


def _field(array: Array) -> Field:
    return Field(_address(array), 0, FORMATS[array.dtype.str])
