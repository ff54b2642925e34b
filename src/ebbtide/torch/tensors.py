"""What the planner asks of a tensor: where it lies, how, and whether the kernels take it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils

from ebbtide.backends.triton import support as triton
from ebbtide.memory import Region, extents_of, layout_of
from ebbtide.notice import warn
from ebbtide.plan import Field, Format, Row
from ebbtide.torch.ranks import local_of

__all__ = [
    "FORMATS",
    "LOW_PRECISION",
    "check",
    "check_group",
    "check_memory",
    "extents",
    "field_of",
    "grad_of",
    "has_device_numbers",
    "kernel_takes",
    "launches",
    "region_of",
    "shows_memory",
]

FORMATS = {
    torch.float32: Format.FLOAT32,
    torch.float64: Format.FLOAT64,
    torch.bfloat16: Format.BFLOAT16,
    torch.float16: Format.FLOAT16,
    torch.complex64: Format.FLOAT32,
    torch.complex128: Format.FLOAT64,
}
LOW_PRECISION = (torch.bfloat16, torch.float16)
# In torch's words: devices whose steps can be captured in a graph, and those of its fused kernels.
_CAPTURABLE = optimizer._get_capturable_supported_devices
_FUSED = _foreach_utils._get_fused_kernels_supported_devices


def kernel_takes(tensor: torch.Tensor) -> bool:
    """Tell whether the compiled kernels can work on the memory of a tensor, or on a copy of it."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.dtype in FORMATS
        and shows_memory(tensor)
    )


def shows_memory(tensor: torch.Tensor) -> bool:
    """Tell whether the address of a tensor is that of its numbers: subclasses may wrap others."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def launches(param: torch.Tensor, grad: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Tell whether Triton's kernels step a parameter that is not on the CPU; says once why not.

    On the CPU they run in Triton's interpreter, which nobody but a test wants.
    """
    mine, its = local_of(param), local_of(grad)
    if not (shows_memory(mine) and shows_memory(its)):
        return False
    obstacle = None if mine.is_cpu else triton.obstacle(mine.device)
    if obstacle is not None:
        _say(mine.device.type, obstacle)
        return False
    return (
        not group.get("differentiable")
        and all(each.layout == torch.strided and each.dtype in FORMATS for each in (mine, its))
        and all(_is_launchable(value, mine) for value in _tensors_of(group))
    )


def has_device_numbers(group: Mapping[str, Any]) -> bool:
    """Tell whether a hyperparameter is a tensor that must not be read."""
    return any(not value.is_cpu for value in _tensors_of(group))


def _tensors_of(group: Mapping[str, Any]) -> list[torch.Tensor]:
    values = (*group.values(), *group.get("betas", ()))
    return [value for value in values if isinstance(value, torch.Tensor)]


def _is_launchable(number: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether the kernels can read a hyperparameter, or the host can without waiting."""
    if number.requires_grad:
        return False
    on_device = number.device == param.device and number.dtype in (torch.float32, torch.float64)
    return number.is_cpu or on_device


@cache
def _say(device: str, obstacle: str) -> None:
    warn(
        f"parameters on {device!r} are stepped by torch operations, several for each: {obstacle}",
        RuntimeWarning,
    )


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse combinations of torch's flags that torch refuses in `step`, in its words."""
    if group.get("foreach") and not group.get("capturable") and "betas" in group:
        for key, value in (
            ("lr", group["lr"]),
            *zip(("beta1", "beta2"), group["betas"], strict=True),
        ):
            if isinstance(value, torch.Tensor):
                raise RuntimeError(
                    f"{key} as a Tensor is not supported for capturable=False and foreach=True"
                )


def check(
    name: str, param: torch.Tensor, grad: torch.Tensor, group: Mapping[str, Any], *, rule: str
) -> None:
    """Refuse a parameter that cannot be stepped, by name.

    Raises:
        TypeError: It is of a dtype that no step takes.
        RuntimeError: Its gradient is sparse, it has no memory of its own for each element, or torch
            refuses it under the group's flags.
    """
    if param.dtype not in FORMATS:
        raise TypeError(f"parameter {name!r} has dtype {param.dtype}: it cannot be optimized")
    if group.get("fused"):
        _check_fused(name, param)
    if group.get("capturable") and param.device.type not in _CAPTURABLE():
        raise AssertionError(
            "If capturable=True, params and state_steps must be on supported devices: "
            f"{_CAPTURABLE()}. Parameter {name!r} is on {param.device}."
        )
    if param.is_meta:
        raise RuntimeError(f"parameter {name!r} is on the meta device: materialise it first")
    if grad.is_sparse and rule == "adam":
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead "
            f"(parameter {name!r})"
        )
    local = local_of(param)
    check_memory(f"parameter {name!r}", param)
    check_memory(f"the gradient of parameter {name!r}", grad)
    if local.layout != torch.strided:
        raise RuntimeError(f"parameter {name!r} has layout {local.layout}: it cannot be stepped")
    if layout_of(local.shape, local.stride()) == "overlapping":
        raise RuntimeError(
            f"elements of parameter {name!r} share memory (stride {tuple(local.stride())}): a "
            "step would update them more than once; clone it first"
        )
    under_grad = group.get("differentiable") and torch.is_grad_enabled()
    if under_grad and param.is_leaf and param.requires_grad:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation: with "
            f"differentiable=True pass a clone of parameter {name!r}"
        )


def check_memory(what: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor whose storage has been given back, as `resize_(0)` on it does."""
    local = local_of(tensor)
    if local.layout != torch.strided or local.numel() == 0:
        return
    reach = sum((n - 1) * stride for n, stride in zip(local.shape, local.stride(), strict=True))
    needed = (local.storage_offset() + reach + 1) * local.element_size()
    held = local.untyped_storage().nbytes()
    if held < needed:
        raise RuntimeError(
            f"the memory of {what} has been given back: its storage holds {held} bytes of {needed}"
        )


def _check_fused(name: str, param: torch.Tensor) -> None:
    supported = _FUSED()
    if param.device.type not in supported or not param.is_floating_point():
        raise RuntimeError(
            "`fused=True` requires all the params to be floating point Tensors of supported "
            f"devices: {supported} but {param.dtype} and {param.device.type} (parameter {name!r})"
        )


def extents(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return shape and strides of a tensor, flat, complex numbers as pairs."""
    if tensor.is_complex():
        return (*extents_of(tensor.shape, [2 * stride for stride in tensor.stride()]), 2, 1)
    return extents_of(tensor.shape, tensor.stride())


def field_of(tensor: torch.Tensor) -> Field:
    """Return the field of a row that a dense tensor is."""
    return Field(tensor.data_ptr(), 0, FORMATS[tensor.dtype])


def region_of(name: str, tensor: torch.Tensor) -> Region:
    """Return the memory of a tensor that a step is about to write."""
    itemsize = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return Region(name, tensor.data_ptr(), itemsize, extents(tensor))


def grad_of(row: Row) -> torch.Tensor:
    """Return the gradient of a row as a flat tensor over the same memory; it is not empty."""
    dtype = {number: dtype for dtype, number in FORMATS.items() if not dtype.is_complex}
    size = row.numel * row.grad.format.itemsize
    memory = (ctypes.c_char * size).from_address(row.grad.address)
    return torch.frombuffer(memory, dtype=dtype[row.grad.format])
