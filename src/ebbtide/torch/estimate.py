"""How much memory training a model will take, before it starts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ebbtide.groups import (
    ELEMENT_BYTES,
    ParamInfo,
    format_bytes,
    is_embedding,
    master_format_for,
    param_state_bytes,
    state_format_for,
)
from ebbtide.torch.walk import find_parameters

__all__ = ["MemoryEstimate", "estimate"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on this process, activations and buffers apart.

    Attributes:
        trainable: Elements that take a gradient.
        frozen: Elements that take none.
        parameters: Of all parameters, frozen ones included.
        gradients: Of the gradients held at once.
        state: Of the optimizer's state, residuals of the weights included.
        step_peak: While a step runs: parameters, gradients and state, since a step allocates
            nothing that grows with the model.
        load_peak: While a new optimizer takes the state of a checkpoint that is read from the disk
            as it is used, `load(path, mmap=True)`: parameters, state and one tensor of the file.
        load_peak_whole_file: The same with the state of the file in memory as a whole.
        formats: Number of tensors kept in each state format.
    """

    trainable: int
    frozen: int
    parameters: int
    gradients: int
    state: int
    step_peak: int
    load_peak: int
    load_peak_whole_file: int
    formats: dict[str, int]

    @property
    def bytes_per_param(self) -> float:
        """Stored for a trainable element, its state included and its gradient not."""
        return (self.parameters + self.state) / max(self.trainable, 1)

    def __str__(self) -> str:
        formats = ", ".join(f"{count} in {name}" for name, count in self.formats.items())
        rows = [
            (
                "parameters",
                self.parameters,
                f"{self.trainable:,} trainable, {self.frozen:,} frozen",
            ),
            ("gradients", self.gradients, ""),
            ("state", self.state, f"tensors: {formats or 'none'}"),
            ("step peak", self.step_peak, "parameters, gradients, state"),
            ("load peak", self.load_peak, "load(path, mmap=True)"),
            ("", self.load_peak_whole_file, "load(path)"),
        ]
        lines = [
            f"{name:<10}  {format_bytes(count):>9}  {note}".rstrip() for name, count, note in rows
        ]
        return "\n".join([*lines, f"stored per trainable parameter: {self.bytes_per_param:.3g} B"])

    def to_dict(self) -> dict[str, Any]:
        """Return plain dictionaries, texts and numbers."""
        return {**dataclasses.asdict(self), "bytes_per_param": self.bytes_per_param}

    def to_json(self) -> str:
        """Return the estimate as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def estimate(
    model: nn.Module | Any,
    *,
    state_format: str | None = None,
    master_format: str | None = None,
    moments: int = 2,
    low_bit_embeddings: bool = False,
    step_in_backward: bool = False,
) -> MemoryEstimate:
    """Return the memory that the parameters, their gradients and the optimizer's state take.

    Nothing is allocated: a model on the `meta` device will do.

    Args:
        model: The model, or its named parameters. Of sharded parameters the share of this process
            counts.
        state_format: `"float32"`, `"bfloat16"` or `"8bit"`; None is what the optimizer takes by
            itself. Parameters of fewer than 4096 elements or below two dimensions and embeddings
            stay in float32.
        master_format: For bfloat16 and float16 parameters: `"none"`, `"stochastic"`, `"24bit"` or
            `"32bit"`.
        moments: Tensors of the parameter's size in the state: 2 for Adam and AdamW, 3 with
            `amsgrad`, 1 for SGD with momentum, 0 without.
        low_bit_embeddings: Whether embeddings are kept in low-bit formats too.
        step_in_backward: Whether each gradient is used and freed inside the backward pass, so that
            only the largest counts.

    Raises:
        ValueError: A format is unknown, or there are no parameters.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024))
        >>> print(estimate(model, state_format="8bit"))
        parameters     32 MiB  8,393,728 trainable, 0 frozen
        gradients      32 MiB
        state        16.4 MiB  tensors: 2 in 8bit, 2 in float32
        step peak    80.5 MiB  parameters, gradients, state
        load peak    64.4 MiB  load(path, mmap=True)
                     64.8 MiB  load(path)
        stored per trainable parameter: 6.05 B
    """
    infos = [info for info, _ in find_parameters(model)]
    if not infos:
        raise ValueError("there are no parameters; was the generator already consumed?")
    trained = [info for info in infos if not info.frozen]
    formats = [
        state_format_for(
            info.shape,
            requested=state_format,
            dtype=info.dtype,
            embedding=is_embedding(info),
            low_bit_embeddings=low_bit_embeddings,
        )
        for info in trained
    ]
    state = sum(
        param_state_bytes(
            info,
            state_format=form,
            master_format=master_format_for(info.dtype, master_format),
            moments=moments,
        )
        for info, form in zip(trained, formats, strict=True)
    )
    parameters = sum(map(_bytes, infos))
    gradients = [_bytes(info) for info in trained]
    held = max(gradients, default=0) if step_in_backward else sum(gradients)
    largest = max((4 * _held(info) for info in trained), default=0) if moments else 0
    return MemoryEstimate(
        trainable=sum(map(_held, trained)),
        frozen=sum(_held(info) for info in infos if info.frozen),
        parameters=parameters,
        gradients=held,
        state=state,
        step_peak=parameters + held + state,
        load_peak=parameters + state + largest,
        load_peak_whole_file=parameters + 2 * state,
        formats=dict(Counter(formats)),
    )


def _held(info: ParamInfo) -> int:
    return info.numel if info.local_numel is None else info.local_numel


def _bytes(info: ParamInfo) -> int:
    size = ELEMENT_BYTES.get(info.dtype)
    return _held(info) * (getattr(torch, info.dtype).itemsize if size is None else size)
