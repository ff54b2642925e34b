"""Every parameter of a torch model, as the grouping engine wants to know it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ebbtide.groups import ParamInfo, bare_names

__all__ = ["dtype_name", "find_parameters", "info_of_tensor"]

Found = list[tuple[ParamInfo, torch.Tensor]]


def find_parameters(model: Any) -> Found:
    """Return each parameter once, with all its names.

    Args:
        model: A module, a mapping from names to tensors, or pairs of a name and a tensor.

    Raises:
        ValueError: There are none, a name is there twice, a tensor has no shape yet, or two
            parameters lie on the same memory.
        TypeError: What is given is no model and has no names.
    """
    if isinstance(model, nn.Module):
        found = _find_in_module(model)
    else:
        found = _find_in_pairs(model.items() if isinstance(model, Mapping) else model)
    for info, _ in found:
        _check_whole(info)
    _check_memory(found)
    return found


def info_of_tensor(name: str, tensor: torch.Tensor) -> ParamInfo:
    """Return what is known of a parameter without its module."""
    if isinstance(tensor, nn.UninitializedParameter):
        raise ValueError(f"{name!r} has no shape yet: run a forward pass first")
    with torch.no_grad():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return ParamInfo(
        name=name,
        # What DeepSpeed ZeRO-3 has taken apart is kept in ds_tensor and was of ds_shape.
        shape=tuple(getattr(tensor, "ds_shape", tensor.shape)),
        frozen=not tensor.requires_grad,
        asked="param._no_weight_decay" if getattr(tensor, "_no_weight_decay", False) else "",
        dtype=dtype_name(tensor.dtype),
        local_numel=getattr(local, "ds_tensor", local).numel(),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without its module: `float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass
class _Place:
    """Where a tensor was found: its names, the modules that hold it, and what they ask for."""

    tensor: torch.Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[str, ...]] = field(default_factory=list)
    inside: frozenset[str] = frozenset()
    asked: str = ""
    shape: tuple[int, ...] | None = None  # where the tensor does not tell


def _find_in_module(root: nn.Module) -> Found:
    places: dict[int, _Place] = {}
    asks: list[tuple[str, nn.Module]] = []
    inside: dict[str, frozenset[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    # All names of a shared module are wanted, therefore not named_parameters().
    for path, module in root.named_modules(remove_duplicate=False):
        bases = _bases(module)
        inside[path] = inside.get(path.rpartition(".")[0], frozenset()) | set(bases)
        if hasattr(module, "no_weight_decay") or hasattr(module, "no_weight_decay_keywords"):
            asks.append((path, module))
        shapes.update(_shapes_before_flattening(module))
        for leaf, tensor in module._parameters.items():
            if tensor is None:
                continue
            place = places.setdefault(id(tensor), _Place(tensor))
            place.names.append(f"{path}.{leaf}" if path else leaf)
            place.owners.append(bases)
            place.inside |= inside[path]
    for path, module in asks:
        _ask(path, module, places.values())
    for key, shape in shapes.items():
        if key in places:
            places[key].shape = shape
    return _named_once(list(places.values()))


def _find_in_pairs(pairs: Iterable[Any]) -> Found:
    places: dict[int, _Place] = {}
    names: set[str] = set()
    if isinstance(pairs, torch.Tensor) or not isinstance(pairs, Iterable):
        raise TypeError(f"pass the model or model.named_parameters(), not a {_type(pairs)}")
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            hint = "model.named_parameters(), not model.parameters()"
            raise TypeError(f"grouping needs names: pass the model or {hint}, got {_type(pair)}")
        name, tensor = pair
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name!r} is a {_type(tensor)}, not a tensor")
        if name in names:
            raise ValueError(f"the parameter {name!r} is there twice")
        names.add(name)
        places.setdefault(id(tensor), _Place(tensor)).names.append(name)
    return _named_once(list(places.values()))


def _named_once(places: list[_Place]) -> Found:
    bare = bare_names([name for place in places for name in place.names])
    found, at = [], 0
    for place in places:
        name, *tied = dict.fromkeys(bare[at : at + len(place.names)])
        at += len(place.names)
        wrapped = [raw for raw in place.names if raw not in (name, *tied)]
        info = info_of_tensor(name, place.tensor)
        info = replace(
            info,
            shape=place.shape or info.shape,
            aliases=(*tied, *wrapped),
            tied=tuple(tied),
            owners=tuple(place.owners),
            inside=place.inside,
            asked=info.asked or place.asked,
        )
        found.append((info, place.tensor))
    return found


def _shapes_before_flattening(module: nn.Module) -> dict[int, tuple[int, ...]]:
    """Return the shapes of the parameters that FSDP1 keeps as parts of one flat parameter."""
    flat = getattr(getattr(module, "_handle", None), "flat_param", None)
    params = getattr(flat, "_params", None) or ()
    shapes = getattr(flat, "_shapes", ())
    return {id(p): tuple(shape) for p, shape in zip(params, shapes, strict=False)}


def _bases(module: nn.Module) -> tuple[str, ...]:
    classes = type(module).__mro__
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in classes[:-1])


def _ask(path: str, module: nn.Module, places: Iterable[_Place]) -> None:
    """Note which parameters the module asks to spare, by names relative to it, as timm has it."""
    names, keywords = (
        _listed(module, "no_weight_decay"),
        _listed(module, "no_weight_decay_keywords"),
    )
    if not names and not keywords:
        return
    start = f"{path}." if path else ""
    for place in places:
        relative = [name[len(start) :] for name in place.names if name.startswith(start)]
        relative += bare_names(relative)
        if any(fnmatchcase(name, glob) for name in relative for glob in names):
            place.asked = f"no_weight_decay() of {_type(module)}"
        elif any(word in name for name in relative for word in keywords):
            place.asked = f"no_weight_decay_keywords() of {_type(module)}"


def _listed(module: nn.Module, attribute: str) -> list[str]:
    value = getattr(module, attribute, ())
    value = value() if callable(value) else value
    if isinstance(value, bool) or value is None:
        return ["*"] if value else []
    return [value] if isinstance(value, str) else list(value)


def _check_whole(info: ParamInfo) -> None:
    if info.name.rpartition(".")[2] == "_flat_param":
        raise ValueError(
            f"{info.name!r} is FSDP's concatenation of many parameters, which cannot be told "
            "apart: use fully_shard, or FullyShardedDataParallel(use_orig_params=True)"
        )


def _check_memory(found: Found) -> None:
    """Complain about two parameters on the same memory: an optimizer would update it twice."""
    seen: dict[tuple[object, ...], str] = {}
    for info, tensor in found:
        address = _address(tensor)
        if not address or not math.prod(tensor.shape):
            continue
        key = (address, tensor.device, tensor.dtype, tensor.numel())
        if key in seen:
            raise ValueError(
                f"{seen[key]!r} and {info.name!r} are two parameters on the same memory; tie them "
                "by assigning the one Parameter to both places"
            )
        seen[key] = info.name


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a tensor without memory, as under FakeTensorMode
        return 0


def _type(value: object) -> str:
    return type(value).__name__
