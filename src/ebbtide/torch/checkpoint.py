"""Loading state into an optimizer, and files that a kill while saving cannot break."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ebbtide import checkpoint
from ebbtide.checkpoint import CheckpointError, Loading, Slot
from ebbtide.hyperparameters import numbers, validate_group
from ebbtide.notice import warn
from ebbtide.torch import ranks
from ebbtide.torch.rows import FORMATS
from ebbtide.torch.storage import (
    MOMENTS,
    conversion,
    is_coded,
    plain,
    problem_of_coded,
    storage_of,
)
from ebbtide.torch.tensors import LOW_PRECISION

if TYPE_CHECKING:
    from ebbtide.torch.persistence import Persistent

__all__ = ["CheckpointError", "load", "load_state_dict", "problem_of", "save"]

_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def save(obj: object, path: str | os.PathLike[str]) -> None:
    """Save like `torch.save`, but so that a kill at any moment leaves the old or the new file.

    The file is written beside the old one, flushed to the disk and then put in its place; the old
    one stays as `PATH.previous`. It ends with a checksum that other readers pass over: `torch.load`
    reads it too.

    Args:
        obj: Anything that `torch.save` takes, such as
            `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`.
        path: Where to. The folder must exist.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is untouched.

    Example:
        >>> import tempfile, torch
        >>> path = tempfile.mkdtemp() + "/checkpoint.pt"
        >>> save({"step": 1}, path)
        >>> save({"step": 2}, path)
        >>> load(path), torch.load(path + ".previous")
        ({'step': 2}, {'step': 1})
    """
    checkpoint.write_file(path, lambda file: torch.save(obj, file))


def load(
    path: str | os.PathLike[str],
    map_location: Any = None,
    *,
    weights_only: bool = True,
    mmap: bool = False,
) -> Any:
    """Load like `torch.load`; where the file is broken, name it and load the previous one.

    Args:
        path: Of a file by `save`; any file of `torch.save` will do.
        map_location: As in `torch.load`.
        weights_only: As in `torch.load`; `False` runs code that the file holds.
        mmap: As in `torch.load`: read tensors from the disk when they are used, so that loading an
            optimizer needs no second copy of its state in memory.

    Raises:
        FileNotFoundError: There is neither this file nor a previous one.
        CheckpointError: Both are broken.
    """
    chosen, problems = checkpoint.whole_file(path)
    if problems:
        warn(f"{'; '.join(problems)}; loading {chosen} instead")
    return torch.load(chosen, map_location, weights_only=weights_only, mmap=mmap)


def load_state_dict(
    optimizer: Persistent, state_dict: Mapping[str, Any], *, strict: bool, keep: Collection[str]
) -> None:
    """Load a state dict with its hooks, all or nothing; see `Optimizer.load_state_dict`."""
    state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    with torch.no_grad():
        state, groups = _prepared(optimizer, state_dict, strict=strict, keep=keep)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _prepared(
    optimizer: Persistent, state_dict: Mapping[str, Any], *, strict: bool, keep: Collection[str]
) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    """Return the new state and the new groups; changes nothing."""
    groups = optimizer.param_groups
    loading = checkpoint.prepare(
        optimizer._rule, type(optimizer).__name__, state_dict, _slots(groups), groups, keep, _alike
    )
    _keep_names(loading, state_dict["param_groups"])
    _check_groups(optimizer, loading.groups)
    _leave_out_cast_residuals(loading)
    state = _loaded_state(optimizer, loading)
    if _anywhere(loading.refused(strict=strict), groups):
        raise loading.refusal()
    loading.notes += _absent(optimizer, loading)
    report = loading.report(lost=_lost(optimizer, loading))
    if report:
        warn(report)
    return state, loading.groups


def _lost(optimizer: Persistent, loading: Loading) -> bool:
    """Whether a file without moments replaces some, or comes from a run that had some.

    A file that changes nothing says nothing either: trainers load an optimizer's own state into it
    before the first step.
    """
    groups = optimizer.param_groups
    if any(loading.states.values()) or not any(optimizer._rule.state_keys(g) for g in groups):
        return False
    live = any(isinstance(each, Mapping) and each for each in optimizer.state.values())
    return live or _settings(groups) != _settings(loading.groups)


def _absent(optimizer: Persistent, loading: Loading) -> list[str]:
    """Name the parameters that are to be trained and without state in a file that holds some.

    One that has never had a gradient is right without; only the user can tell it from a loss.
    """
    slots = _slots(loading.groups)
    params = [(param, group) for group in loading.groups for param in group["params"]]
    names = [
        slot.name or f"parameter {slot.index}"
        for slot, (param, group) in zip(slots, params, strict=True)
        if param.requires_grad
        and slot.index in loading.match.pairs
        and slot.index not in loading.states
        and optimizer._rule.state_keys(group)
        and (optimizer.state.get(param) or not any(optimizer.state.values()))
    ]
    if not (names and loading.states):
        return []
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return [
        f"no state was saved for {', '.join(names[:8])}{more}: steps are counted from the first"
    ]


def _settings(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    apart = ("params", "param_names")
    return [{key: value for key, value in g.items() if key not in apart} for g in groups]


def _anywhere(refused: bool, groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any rank refuses: one that stops alone would leave the others waiting."""
    return ranks.any_rank(refused, ranks.meshes_of(p for group in groups for p in group["params"]))


