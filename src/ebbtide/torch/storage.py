"""How a parameter and its state are stored: which arrays there are, and from one format to another.

In eight bits a moment `exp_avg` is the two arrays `exp_avg_codes` and `exp_avg_scale`, under names
that `torch.optim` does not take for moments. The bits that a 16-bit parameter cannot hold are
`residual`. Whole numbers of 16 bits are kept as two bytes, the lower first: collective operations
know no int16.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ebbtide.groups import is_embedding_of_group, master_format_for, state_format_for
from ebbtide.plan import Field, Format
from ebbtide.torch import eight_bits
from ebbtide.torch.ranks import local_of, sharded_like
from ebbtide.torch.tensors import FORMATS

__all__ = [
    "MOMENTS",
    "Storage",
    "conversion",
    "fields_of",
    "is_coded",
    "joined",
    "pairs",
    "plain",
    "problem_of_coded",
    "shape_of",
    "storage_of",
    "zeros",
]

State = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_RESIDUAL_BITS = {"24bit": 8, "32bit": 16}
_LARGEST_SCALE = 2.0**64 / 127**2  # what is kept of m is below 2⁶⁴·√v


class Storage(NamedTuple):
    """How one parameter and its state are stored.

    Attributes:
        dtype: Of new state arrays that are not coded.
        requested: Whether the group asks for it: then state of another format is converted.
        coded: Moments are kept in eight bits.
        residual_bits: Kept beside a 16-bit parameter, 0 for none.
        stochastic: The parameter is rounded stochastically.
    """

    dtype: torch.dtype
    requested: bool
    coded: bool
    residual_bits: int
    stochastic: bool

    def arrays(self, keys: Iterable[str]) -> tuple[str, ...]:
        """Name the arrays that a step writes beside the parameter."""
        if self.coded:
            keys = [name for key in keys for name in (f"{key}_codes", f"{key}_scale")]
        return (*keys, *(("residual",) if self.residual_bits else ()))

    def takes(self, key: str, dtype: torch.dtype) -> bool:
        """Tell whether a state array may have a dtype: a kernel reads memory as it was told."""
        if key == "residual":
            return dtype == (torch.uint8 if self.residual_bits == 16 else torch.int8)
        return dtype == _dtype_of(key) if self.coded else dtype in FORMATS

    def obstacle(self, param: torch.Tensor) -> str:
        """Say what keeps a parameter from being stored so; empty if nothing does."""
        by_rows = all(
            type(each).__name__ == "Replicate" or (type(each).__name__ == "Shard" and each.dim == 0)
            for each in getattr(param, "placements", ())
        )
        if self.coded and not by_rows:
            return "8-bit state needs shards by rows, and it is sharded otherwise"
        return ""


def storage_of(name: str, param: torch.Tensor, group: Mapping[str, Any]) -> Storage:
    """Return how a group wants a parameter and its state to be stored."""
    dtype, shape = str(param.dtype).removeprefix("torch."), tuple(param.shape)
    requested = group.get("state_format")
    form = state_format_for(
        shape,
        requested=requested,
        dtype=dtype,
        embedding=requested is not None and is_embedding_of_group(name, shape, group),
    )
    master = master_format_for(dtype, group.get("master_format"))
    return Storage(
        dtype=torch.float32 if form == "8bit" else getattr(torch, form),
        requested=requested is not None,
        coded=form == "8bit",
        residual_bits=_RESIDUAL_BITS.get(master, 0),
        stochastic=master == "stochastic",
    )


def is_coded(state: Mapping[str, Any]) -> bool:
    """Tell whether the moments of a state are kept in eight bits."""
    return "exp_avg_codes" in state


def shape_of(key: str, param: torch.Tensor, residual_bits: int = 0) -> tuple[int, ...]:
    """Return the shape of a state array, on all processes together."""
    if key.endswith("_scale"):
        blocks = eight_bits.blocks_of(param.shape)
        return blocks if key == "exp_avg_scale" else (*blocks, 2)
    pair = key == "residual" and residual_bits == 16
    return (*param.shape, 2) if pair else tuple(param.shape)


def zeros(key: str, param: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Return a new state array."""
    mine = local_of(param.detach())
    if key == "residual" and storage.residual_bits == 16:
        made = pairs(torch.zeros_like(mine, dtype=torch.int16))
    elif key == "residual":
        made = torch.zeros_like(mine, dtype=torch.int8)
    elif storage.coded:
        made = torch.zeros(_local_shape(key, param), dtype=_dtype_of(key), device=mine.device)
    else:
        made = torch.zeros_like(mine, dtype=storage.dtype, memory_format=torch.preserve_format)
    return sharded_like(made, param, shape_of(key, param, storage.residual_bits))


def fields_of(state: Mapping[str, Any], keys: Iterable[str]) -> tuple[Field, ...]:
    """Return the fields of coded moments."""
    formats = {key: Format.SIGNED8 if key == "exp_avg" else Format.WINDOW8 for key in keys}
    return tuple(
        Field(
            local_of(state[f"{key}_codes"]).data_ptr(),
            local_of(state[f"{key}_scale"]).data_ptr(),
            each,
        )
        for key, each in formats.items()
    )


