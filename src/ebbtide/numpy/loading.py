"""State from a checkpoint, checked and laid out like the array it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ebbtide.checkpoint import CheckpointError, lacking
from ebbtide.numpy.rows import FORMATS, Array
from ebbtide.rules import Rule

__all__ = ["alike", "loaded"]


def alike(mine: Any, saved: Any) -> Any:
    """Turn a saved hyperparameter into the kind that ours is: a number or a tuple."""
    if isinstance(mine, tuple) and isinstance(saved, list | tuple):
        return tuple(alike(each, value) for each, value in zip(mine, saved, strict=False))
    return saved.item() if hasattr(saved, "item") else saved


def loaded(
    rule: Rule, name: str, array: Array, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Array]:
    """Return the state of one array from a checkpoint; refuse what cannot be used."""
    saved = {key: value for key, value in saved.items() if value is not None}
    if "exp_avg_codes" in saved:
        raise CheckpointError(f"{name!r} has 8-bit state; save it with state_dict(portable=True)")
    missing = lacking(rule, group, saved)
    if missing:
        raise CheckpointError(f"{name!r} lacks {', '.join(missing)}")
    state = {}
    for key, value in saved.items():
        values = _as_array(value)
        if key == "step":
            if values.size != 1 or not 0 <= float(values.item()) < math.inf:
                raise CheckpointError(f"{name!r} has taken {values} steps")
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
    if values.dtype.str not in FORMATS:
        raise CheckpointError(f"{name!r} has {key} of dtype {values.dtype}")
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name!r} has {key} that holds NaN or infinity")
    if key.endswith("_sq") and (values < 0).any():
        raise CheckpointError(f"{name!r} has {key} that holds the negative value {values.min():g}")


def _state_dtype(key: str, values: Array, array: Array) -> str:
    """Return the saved dtype, where a step can work with it; see `ebbtide.torch.checkpoint`."""
    if np.float64 in (values.dtype, array.dtype):
        return "<f4" if array.dtype == np.float16 else str(array.dtype.str)
    if key.endswith("_sq") and values.dtype == np.float16:
        return "<f4"
    return str(values.dtype.str)
