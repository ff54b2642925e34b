"""The benchmark: every scenario on every workload, a table, JSON, a picture of cost growth."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ebbtide.backends.cpu import describe, memory_stream
from ebbtide.lab.bench.backward import INSIDE, backward_contestants
from ebbtide.lab.bench.measure import Timing, interleaved, step_peak_bytes
from ebbtide.lab.bench.peers import BASELINE, Peers, installed
from ebbtide.lab.bench.workloads import SCENARIOS, WORKLOADS, Contestant, Scenario, Workload

__all__ = ["Benchmark", "Row", "readme_table", "run"]

_BYTES_PER_ELEMENT = 28  # read θ, g, m, v and write θ, m, v in float32
_STEADY = 1.2  # where memory's speed has changed by more meanwhile no share of it is told
_DEAD_STEPS = 900  # after about 700 steps without gradient m is below 2⁻¹²⁶ and stays there


@dataclass(frozen=True)
class Row:
    """One scenario on one workload."""

    scenario: str
    workload: str
    what: str
    numel: int
    tensors: int
    timings: dict[str, Timing]
    stream_share: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        timings = {name: timing.as_dict() for name, timing in self.timings.items()}
        return {**self.__dict__, "timings": timings}


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured, and where."""

    machine: dict[str, str]
    rows: list[Row]
    growth: list[Row]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "machine": self.machine,
            "rows": [row.as_dict() for row in self.rows],
            "growth": [row.as_dict() for row in self.growth],
        }

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")


def run(
    *,
    workloads: list[str],
    scenarios: list[str],
    seconds: float,
    all_peers: bool = False,
    growth: bool = False,
    tick: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure.

    Args:
        workloads: Names from `WORKLOADS`.
        scenarios: Names from `SCENARIOS`, and `"backward"`.
        seconds: About how long each row is measured.
        all_peers: Also peers that are slow to start or seldom installed.
        growth: Also how the cost grows with elements and with tensors.
        tick: Called with a title before each row.
    """
    rows = []
    # Backward first: once larger tensors have been freed, the allocator keeps memory at hand that
    # it would otherwise ask the system for at every gradient; the row would depend on the others.
    for name in sorted(scenarios, key=lambda each: each != "backward"):
        if name == "backward":
            tick("backward and step")
            rows.append(_backward(seconds))
            continue
        scenario = SCENARIOS[name]
        for each in scenario.workloads if workloads == list(WORKLOADS) else workloads:
            if each in scenario.workloads or each == "tiny":
                tick(f"{scenario.what}: {WORKLOADS[each].what}")
                rows.append(_measure(scenario, WORKLOADS[each], seconds, all_peers))
    grown = []
    if growth:
        for workload in _growing():
            tick(f"cost growth: {workload.what}")
            grown.append(_measure(SCENARIOS["step"], workload, seconds / 4, False))
    return Benchmark(_machine(), rows, grown)


def _measure(scenario: Scenario, workload: Workload, seconds: float, all_peers: bool) -> Row:
    contestants = {
        name: Contestant(
            workload,
            make,
            clip=clip,
            dead=scenario.dead,
            dtype=torch.float32 if name == BASELINE else scenario.dtype,
        )
        for name, (make, clip) in _peers(scenario, all_peers).items()
    }
    if scenario.dead:
        for contestant in contestants.values():
            for _ in range(_DEAD_STEPS):
                contestant.step()
    repeats = 20 if workload.small else 1
    bound = scenario.name == "step" and workload.numel >= 20_000_000
    before = memory_stream(workload.numel, 5) if bound else 0.0
    timings = interleaved(contestants, BASELINE, seconds=seconds, repeats=repeats)
    after = memory_stream(workload.numel, 5) if bound else 0.0
    peaks = {name: step_peak_bytes(each) for name, each in contestants.items()}
    share = None
    if bound and max(before, after) < _STEADY * min(before, after):
        share = (before + after) / 2 * 1e6 / timings["ebbtide"].step_us
    return Row(
        scenario.name,
        workload.name,
        f"{scenario.what}, {workload.what}",
        workload.numel,
        len(workload.shapes),
        timings,
        share,
        {name: peak for name, peak in peaks.items() if peak is not None},
    )


def _peers(scenario: Scenario, all_peers: bool) -> Peers:
    peers = installed(clip=scenario.clip, all_peers=all_peers, options=scenario.options)
    kept = set(peers)
    if scenario.dead:  # the loop over tensors in Python takes minutes to let 25 M elements die
        kept -= {"default", "foreach"}
    if scenario.low_bit:  # only those that keep less than float32 too
        kept = {BASELINE, "ebbtide"} | (
            {"bitsandbytes, 8-bit"} & kept if scenario.options else set()
        )
    found = {name: peer for name, peer in peers.items() if name in kept}
    if scenario.dtype is not torch.float32:
        found["fused, bfloat16"] = peers[BASELINE]
    return found


def _backward(seconds: float) -> Row:
    contestants = backward_contestants()
    timings = interleaved(contestants, BASELINE, seconds=seconds)
    params = list(next(iter(contestants.values())).model.parameters())
    numel = sum(param.numel() for param in params)
    what = "backward and step, 24 linear layers of 1024, batch 8"
    return Row("backward", "linear", what, numel, len(params), timings)


def _growing() -> Iterator[Workload]:
    for exponent in range(3, 9):
        yield Workload(f"n1e{exponent}", f"1 tensor of 1e{exponent}", ((10**exponent,),))
    for tensors in (10, 100, 1000, 10000):
        shapes = ((10**7 // tensors,),) * tensors
        yield Workload(f"t{tensors}", f"{tensors} tensors, 10 M in all", shapes)


def _machine() -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "instruction set": describe().get("instruction set", "none"),
    }


def readme_table(benchmark: Benchmark) -> str:
    """Return the measured ratios as a Markdown table, with the machine they were measured on."""
    machine = benchmark.machine
    lines = [
        f"Measured on {machine['date']} by `ebbtide bench`: {machine['processor']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, {machine['instruction set']}. "
        "Times faster than `torch.optim.AdamW(fused=True)`, median [quartiles] of rounds in turn.",
        "",
        "| what | elements | tensors | ebbtide | torch default | torch foreach |",
        "|---|---|---|---|---|---|",
    ]
    for row in benchmark.rows:
        cells = [
            str(row.timings[name].ratio) if name in row.timings else "–"
            for name in ("default", "foreach")
        ]
        ours = str(row.timings["ebbtide"].ratio)
        inside = [
            f"{row.timings[name].ratio} {words}"
            for name, words in INSIDE.items()
            if name in row.timings
        ]
        if inside:
            ours = ", ".join(inside)
        lines.append(
            f"| {row.what} | {row.numel:,} | {row.tensors:,} | {ours} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)
