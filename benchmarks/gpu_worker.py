"""One process of `gpu.py`: checks or times some optimizers, a line of JSON for each.

    python benchmarks/gpu_worker.py '{"task": "time", "workload": "2,000 tensors", "arms": [...]}'

A line is printed as soon as something is known of an optimizer, and again when more is; the last
one counts. So what was found before a crash is not lost.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from typing import Any, NamedTuple

import torch

import ebbtide.torch
from ebbtide.backends.cpu import available

Params = list[torch.Tensor]
Shapes = list[tuple[int, ...]]
Row = dict[str, Any]

WORKLOADS: dict[str, Shapes] = {
    "one tensor of 64 M": [(8192, 8192)],
    "300 tensors, 112 M": [(768, 768), (768, 208)] * 150,
    "2,000 tensors of 1,000": [(1000,)] * 2000,
    "dry": [(8, 128), (5,)],
}
LR = 1e-3


class Arm(NamedTuple):
    """One optimizer: its parameters' dtype, how it is made, what is done around its step.

    Attributes:
        dtype: Of parameters and gradients.
        make: Makes the optimizer.
        clip: Call `torch.nn.utils.clip_grad_norm_` before each step.
        graph: Capture the step in a CUDA graph and replay that.
        plain: All state lies in `optimizer.state`, as plain tensors.
        words: Beside the parameters.
    """

    dtype: str
    make: Callable[..., Any]
    words: dict[str, Any]
    clip: bool = False
    graph: bool = False
    plain: bool = True


def _ours(dtype: str, *, graph: bool = False, **words: Any) -> Arm:
    return Arm(dtype, ebbtide.torch.AdamW, words, graph=graph)


def _torchs(dtype: str, *, clip: bool = False, graph: bool = False, **words: Any) -> Arm:
    return Arm(dtype, torch.optim.AdamW, words, clip=clip, graph=graph)


def _bitsandbytes(*params: Any, **words: Any) -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(*params, **words)


def _torchao(*params: Any, **words: Any) -> Any:
    from torchao.optim import AdamW8bit

    return AdamW8bit(*params, **words)


def _flashoptim(*params: Any, **words: Any) -> Any:
    from flashoptim import FlashAdamW

    return FlashAdamW(*params, **words)


def _peer(dtype: str, make: Callable[..., Any]) -> Arm:
    return Arm(dtype, make, {}, plain=False)


EIGHT: dict[str, Any] = {"state_format": "8bit"}
ARMS: dict[str, Arm] = {
    "ebbtide": _ours("float32"),
    "torch fused": _torchs("float32", fused=True),
    "torch foreach": _torchs("float32", foreach=True),
    "ebbtide, clipped": _ours("float32", clip_grad_norm=1.0),
    "torch fused, clipped": _torchs("float32", clip=True, fused=True),
    "ebbtide, graph": _ours("float32", graph=True, capturable=True),
    "torch fused, graph": _torchs("float32", graph=True, fused=True, capturable=True),
    "ebbtide 8-bit": _ours("float32", **EIGHT),
    "ebbtide bf16": _ours("bfloat16"),
    "torch fused bf16": _torchs("bfloat16", fused=True),
    "ebbtide bf16, 8-bit": _ours("bfloat16", **EIGHT, master_format="stochastic"),
    "ebbtide bf16+8, 8-bit": _ours("bfloat16", **EIGHT, master_format="24bit"),
    "ebbtide bf16+16, 8-bit": _ours("bfloat16", **EIGHT, master_format="32bit"),
    "bitsandbytes 8-bit": _peer("float32", _bitsandbytes),
    "bitsandbytes bf16, 8-bit": _peer("bfloat16", _bitsandbytes),
    "flashoptim bf16+8, 8-bit": _peer("bfloat16", _flashoptim),
    "torchao 8-bit": _peer("float32", _torchao),
    "torchao bf16, 8-bit": _peer("bfloat16", _torchao),
}


class Machine:
    """The device that steps run on: a GPU, or Triton's interpreter where nothing is measured."""

    def __init__(self, *, dry: bool) -> None:
        self.dry = dry
        self.device = "cpu" if dry else "cuda"

    def wait(self) -> None:
        """Wait for all that was launched."""
        if not self.dry:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Return the bytes of all tensors; 0 in a dry run."""
        return 0 if self.dry else torch.cuda.memory_allocated()

    def described(self) -> dict[str, Any]:
        """Return what the numbers are taken on."""
        found: dict[str, Any] = {
            "python": platform.python_version(), "torch": torch.__version__,
            "ebbtide": _version(), "from": ebbtide.__file__, "core": available(),
        }  # fmt: skip
        if self.dry:
            return found
        import triton

        card = torch.cuda.get_device_properties(0)
        return {
            **found, "triton": triton.__version__, "cuda": torch.version.cuda, "card": card.name,
            "multiprocessors": card.multi_processor_count, "bytes": card.total_memory,
        }  # fmt: skip

    def copy_bandwidth(self) -> float:
        """Return the bytes a second that copying a large tensor reads and writes."""
        source = torch.randn(1 << (12 if self.dry else 28), device=self.device)
        target = torch.empty_like(source)
        best, copies = math.inf, 10
        for _ in range(5):
            self.wait()
            start = time.perf_counter()
            for _ in range(copies):
                target.copy_(source)
            self.wait()
            best = min(best, (time.perf_counter() - start) / copies)
        return 2 * source.nbytes / best


def _version() -> str:
    try:
        return ebbtide.__version__
    except PackageNotFoundError:
        return "not installed"  # its sources are on the path


class Contestant:
    """One optimizer over parameters of its own, with two sets of gradients."""

    def __init__(self, arm: Arm, shapes: Shapes, machine: Machine) -> None:
        generator = torch.Generator(machine.device).manual_seed(0)
        dtype = getattr(torch, arm.dtype)

        def random() -> Params:
            return [
                torch.randn(shape, device=machine.device, generator=generator).to(dtype)
                for shape in shapes
            ]

        before = machine.allocated()
        self.machine, self.arm = machine, arm
        self.params = [each.requires_grad_() for each in random()]
        self.numel = sum(param.numel() for param in self.params)
        for param, grad in zip(self.params, random(), strict=True):
            param.grad = grad
        self.optimizer = arm.make(self.params, lr=LR, **arm.words)
        self.replay: Callable[[], None] | None = None
        for _ in range(3):
            self.step()
        machine.wait()
        self.stored = (machine.allocated() - before) / self.numel
        self.others = [torch.randn_like(param) for param in self.params]
        if arm.graph and not machine.dry:
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.replay = graph.replay

    def step(self) -> None:
        """Take one step."""
        if self.replay is not None:
            self.replay()
            return
        if self.arm.clip:
            torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()

    def move_gradients(self) -> None:
        """Let every gradient lie elsewhere than at the last step."""
        if self.replay is None:
            given = [param.grad for param in self.params]
            for param, grad in zip(self.params, self.others, strict=True):
                param.grad = grad
            self.others = [grad for grad in given if grad is not None]

    def seconds(self, steps: int) -> float:
        """Return the seconds a step, of several in a row."""
        self.machine.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.machine.wait()
        return (time.perf_counter() - start) / steps

    def alone(self) -> tuple[float, float]:
        """Return the seconds of one step with new gradients: until `step` returns, until done."""
        self.move_gradients()
        self.machine.wait()
        start = time.perf_counter()
        self.step()
        returned = time.perf_counter()
        self.machine.wait()
        return returned - start, time.perf_counter() - start

    def traffic(self) -> int | None:
        """Return the bytes that a step must move, if its state is plain to see."""
        if not self.arm.plain:
            return None
        state = [
            value.nbytes
            for param in self.params
            for value in self.optimizer.state[param].values()
            if torch.is_tensor(value) and value.ndim
        ]
        grads = sum(param.grad.nbytes for param in self.params if param.grad is not None)
        return 2 * sum(param.nbytes for param in self.params) + 2 * sum(state) + grads

    def launches(self) -> int | None:
        """Return the kernels that ebbtide says it launches in a step."""
        backend = getattr(getattr(self.optimizer, "_devices", None), "backend", None)
        if backend is None or self.replay is not None:
            return None
        before = backend.launches
        self.step()
        return int(backend.launches - before)

    def profiled(self) -> Row:
        """Return what the profiler sees in a step: kernels, copies, microseconds of the GPU."""
        if self.machine.dry:
            return {}
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            self.step()
            self.machine.wait()
        events = [each for each in found.events() if "CUDA" in str(each.device_type)]
        kernels = [each for each in events if not each.name.startswith(("Memcpy", "Memset"))]
        return {
            "kernels": len(kernels), "copies": len(events) - len(kernels),
            "gpu_us": sum(each.time_range.elapsed_us() for each in events),
        }  # fmt: skip


def say(row: Row) -> None:
    """Print what is known of an arm."""
    print("ROW " + json.dumps(row), flush=True)


@contextmanager
def noting(row: Row) -> Iterator[None]:
    """Note what goes wrong, and go on; not where the device is of no more use."""
    try:
        yield
    except Exception as error:
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        say(row)
        if not isinstance(error, ImportError) and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # raises where a kernel has failed: the process ends


def timed(shapes: Shapes, names: list[str], machine: Machine, seconds: float) -> None:
    """Time arms on one workload, interleaved.

    Args:
        shapes: Of the parameters.
        names: Of the arms.
        machine: Where.
        seconds: To spend on each, about.
    """
    ready: list[tuple[Row, Contestant]] = []
    for name in names:
        row: Row = {"arm": name, "dtype": ARMS[name].dtype}
        with noting(row):
            contestant = Contestant(ARMS[name], shapes, machine)
            row |= {"bytes_per_param": contestant.stored, "traffic_bytes": contestant.traffic()}
            ready.append((row, contestant))
            say(row)
    rounds = 2 if machine.dry else 9
    series: dict[str, list[list[float]]] = {row["arm"]: [[], [], []] for row, _ in ready}
    for _ in range(rounds):
        for row, contestant in ready:
            if "error" in row:
                continue
            with noting(row):
                once = contestant.seconds(1)
                steps = 1 if machine.dry else max(5, min(200, int(seconds / rounds / once)))
                found = contestant.seconds(steps), *contestant.alone()
                for each, value in zip(series[row["arm"]], found, strict=True):
                    each.append(value * 1e6)
    for row, contestant in ready:
        if "error" in row:
            continue
        with noting(row):
            back_to_back, host, alone = series[row["arm"]]
            row |= {
                "step_us": statistics.median(back_to_back), "rounds_us": back_to_back,
                "host_us": statistics.median(host), "alone_us": statistics.median(alone),
                "launches": contestant.launches(),
            }  # fmt: skip
            say(row)
            row |= contestant.profiled()
            say(row)


def compared(machine: Machine) -> None:
    """Step small parameters on the device and on the CPU, and say where the bits differ."""
    if machine.dry:
        from ebbtide import _core

        _core.set_instruction_set("baseline")  # the interpreter does not contract
    steps = 2 if machine.dry else 200
    for name, arm in ARMS.items():
        if arm.make is not ebbtide.torch.AdamW or arm.graph:
            continue
        row: Row = {"arm": name, "steps": steps}
        with noting(row):
            there, here = (_stepped(arm, where, steps) for where in (machine.device, "core"))
            differing = [key for key in here if not torch.equal(there[key], here[key])]
            row |= {"equal": not differing, "differing": differing, "arrays": len(here)}
            say(row)


def _stepped(arm: Arm, where: str, steps: int) -> dict[str, torch.Tensor]:
    os.environ["EBBTIDE_BACKEND"] = "triton" if where == "cpu" else "cpu"
    device = "cpu" if where == "core" else where
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, arm.dtype)
    params = [torch.randn(s, generator=generator).to(device, dtype) for s in [(8, 128), (7,)]]
    optimizer = arm.make(params, lr=0.01, weight_decay=0.1, **arm.words)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
        optimizer.step()
    found = {}
    for index, param in enumerate(params):
        found[str(index)] = param.cpu()
        for key, value in optimizer.state[param].items():
            found[f"{index}.{key}"] = value.cpu()
    return found


def main() -> None:
    """Do what the argument says."""
    asked = json.loads(sys.argv[1])
    machine = Machine(dry=asked["dry"])
    if asked["dry"] or asked["task"] == "compare":
        import ebbtide.groups.state_format as formats

        formats.SMALL_NUMEL = 256  # small parameters in eight bits, too
    if asked["task"] == "describe":
        say({**machine.described(), "copy_bytes_per_second": machine.copy_bandwidth()})
    elif asked["task"] == "compare":
        compared(machine)
    else:
        timed(WORKLOADS[asked["workload"]], asked["arms"], machine, asked["seconds"])


if __name__ == "__main__":
    main()