def _slots(groups: Iterable[Mapping[str, Any]]) -> list[Slot]:
    slots: list[Slot] = []
    for number, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            slots.append(Slot(len(slots), name, number, tuple(param.shape)))
    return slots


def _alike(mine: Any, saved: Any) -> Any:
    """Turn a saved hyperparameter into the kind that ours is: number, tensor or tuple."""
    if isinstance(mine, tuple) and isinstance(saved, list | tuple):
        return tuple(_alike(each, value) for each, value in zip(mine, saved, strict=False))
    if isinstance(mine, torch.Tensor):
        return torch.full_like(mine, float(saved))
    if isinstance(saved, torch.Tensor) and isinstance(mine, int | float):
        return saved.item()
    return saved


def _keep_names(loading: Loading, saved: list[Mapping[str, Any]]) -> None:
    """Adopt the file's names where there are none here and the groups correspond."""
    merged, found = loading.groups, loading.match
    if any("param_names" in group for group in merged) or not found.same_grouping:
        return
    named = [saved[source[0]].get("param_names") for source in found.sources if source]
    flat = [name for names in named if names for name in names]
    if len(named) != len(merged) or not all(named) or flat == [str(i) for i in range(len(flat))]:
        return
    for group, names in zip(merged, named, strict=True):
        group["param_names"] = list(names or ())


def _check_groups(optimizer: Persistent, merged: list[dict[str, Any]]) -> None:
    for number, group in enumerate(merged):
        try:
            validate_group(optimizer._rule, numbers(group), f" (saved for group {number})")
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{error}: nothing was loaded") from error


def _leave_out_cast_residuals(loading: Loading) -> None:
    """Leave out what `torch.optim`, which knows no residuals, has cast to the parameter's dtype.

    It has moved the parameters since without them.
    """
    cast = [
        at
        for at, values in loading.states.items()
        if isinstance(values.get("residual"), torch.Tensor)
        and values["residual"].is_floating_point()
    ]
    for at in cast:
        values = loading.states[at]
        loading.states[at] = {key: each for key, each in values.items() if key != "residual"}
    if cast:
        loading.notes.append(
            f"the residuals of {len(cast)} parameters are left out, since torch.optim has cast "
            "them: the parameters count as they are"
        )


def _loaded_state(optimizer: Persistent, loading: Loading) -> dict[Any, Any]:
    """Copy the state of every pair; what cannot be used is added to the difference."""
    state: dict[Any, Any] = defaultdict(dict, loading.rest)
    params = [(param, group) for group in loading.groups for param in group["params"]]
    slots = _slots(loading.groups)
    for position, values in loading.states.items():
        (param, group), slot = params[position], slots[position]
        name = slot.name or f"parameter {position}"
        try:
            state[param] = _loaded(optimizer, name, param, group, values)
        except CheckpointError as error:
            loading.difference.refused.append(str(error))
    return state


