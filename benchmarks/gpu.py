"""A step on an NVIDIA GPU: built, checked, timed beside others, set against the card's bandwidth.

    python benchmarks/gpu.py --out gpu.json

Everything is done in one go and in other processes, so that what fails costs its own row alone; the
file is written anew after each stage. Needs torch with CUDA and Triton; a compiler and what
pyproject.toml builds with, for the core that the GPU is compared with; pytest and hypothesis for
the tests. Nothing is installed: the build goes to build/gpu. Prints a table last.

A step is timed end to end, the host's time included: `step_us` of many in a row, `alone_us` of one
with gradients at new addresses, `host_us` until that call returns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
Row = dict[str, Any]

OURS = [
    "ebbtide", "torch fused", "torch foreach", "ebbtide, clipped", "torch fused, clipped",
    "ebbtide, graph", "torch fused, graph", "ebbtide 8-bit", "ebbtide bf16", "torch fused bf16",
    "ebbtide bf16, 8-bit", "ebbtide bf16+8, 8-bit", "ebbtide bf16+16, 8-bit",
]  # fmt: skip
PEERS = {
    "bitsandbytes": ["bitsandbytes 8-bit", "bitsandbytes bf16, 8-bit"],
    "flashoptim": ["flashoptim bf16+8, 8-bit"],
    "torchao": ["torchao 8-bit", "torchao bf16, 8-bit"],
}
MODEL, ONE, SMALL = "300 tensors, 112 M", "one tensor of 64 M", "2,000 tensors of 1,000"
BESIDE = "torch fused"  # what every arm is set against, in its own process
# (what, workload, number of a row, arm, that of, at least)
GOALS = [
    ("fp32, one tensor: share of the copy bandwidth", ONE, "share", "ebbtide", None, 0.95),
    ("fp32, one tensor, against torch fused", ONE, "step_us", "ebbtide", BESIDE, 1.0),
    ("300 tensors, against torch fused", MODEL, "step_us", "ebbtide", BESIDE, 1.5),
    ("2,000 small ones, against torch fused", SMALL, "step_us", "ebbtide", BESIDE, 3.0),
    ("8-bit, against torch fused fp32", MODEL, "step_us", "ebbtide bf16+8, 8-bit", BESIDE, 2.0),
    ("8-bit, against flashoptim", MODEL, "step_us", "ebbtide bf16+8, 8-bit",
     "flashoptim bf16+8, 8-bit", 2.0),
    ("8-bit, against bitsandbytes", MODEL, "step_us", "ebbtide bf16, 8-bit",
     "bitsandbytes bf16, 8-bit", 2.0),
]  # fmt: skip

# Key of a row, title, width, format.
COLUMNS = [
    ("step_us", "step µs", 11, ".1f"), ("ratio", "ratio", 7, ".2f"), ("share", "share", 7, ".0%"),
    ("alone_us", "alone µs", 11, ".1f"), ("host_us", "host µs", 11, ".1f"),
    ("gpu_us", "GPU µs", 11, ".1f"), ("kernels", "kernels", 8, "d"),
    ("bytes_per_param", "B/param", 8, ".2f"),
]  # fmt: skip


class Run:
    """One run of the script: its report, its deadline, the environment of its processes."""

    def __init__(self, out: Path, seconds: float, *, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.deadline = time.monotonic() + seconds
        self.report: dict[str, Any] = {"dry": dry, "stages": {}, "workloads": {}}
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if dry:
            self.environment |= {"TRITON_INTERPRET": "1", "EBBTIDE_BACKEND": "triton"}

    def add_path(self, path: Path) -> None:
        """Let processes import from a folder, before all others."""
        paths = [str(path), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    def call(self, stage: str, command: list[str], limit: float, *, cwd: Path = ROOT) -> str:
        """Run a command, in what is left of the time at most; returns what it printed."""
        limit = min(limit, self.deadline - time.monotonic())
        note: Row = {"outcome": "out of time"}
        self.report["stages"][stage] = note
        text = ""
        if limit > 1:
            start = time.monotonic()
            with tempfile.TemporaryFile("w+", errors="replace") as file:
                note["outcome"] = _ended(command, limit, cwd, self.environment, file)
                file.seek(0)
                text = file.read()
            note["seconds"] = round(time.monotonic() - start, 1)
            if note["outcome"] != "passed":
                note["output"] = text[-3000:]
        print(f"{stage}: {note['outcome']} ({note.get('seconds', 0)} s)", flush=True)
        self.save()
        return text

    def work(self, stage: str, limit: float, **asked: Any) -> list[Row]:
        """Let a worker do a task; returns its rows, the last of each arm."""
        words = json.dumps({"dry": self.dry, **asked})
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_worker.py"), words]
        found: dict[str, Row] = {}
        for line in self.call(stage, command, limit).splitlines():
            if line.startswith("ROW "):
                row = json.loads(line.removeprefix("ROW "))
                found[row.get("arm", "")] = row
        return list(found.values())

    def save(self) -> None:
        """Write the report."""
        self.out.write_text(json.dumps(self.report, indent=1))


def _ended(
    command: list[str], limit: float, cwd: Path, environment: dict[str, str], file: Any
) -> str:
    """Run a command with all that it starts, and say how it ended."""
    try:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"could not start: {error}"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"killed after {limit:.0f} s"
    return "passed" if code == 0 else f"ended with {code}"


def build(run: Run) -> None:
    """Build the core into build/gpu, unless this source is installed with one."""
    probe = "import ebbtide, ebbtide._core; print('AT', ebbtide.__file__)"
    there = run.call("core", [sys.executable, "-c", probe], 60, cwd=Path("/"))
    if f"AT {ROOT / 'src'}" in there:
        return
    pip = [
        sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(SITE),
    ]  # fmt: skip
    for extra in (["--no-build-isolation", "--no-index"], []):
        run.call("build" + " isolated" * (not extra), [*pip, *extra, str(ROOT)], 240)
        if list((SITE / "ebbtide").glob("_core*.so")):
            run.add_path(SITE)
            return
    run.add_path(ROOT / "src")  # what needs no core goes on


def check(run: Run) -> None:
    """Run the tests on the GPU, over several processes where pytest-xdist is there."""
    # These files alone: others import packages that need not be there.
    files = sorted(str(each) for each in (ROOT / "tests").glob("test_triton*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", *files]
    if run.dry:
        command.append("--collect-only")
    elif find_spec("xdist"):
        command += ["-n", "6"]
    text = run.call("tests", command, 300)
    run.report["tests"] = [
        line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))
    ] + text.strip().splitlines()[-1:]


def time_arms(run: Run, workload: str, arms: list[str], stage: str, limit: float) -> None:
    """Time arms in one process; those that it leaves without a number, one by one."""
    rows = run.report["workloads"].setdefault(workload, [])
    asked = {"task": "time", "workload": workload, "seconds": 0.5}
    found = run.work(stage, limit, arms=arms, **asked)
    failed = run.report["stages"][stage]["outcome"] != "passed"
    for arm in arms if failed else []:
        if not any(row["arm"] == arm and ("error" in row or "step_us" in row) for row in found):
            alone = [arm] if arm == BESIDE else [BESIDE, arm]
            more = run.work(f"{stage}, {arm}", 40, arms=alone, **asked)
            missing: Row = {"arm": arm, "error": run.report["stages"][f"{stage}, {arm}"]["outcome"]}
            found = [row for row in found if row["arm"] != arm]
            found += [row for row in more if row["arm"] == arm] or [missing]
    beside = next((row.get("step_us") for row in found if row["arm"] == BESIDE), None)
    known = {row["arm"] for row in rows}
    for row in found:
        if "step_us" in row and beside:
            row["ratio"] = beside / row["step_us"]
        bandwidth = run.report.get("machine", {}).get("copy_bytes_per_second")
        if "step_us" in row and row.get("traffic_bytes") and bandwidth:
            row["share"] = row["traffic_bytes"] / (row["step_us"] * 1e-6) / bandwidth
        if row["arm"] not in known:
            rows.append(row)
    run.save()


def goals(report: dict[str, Any]) -> list[str]:
    """Set what was found against what is aimed at."""
    lines = []
    for what, workload, number, arm, other, least in GOALS:
        rows = {row["arm"]: row.get(number) for row in report["workloads"].get(workload, [])}
        found = rows.get(arm)
        if other is not None and found:
            found = rows[other] / found if rows.get(other) else None
        said = (
            "not known" if found is None else f"{found:.2f} {'met' if found >= least else 'MISSED'}"
        )
        lines.append(f"{what:48} goal {least:.2f}  found {said}")
    return lines


def table(report: dict[str, Any]) -> list[str]:
    """Return the results: `ratio` is torch fused's time over the arm's, `share` of the copy's."""
    head = "".join(f"{title:>{width}}" for _, title, width, _ in COLUMNS)
    lines = []
    for workload, rows in report["workloads"].items():
        lines += ["", f"{workload:26}{head}"]
        for row in rows:
            cells = "".join(_cell(row, *column) for column in COLUMNS)
            lines.append(f"{row['arm']:26}{cells if 'error' not in row else row['error'][:72]}")
    return lines


