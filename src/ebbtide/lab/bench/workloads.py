"""What is stepped: the tensors of real models, and the ways in which they are stepped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["SCENARIOS", "WORKLOADS", "Contestant", "Scenario", "Workload"]

Shape = tuple[int, ...]
CLIP = 1.0


def _gpt2() -> list[Shape]:
    block: list[Shape] = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *(block * 12), (768,), (768,)]


def _resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(count):
            shapes += [(width, inputs, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


@dataclass(frozen=True)
class Workload:
    """The parameters of one model.

    Attributes:
        name: Short name, as on the command line.
        what: What it stands for.
        shapes: Of its tensors.
    """

    name: str
    what: str
    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        """Number of elements in all."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def small(self) -> bool:
        """Whether a step is so short that many are timed together."""
        return self.numel < 100_000


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "one tensor of 64 M", ((2**16, 2**10),)),
        Workload("W2", "GPT-2 small, 148 tensors", tuple(_gpt2())),
        Workload("W3", "ResNet-50, 161 tensors", tuple(_resnet50())),
        Workload("W4", "an MLP, 6 tensors", ((64, 64), (64,), (64, 64), (64,), (10, 64), (10,))),
        Workload("W5", "2,000 tensors of 1,000", ((1000,),) * 2000),
        Workload("W10k", "10,000 tensors of 1,000", ((1000,),) * 10000),
        Workload("tiny", "for tests: 3 tensors", ((8, 8), (8,), (300,))),
    )
}


class Contestant:
    """One optimizer over its own copy of a workload's parameters.

    Args:
        workload: What is stepped.
        make: Builds the optimizer from a list of parameters.
        clip: Clip the global norm in each step: inside the step (`"inside"`), before it with
            `torch.nn.utils.clip_grad_norm_` (`"before"`), or not (`None`).
        dead: Share of elements whose gradient is exactly zero.
        dtype: Of parameters and gradients.
    """

    def __init__(
        self,
        workload: Workload,
        make: Callable[[list[torch.Tensor]], Any],
        *,
        clip: str | None = None,
        dead: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.randn(shape, generator=generator).mul_(0.02).to(dtype).requires_grad_()
            for shape in workload.shapes
        ]
        self._gradients = [_gradient(shape, generator, dead).to(dtype) for shape in workload.shapes]
        self._clip = clip
        self.optimizer = make(self.params)
        # Gradients of large tensors are kept; those of small ones are made by backward each time,
        # since to find them is a good part of a step there.
        self._fresh = workload.numel < 20_000_000
        self.backward()

    def backward(self) -> None:
        """Give every parameter a gradient, as C++ leaves it after a backward."""
        if not self._fresh:
            for param, gradient in zip(self.params, self._gradients, strict=True):
                param.grad = gradient
            return
        for param in self.params:
            param.grad = None
        torch.autograd.backward(self.params, [each.clone() for each in self._gradients])

    def step(self) -> None:
        """Take one step."""
        if self._clip == "before":
            torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()


def _gradient(shape: Shape, generator: torch.Generator, dead: float) -> torch.Tensor:
    gradient = torch.randn(shape, generator=generator).mul_(0.01)
    if dead > 0:
        gradient[torch.rand(shape, generator=generator) < dead] = 0.0
    return gradient


@dataclass(frozen=True)
class Scenario:
    """A way of stepping.

    Attributes:
        name: Short name, as on the command line.
        what: What it shows.
        workloads: On which models.
        clip: Clip the global norm in each step.
        dead: Share of elements whose gradient has been zero for a long time.
        dtype: Of the parameters that ours steps; the baseline's are float32.
        options: Keywords for ours.
    """

    name: str
    what: str
    workloads: tuple[str, ...]
    clip: bool = False
    dead: float = 0.0
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def low_bit(self) -> bool:
        """Whether ours keeps less than float32."""
        return self.dtype is not torch.float32 or bool(self.options)


_EIGHT = {"state_format": "8bit"}
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("step", "one step", ("W1", "W2", "W3", "W4", "W5", "W10k")),
        Scenario(
            "clip", "clip the global norm and step", ("W1", "W2", "W3", "W4", "W5"), clip=True
        ),
        Scenario("dead5", "5 % of elements dead", ("W3",), dead=0.05),
        Scenario("dead50", "50 % of elements dead", ("W3",), dead=0.5),
        Scenario("8bit", "8-bit state", ("W1", "W2", "W3"), options=_EIGHT),
        Scenario(
            "24bit",
            "bfloat16 with 8-bit residual and 8-bit state",
            ("W1", "W2", "W3"),
            dtype=torch.bfloat16,
            options={**_EIGHT, "master_format": "24bit"},
        ),
        Scenario("bfloat16", "bfloat16 as it comes", ("W1", "W2", "W3"), dtype=torch.bfloat16),
    )
}