def _loaded(
    optimizer: Persistent,
    name: str,
    param: torch.Tensor,
    group: Mapping[str, Any],
    values: Mapping[str, Any],
) -> dict[str, Any]:
    values = {key: value for key, value in values.items() if value is not None}
    lacking = checkpoint.lacking(optimizer._rule, group, values)
    if lacking:
        raise CheckpointError(f"{name!r} lacks {', '.join(lacking)}")
    # Arrays of the NumPy face become tensors.
    values = {
        key: torch.tensor(value) if hasattr(value, "__array_interface__") else value
        for key, value in values.items()
    }
    storage = storage_of(name, param, group)
    for key, value in values.items():
        if _is_coded_array(key, values):
            problem = problem_of_coded(key, value, param, values)
            if problem:
                raise CheckpointError(f"{name!r} has {key} with {problem}")
    if not storage.coded:
        values = plain(values)
    loaded: dict[str, Any] = {}
    for key, value in values.items():
        if key == "step":
            loaded[key] = _step(name, value, param, group)
        elif isinstance(value, torch.Tensor):
            coded = _is_coded_array(key, values)
            loaded[key] = _placed(name, value, param) if coded else _array(name, key, value, param)
        else:
            loaded[key] = value
    put, gone = conversion(param, loaded, optimizer._rule.state_keys(group), storage)
    return {key: value for key, value in {**loaded, **put}.items() if key not in gone}


def _is_coded_array(key: str, values: Mapping[str, Any]) -> bool:
    own = is_coded(values) and key.startswith(MOMENTS) and key.endswith(("_codes", "_scale"))
    return isinstance(values[key], torch.Tensor) and (own or key == "residual")


def _step(name: str, value: Any, param: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Return the count as a tensor of its own, where a step looks for it."""
    count = float(value)
    if not (math.isfinite(count) and count >= 0):
        raise CheckpointError(f"{name!r} has taken {count} steps")
    double = isinstance(value, torch.Tensor) and value.dtype == torch.float64
    double |= not isinstance(value, torch.Tensor) and torch.get_default_dtype() == torch.float64
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(
        count,
        dtype=torch.float64 if double and not on_device else torch.float32,
        device=ranks.local_of(param).device if on_device else "cpu",
    )


def _array(name: str, key: str, value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    known = key in (*_SECOND_MOMENTS, "exp_avg", "momentum_buffer")
    if not known and (value.shape != param.shape or value.dtype not in FORMATS):
        return value.detach().clone()  # of another library: carried along
    if value.shape != param.shape:
        raise CheckpointError(f"{name!r} has {key} of shape {tuple(value.shape)}")
    if value.dtype not in FORMATS:
        raise CheckpointError(f"{name!r} has {key} of dtype {value.dtype}")
    problem = problem_of(key, value)
    if problem:
        raise CheckpointError(f"{name!r} has {key} that holds {problem}")
    return _placed(name, value, param, _dtype(key, value.dtype, param.dtype))


def _placed(
    name: str, value: torch.Tensor, param: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    try:
        return ranks.placed(name, value.detach(), param, dtype or value.dtype)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _dtype(key: str, saved: torch.dtype, param: torch.dtype) -> torch.dtype:
    """Return the dtype to keep a state array in: the saved one, where a step can work with it.

    A float16 second moment becomes float32, which holds the same number: its next values need more
    range than float16 has. Double and complex state go with double and complex parameters; that of
    16-bit parameters becomes float32.
    """
    if param.is_complex or saved.is_complex or torch.float64 in (saved, param):
        return torch.float32 if param in LOW_PRECISION else param
    if key in _SECOND_MOMENTS and saved == torch.float16:
        return torch.float32
    return saved


def problem_of(key: str, value: torch.Tensor) -> str:
    """Say what makes a state array unusable: NaN, infinity, or a negative second moment."""
    local = ranks.local_of(value.detach())
    if local.is_complex():
        local = torch.view_as_real(local)
    if local.numel() == 0 or local.is_meta or not local.is_floating_point():
        return ""
    low, high = (float(bound) for bound in torch.aminmax(local))
    if math.isnan(low) or math.isnan(high):
        return "NaN"
    if math.isinf(low) or math.isinf(high):
        return "infinity"
    return f"the negative value {low:g}" if key in _SECOND_MOMENTS and low < 0 else ""