def plain(state: Mapping[str, Any]) -> State:
    """Return a state whose moments are decoded to float32, if they were in eight bits."""
    if not is_coded(state):
        return dict(state)
    coded = [key for key in MOMENTS if f"{key}_codes" in state]
    codes, scales = ([local_of(state[f"{k}_{part}"]) for k in coded] for part in ("codes", "scale"))
    whole = state["exp_avg_codes"]
    moments = dict(zip(coded, eight_bits.decode(codes, scales), strict=True))
    own = [f"{key}_{part}" for key in coded for part in ("codes", "scale")]
    rest = {key: value for key, value in state.items() if key not in own}
    return {**rest, **{key: sharded_like(each, whole) for key, each in moments.items()}}


def conversion(
    param: torch.Tensor, state: Mapping[str, Any], keys: Iterable[str], storage: Storage
) -> tuple[State, list[str]]:
    """Return what to put into a state, and which keys to take out, so that it is stored so.

    Arrays that the state lacks stay lacking. Eight bits are rounded to nearest.
    """
    put, gone = _converted_residual(param, state, storage)
    kept = dict.fromkeys((*keys, *MOMENTS))  # a maximum waits for amsgrad to be switched on again
    had = [key for key in kept if isinstance(state.get(key), torch.Tensor)]
    if is_coded(state) and not storage.coded:
        decoded = plain(state)
        put.update({key: decoded[key].to(storage.dtype) for key in MOMENTS if key in decoded})
        gone += [key for key in state if key.endswith(("_codes", "_scale"))]
    elif storage.coded and "exp_avg" in had and "exp_avg_sq" in had:
        codes, scales = eight_bits.encode([local_of(state[key].detach()) for key in had])
        for key, code, scale in zip(had, codes, scales, strict=True):
            for part, array in ((f"{key}_codes", code), (f"{key}_scale", scale)):
                put[part] = sharded_like(array, param, shape_of(part, param))
        gone += [key for key in MOMENTS if key in state]
    elif storage.requested and not storage.coded:
        put.update({k: state[k].to(storage.dtype) for k in had if state[k].dtype != storage.dtype})
    return put, gone


def problem_of_coded(
    key: str, value: torch.Tensor, param: torch.Tensor, state: Mapping[str, Any]
) -> str:
    """Say what makes a saved array of 8-bit state or a residual unusable; empty if nothing does."""
    known = [_dtype_of(key)] if key != "residual" else [torch.int8, torch.uint8]
    if value.dtype not in known:
        return f"dtype {value.dtype}"
    expected = shape_of(key, param, 16 if value.dtype == torch.uint8 else 8)
    if tuple(value.shape) != expected:
        return f"shape {tuple(value.shape)}"
    if key.endswith("_codes") and f"{key.removesuffix('_codes')}_scale" not in state:
        return "no scale beside it"
    scale = local_of(value)
    if key == "exp_avg_scale" and not bool(((scale >= 0) & (scale <= _LARGEST_SCALE)).all()):
        return "a scale that is negative or not finite, or larger than any that is written"
    codes = state.get(f"{key.removesuffix('_scale')}_codes")
    if key.endswith("sq_scale") and isinstance(codes, torch.Tensor) and codes.shape == param.shape:
        return (
            "" if eight_bits.is_finite(local_of(codes), scale) else "a window of infinite numbers"
        )
    return ""


def _converted_residual(
    param: torch.Tensor, state: Mapping[str, Any], storage: Storage
) -> tuple[State, list[str]]:
    if "residual" not in state:
        return {}, []
    if storage.residual_bits == 0:
        return {}, ["residual"]
    residual = state["residual"]
    if (residual.dtype == torch.uint8) == (storage.residual_bits == 16):
        return {}, []
    local = local_of(residual)
    if storage.residual_bits == 16:
        local = pairs(local.to(torch.int16) << 8)
    else:
        local = (joined(local) >> 8).to(torch.int8)
    return {"residual": sharded_like(local, param, shape_of("residual", param, 16))}, []


def pairs(numbers: torch.Tensor) -> torch.Tensor:
    """Return int16 numbers as pairs of bytes over the same memory."""
    strides = (*(2 * stride for stride in numbers.stride()), 1)
    flat = numbers.as_strided((numbers.numel(),), (1,)).view(torch.uint8)
    return flat.as_strided((*numbers.shape, 2), strides)


def joined(stored: torch.Tensor) -> torch.Tensor:
    """Return the int16 numbers of pairs of bytes."""
    return stored[..., 0].to(torch.int16) | stored[..., 1].to(torch.int16) << 8


def _local_shape(key: str, param: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of this process's part of a coded array."""
    rows, *_ = local_of(param).shape
    return (rows, *shape_of(key, param)[1:])


def _dtype_of(key: str) -> torch.dtype:
    if key == "exp_avg_codes":
        return torch.int8
    return torch.float32 if key == "exp_avg_scale" else torch.uint8
