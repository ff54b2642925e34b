"""How long an AdamW step takes beside torch's, as ratios, since times do not travel.

    python benchmarks/step.py [--rounds N] [--json FILE] [WORKLOAD ...]

All contenders take turns within each round; a ratio is torch's time over ours in the same round,
and the table shows its median and quartiles over the rounds. Small workloads get fresh gradient
tensors before each step, as after a backward pass.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import ebbtide
import ebbtide.torch
from ebbtide.backends.cpu import describe

Shapes = list[tuple[int, ...]]

FRESH_GRADIENTS_BELOW = 20_000_000  # elements; above, a step outweighs how its gradients came
ROUND_SECONDS = 0.1


def gpt2_small() -> Shapes:
    """Return the shapes of GPT-2's 148 parameters, 124 M elements."""
    width = 768
    layer: Shapes = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *layer * 12, (width,), (width,)]


def resnet50() -> Shapes:
    """Return the shapes of ResNet-50's 161 parameters, 25.6 M elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions: Shapes = [(width, before, 1, 1), (width, width, 3, 3)]
            convolutions.append((4 * width, width, 1, 1))
            if block == 0:
                convolutions.append((4 * width, before, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            before = 4 * width
    return [*shapes, (1000, before), (1000,)]


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "one tensor of 64 M": lambda: [(64_000_000,)],
    "GPT-2 small": gpt2_small,
    "ResNet-50": resnet50,
    "small perceptron": lambda: [(100, 64), (100,), (32, 100), (32,), (10, 32), (10,)],
    "2,000 tensors of 1 k": lambda: [(1000,)] * 2000,
}
CONTENDERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "ebbtide": lambda params: ebbtide.torch.AdamW(params),
    "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch default": lambda params: torch.optim.AdamW(params),
}


class Timing(NamedTuple):
    """What one contender took, and the quartiles of its time over ours."""

    contender: str
    step_ms: float
    ratio_quartiles: tuple[float, ...]


class Contender:
    """One optimizer over its own copy of the parameters."""

    def __init__(self, name: str, shapes: Shapes) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(shape, generator=generator) for shape in shapes]
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3
        self.fresh = sum(param.numel() for param in self.params) < FRESH_GRADIENTS_BELOW
        self.optimizer = CONTENDERS[name](self.params)
        self.step()  # creates the state
        self.steps = max(1, round(ROUND_SECONDS / min(self.step() for _ in range(2))))

    def step(self) -> float:
        """Take one step; return its seconds."""
        if self.fresh:
            for param in self.params:
                assert param.grad is not None
                param.grad = param.grad.clone()
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start

    def seconds(self) -> float:
        """Return the mean seconds of a step over one turn."""
        return sum(self.step() for _ in range(self.steps)) / self.steps


def measure(shapes: Shapes, rounds: int) -> Iterator[Timing]:
    """Time all contenders in turns, over and over."""
    contenders = {name: Contender(name, shapes) for name in CONTENDERS}
    turns = [{name: each.seconds() for name, each in contenders.items()} for _ in range(rounds)]
    for name in CONTENDERS:
        ratios = [turn[name] / turn["ebbtide"] for turn in turns]
        step_ms = statistics.median(turn[name] for turn in turns) * 1e3
        yield Timing(name, step_ms, tuple(statistics.quantiles(ratios, n=4, method="inclusive")))


def main() -> None:
    """Measure the workloads that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=11, help="at least 2; 11")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")

    machine = {
        **describe(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "ebbtide": ebbtide.__version__,
    }
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    print(f"\n{'workload':<22}{'contender':<15}{'step in ms':>11}  time over ours (quartiles)")
    results = {}
    for workload in arguments.workloads or WORKLOADS:
        timings = list(measure(WORKLOADS[workload](), arguments.rounds))
        results[workload] = [timing._asdict() for timing in timings]
        for contender, step_ms, (low, middle, high) in timings:
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"{workload:<22}{contender:<15}{step_ms:>11.3f}  {ratio}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
