"""State where a step can use it: on the right device, laid out and stored as the parameter is."""

from __future__ import annotations

from typing import Any

import torch

from ebbtide.memory import extents_of, layout_of
from ebbtide.torch.ranks import local_of, sharded_like
from ebbtide.torch.storage import Storage, joined, pairs
from ebbtide.torch.tensors import LOW_PRECISION, extents

__all__ = ["fitted", "fitted_step", "is_staged", "lies_as_it_reads"]

_DOUBLE = (torch.float64, torch.complex128)


def is_staged(tensor: torch.Tensor, storage: Storage) -> bool:
    """Whether the kernels get a copy: memory with gaps, or that reads otherwise than it lies.

    Blocks of coded state follow the order of the indices.
    """
    if not lies_as_it_reads(tensor) or (storage.coded and not tensor.is_contiguous()):
        return True
    return layout_of(tensor.shape, tensor.stride()) != "dense"


def lies_as_it_reads(tensor: torch.Tensor) -> bool:
    """Whether the memory holds the numbers themselves, at addresses that suit their size."""
    itemsize = tensor.element_size() // (2 if tensor.is_complex() else 1)
    lazy = tensor.is_conj() or tensor.is_neg()
    return not lazy and (tensor.numel() == 0 or tensor.data_ptr() % itemsize == 0)


def fitted(
    key: str, value: torch.Tensor, param: torch.Tensor, storage: Storage, *, kernels: bool
) -> torch.Tensor:
    """Return a state array where a step can use it; the array itself where it can already."""
    if value.device != param.device:
        value = value.to(param.device)
    if not kernels:
        return value
    mine, local = local_of(param.detach()), local_of(value)
    if is_staged(mine, storage):
        mine = torch.empty(mine.shape, dtype=mine.dtype, device="meta")
    if storage.coded or key == "residual":
        return _fitted_codes(key, value, param, mine)
    dtype = local.dtype
    if dtype != mine.dtype and (dtype in _DOUBLE or mine.dtype in _DOUBLE):
        # Not float16: small squares would vanish there.
        dtype = torch.float32 if mine.dtype in LOW_PRECISION else mine.dtype
    alike = local.dtype == dtype and extents(local) == extents(mine)
    if alike and lies_as_it_reads(local):
        return value
    laid = torch.empty_like(mine, dtype=dtype, device=local.device).copy_(local)
    return sharded_like(laid, param)


def _fitted_codes(
    key: str, value: torch.Tensor, param: torch.Tensor, mine: torch.Tensor
) -> torch.Tensor:
    """Return a coded array or a residual where a step can use it; itself where it can already.

    Args:
        key: Of the array.
        value: The array.
        param: Whose state it is.
        mine: What a step works on: this process's part of the parameter, or the copy of it.
    """
    local = local_of(value)
    if local.device != mine.device and not mine.is_meta:
        local = local.to(mine.device)
    if key != "residual":
        laid = local.contiguous()
    elif local.dtype == torch.uint8:
        strides = (*(2 * stride for stride in mine.stride()), 1)
        fits = extents_of(local.shape, local.stride()) == extents_of(local.shape, strides)
        empty = torch.empty_like(mine, dtype=torch.int16, device=local.device)
        laid = local if fits else pairs(empty.copy_(joined(local)))
    else:
        fits = extents_of(local.shape, local.stride()) == extents_of(mine.shape, mine.stride())
        empty = torch.empty_like(mine, dtype=torch.int8, device=local.device)
        laid = local if fits else empty.copy_(local)
    if laid is local_of(value):
        return value
    return sharded_like(laid, param, tuple(value.shape))


def fitted_step(step: Any, device: torch.device | None) -> torch.Tensor:
    """Return a step count as a tensor of floats on a device; `None` leaves it where it is."""
    if not isinstance(step, torch.Tensor):
        return torch.tensor(float(step))
    counter: torch.Tensor = step
    if counter.dtype not in (torch.float32, torch.float64):
        counter = counter.to(torch.float32)
    return counter if device is None else counter.to(device)
