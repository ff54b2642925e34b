"""What `DecayMonitor` costs a step, and how exact one of its samples is.

Run it as `python -m benchmarks.monitor`.
"""

from __future__ import annotations

import statistics
import time

import torch

from ebbtide.torch import AdamW, DecayMonitor

_ROUNDS, _STEPS = 15, 40


def _model(params: int, numel: int, dtype: torch.dtype = torch.float32) -> AdamW:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(numel // 128, 128).to(dtype)) for _ in range(params)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return AdamW(weights, lr=3e-4, weight_decay=0.1)


def _seconds(optimizer: AdamW, steps: int) -> float:
    """Return the time of a step: the best of several rounds."""
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        rounds.append((time.perf_counter() - began) / steps)
    return min(rounds)


def main() -> None:
    """Print the costs and the error."""
    torch.set_num_threads(1)
    plain, watched = _model(8, 1280), _model(8, 1280)
    DecayMonitor(watched, every=1_000_000)
    # The first step of all is measured.
    for optimizer in (plain, watched):
        optimizer.step()
    extra = _seconds(watched, _STEPS) - _seconds(plain, _STEPS)
    print(f"a step that is not measured: {1e6 * extra:.0f} µs more")
    for numel in (1280, 12_800, 128_000):
        plain, watched = _model(8, numel), _model(8, numel)
        DecayMonitor(watched, every=1)
        extra = _seconds(watched, 3) - _seconds(plain, 3)
        print(f"a step that is: {1e3 * extra / 8:.2f} ms more for a parameter of {numel:,} numbers")
    half = _model(1, 128_000, torch.bfloat16)
    monitor = DecayMonitor(half, every=1)
    errors = []
    for _ in range(5):
        half.step()
        errors.append(monitor.last["decay/group0/realised_error"])
    share = monitor.last["decay/group0/share"]
    print(f"bfloat16: error {statistics.median(errors):.1e} of a sample, decay {share:.1e} a step")


if __name__ == "__main__":
    main()
