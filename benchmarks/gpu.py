"""A step on an NVIDIA GPU: checked, timed beside others, and set against the card's bandwidth.

    python benchmarks/gpu.py --out gpu.json

Runs `pytest -m gpu` first, then times every optimizer that is installed in one process, in turn,
round by round. A step is timed end to end: the host's time is part of it. Prints a table last.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ebbtide.torch

# Name: shapes of the parameters.
WORKLOADS: dict[str, list[tuple[int, ...]]] = {
    "one tensor of 64 M": [(1 << 26,)],
    "300 tensors, 120 M": [(768, 768), (768, 208)] * 150,
    "2,000 tensors of 1,000": [(1000,)] * 2000,
}
TINY = {"tiny": [(64, 3), (5,)]}
# Stored and moved bytes a parameter: read and written once each, the gradient read.
TRAFFIC = {"float32": 28, "bfloat16": 14}


class Arm(NamedTuple):
    """One optimizer: what it is called, its parameters' dtype, and how it is made."""

    name: str
    dtype: str
    make: Callable[[list[torch.Tensor]], Any]


def arms() -> list[Arm]:
    """List the optimizers that can be imported here."""
    ours, theirs = ebbtide.torch.AdamW, torch.optim.AdamW
    found = [
        Arm("ebbtide", "float32", ours),
        Arm("ebbtide, clipped", "float32", lambda p: ours(p, clip_grad_norm=1.0)),
        Arm("torch fused", "float32", lambda p: theirs(p, fused=True)),
        Arm("torch foreach", "float32", lambda p: theirs(p, foreach=True)),
        Arm("ebbtide", "bfloat16", ours),
        Arm("torch fused", "bfloat16", lambda p: theirs(p, fused=True)),
    ]
    for name, dtype, load in PEERS:
        try:
            found.append(Arm(name, dtype, load()))
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return found


def _bitsandbytes() -> Callable[[list[torch.Tensor]], Any]:
    import bitsandbytes

    make: Callable[[list[torch.Tensor]], Any] = bitsandbytes.optim.AdamW8bit
    return make


def _torchao() -> Callable[[list[torch.Tensor]], Any]:
    from torchao.optim import AdamW8bit

    make: Callable[[list[torch.Tensor]], Any] = AdamW8bit
    return make


def _flashoptim() -> Callable[[list[torch.Tensor]], Any]:
    from flashoptim import FlashAdamW

    make: Callable[[list[torch.Tensor]], Any] = FlashAdamW
    return make


PEERS = [
    ("bitsandbytes 8-bit", "float32", _bitsandbytes),
    ("torchao 8-bit", "float32", _torchao),
    ("flashoptim", "bfloat16", _flashoptim),
]


def wait(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str, elements: int) -> float:
    """Return the bytes a second that copying a large tensor reads and writes."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def prepared(arm: Arm, shapes: list[tuple[int, ...]], device: str) -> Any:
    """Return an optimizer over fresh parameters that has taken a few steps."""
    dtype = getattr(torch, arm.dtype)
    params = [torch.randn(s, device=device, dtype=dtype).requires_grad_() for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 0.01
    optimizer = arm.make(params)
    for _ in range(3):
        optimizer.step()
    wait(device)
    return optimizer


def seconds_of(optimizer: Any, steps: int, device: str) -> float:
    """Return the seconds of one step, end to end."""
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    wait(device)
    return (time.perf_counter() - start) / steps


def timed(
    shapes: list[tuple[int, ...]], device: str, rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Time every arm on one workload, interleaved; one that fails says why."""
    rows: list[dict[str, Any]] = []
    ready: list[tuple[dict[str, Any], Any]] = []
    for arm in arms():
        row: dict[str, Any] = {"name": arm.name, "dtype": arm.dtype}
        rows.append(row)
        try:
            ready.append((row, prepared(arm, shapes, device)))
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
    series: list[list[float]] = [[] for _ in ready]
    for _ in range(rounds):
        for found, (_, optimizer) in zip(series, ready, strict=True):
            found.append(seconds_of(optimizer, steps, device))
    for found, (row, _) in zip(series, ready, strict=True):
        row["step_us"] = statistics.median(found) * 1e6
        row["quartiles_us"] = [each * 1e6 for each in statistics.quantiles(found, n=4)]
    return rows


def machine(device: str) -> dict[str, str]:
    """Return what the numbers were taken on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device == "cuda":
        import triton

        found |= {"triton": triton.__version__, "card": torch.cuda.get_device_name()}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        smi = subprocess.run(query, capture_output=True, text=True, check=False)
        found["driver"] = smi.stdout.strip()
    return found


def table(report: dict[str, Any]) -> str:
    """Return the results as a table; the share is that of the copy bandwidth."""
    lines = [f"{'workload':24}{'optimizer':20}{'dtype':10}{'µs a step':>12}{'share':>8}"]
    for workload, rows in report["workloads"].items():
        for row in rows:
            start = f"{workload:24}{row['name']:20}{row['dtype']:10}"
            if "error" in row:
                lines.append(f"{start}{row['error'][:60]}")
                continue
            share = "" if row.get("share") is None else f"{row['share']:.0%}"
            lines.append(f"{start}{row['step_us']:12.1f}{share:>8}")
    return "\n".join(lines)


def main() -> int:
    """Check, time, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="in a round")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests first")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU: no result")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked or timed")
        return 2
    checked = "not asked for"
    if device == "cuda" and not options.no_check:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        code = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False).returncode
        checked = "passed" if code == 0 else f"failed: pytest ended with {code}"
    bandwidth = copy_bandwidth(device, 1 << (12 if options.rehearse else 28))
    report: dict[str, Any] = {
        "machine": machine(device), "checked": checked, "copy_bytes_per_second": bandwidth,
        "workloads": {},
    }  # fmt: skip
    for workload, shapes in (TINY if options.rehearse else WORKLOADS).items():
        rows = timed(shapes, device, options.rounds, options.steps)
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        for row in rows:
            bytes_moved = TRAFFIC[row["dtype"]] * numel
            plain = row["name"] in ("ebbtide", "torch fused", "torch foreach")
            if plain and "step_us" in row:
                row["share"] = bytes_moved / (row["step_us"] * 1e-6) / bandwidth
        report["workloads"][workload] = rows
    options.out.write_text(json.dumps(report, indent=1))
    print(f"checks: {checked}; copy bandwidth {bandwidth / 1e9:.0f} GB/s; {report['machine']}")
    print(table(report))
    return 0 if checked in ("passed", "not asked for") else 1


if __name__ == "__main__":
    raise SystemExit(main())