def _cell(row: Row, key: str, _: str, width: int, form: str) -> str:
    value = row.get(key)
    if value is None and key == "kernels":
        value = row.get("launches")
    return " " * width if value is None else f"{value:{width}{form}}"


def summary(run: Run) -> list[str]:
    """Return the last lines: what was checked, the table, the goals."""
    report = run.report
    same = [row["arm"] for row in report.get("bits", []) if row.get("equal")]
    other = [row["arm"] for row in report.get("bits", []) if not row.get("equal")]
    return [
        *table(report),
        "",
        *goals(report),
        "",
        f"bits of the CPU: {len(same)} alike; otherwise: {', '.join(other) or 'none'}",
        *report.get("tests", [])[-12:],
        str(report.get("machine")),
        *(["DRY RUN: nothing was measured"] if run.dry else []),
    ]


def main(words: list[str] | None = None) -> int:
    """Build, check, time, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--no-check", action="store_true", help="do not run the tests")
    parser.add_argument("--dry", action="store_true", help="tiny, in the interpreter: no result")
    options = parser.parse_args(words)
    run = Run(options.out, options.seconds, dry=options.dry)
    build(run)
    if not run.dry:
        smi = "nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
        run.report["nvidia-smi"] = run.call("card", [*smi.split(), "--format=csv"], 20).strip()
    described = run.work("machine", 90, task="describe")
    if not described:
        why = run.report["stages"]["machine"].get("output", "")
        print("\n".join([why, "nothing was checked or timed: is there a GPU?", *summary(run)]))
        return 2
    run.report["machine"] = described[0]
    run.report["bits"] = run.work("bits", 120, task="compare")
    workloads = ["dry"] if run.dry else [MODEL, ONE, SMALL]
    for workload in workloads:
        time_arms(run, workload, OURS, f"time {workload}", 90)
    if not options.no_check:
        check(run)
    for workload in workloads:
        for peer, arms in PEERS.items():
            if find_spec(peer):
                time_arms(run, workload, [BESIDE, *arms], f"time {workload}, {peer}", 75)
            else:
                rows = run.report["workloads"][workload]
                rows += [{"arm": arm, "error": f"{peer} is not installed"} for arm in arms]
    run.save()
    print("\n".join(summary(run)), flush=True)
    unequal = [row for row in run.report["bits"] if not row.get("equal")]
    tested = options.no_check or run.report["stages"]["tests"]["outcome"] == "passed"
    return 0 if tested and run.report["bits"] and not unequal else 1


if __name__ == "__main__":
    raise SystemExit(main())
