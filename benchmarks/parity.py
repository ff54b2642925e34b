"""Does training with fewer bytes end where float32 ends? Paired runs, and controls that must not.

    python -m benchmarks.parity --seeds 10 --out parity.jsonl

Every arm trains the same models from the same starts on the same batches; only the optimizer
differs. An arm is equivalent to float32 on a task if the 90 % interval of its paired difference in
test loss lies within half the deviation of float32's seeds (two one-sided t tests at 5 %). Control
arms that must not be equivalent say whether the task can tell anything: where one passes, nothing
is shown. Finished runs are kept in the file, a line each, and are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.func import functional_call

import ebbtide.torch
from benchmarks import peers
from benchmarks.lessons import LESSONS, Forward
from ebbtide.backends.cpu import one_thread
from ebbtide.lab.torch_training import one_torch_thread
from ebbtide.schedules import Cosine

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.1
REFERENCE = "float32"
MARGIN = 0.5  # of the deviation of float32's seeds


class Setting(NamedTuple):
    """How a lesson is trained: an lr at which a tenth more or less is felt."""

    lesson: str
    lr: float
    steps: int


TASKS = {
    "perceptron": Setting("perceptron", 2e-3, 400),
    "convnet": Setting("convnet", 2e-3, 300),
    "transformer": Setting("transformer", 2e-3, 400),
    "embedding": Setting("embedding", 1e-2, 600),
    "embedding, lr 3e-3": Setting("embedding", 3e-3, 600),
}


class Optimizer(Protocol):
    """As much of an optimizer as a run needs."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any:
        """Take a step."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


class Emulated:
    """AdamW in float32 whose large moments pass through a codec of `benchmarks/peers.py`."""

    def __init__(self, model: nn.Module, lr: float, codec: peers.Codec) -> None:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        params = list(model.parameters())
        large = [p for p in params if p.ndim > 1 and p.numel() >= 4096 and id(p) not in tables]
        chosen = {id(p) for p in large}
        small = [p for p in params if id(p) not in chosen]
        self._parts = [
            (part, peers.EmulatedAdam([p.shape for p in part], BETAS, EPS, each))
            for part, each in ((large, codec), (small, lambda m, v: (m, v)))
        ]
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}]

    @torch.no_grad()
    def step(self) -> None:
        lr = self.param_groups[0]["lr"]
        for params, adam in self._parts:
            updates = adam.step([p.grad for p in params if p.grad is not None])
            for param, update in zip(params, updates, strict=True):
                if param.ndim > 1:
                    param.mul_(1 - lr * WEIGHT_DECAY)
                param.sub_(update, alpha=lr)

    def zero_grad(self) -> None:
        for params, _ in self._parts:
            for param in params:
                param.grad = None


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        make: Makes the optimizer of a model at an lr.
        low_precision: Whether the parameters are bfloat16; what is computed with them is float32.
        lr_factor: Multiplies the task's lr.
        control: Must not be equivalent.
    """

    make: Callable[[nn.Module, float], Optimizer]
    low_precision: bool = False
    lr_factor: float = 1.0
    control: bool = False


def _ours(**formats: Any) -> Callable[[nn.Module, float], Optimizer]:
    def make(model: nn.Module, lr: float) -> Optimizer:
        groups = ebbtide.torch.param_groups(model, weight_decay=WEIGHT_DECAY)
        return ebbtide.torch.AdamW(
            groups, lr=lr, betas=BETAS, eps=EPS, nonfinite="propagate", **formats
        )

    return make


def _emulated(codec: peers.Codec) -> Callable[[nn.Module, float], Optimizer]:
    return lambda model, lr: Emulated(model, lr, codec)


def _torch(model: nn.Module, lr: float) -> Optimizer:
    groups = ebbtide.torch.param_groups(model, weight_decay=WEIGHT_DECAY)
    plain = [{"params": [p for _, p in g["params"]], "weight_decay": g["weight_decay"]}
             for g in groups]  # fmt: skip
    return torch.optim.AdamW(plain, lr=lr, betas=BETAS, eps=EPS)


ARMS = {
    REFERENCE: Arm(_ours()),
    "8bit": Arm(_ours(state_format="8bit")),
    "bfloat16 state": Arm(_ours(state_format="bfloat16")),
    "bf16: 32bit + 8bit": Arm(_ours(master_format="32bit", state_format="8bit"), True),
    "bf16: 24bit + 8bit": Arm(_ours(master_format="24bit", state_format="8bit"), True),
    "bf16: stochastic + 8bit": Arm(_ours(master_format="stochastic", state_format="8bit"), True),
    "bf16: as it comes": Arm(_ours(), True),
    "lr × 0.9": Arm(_ours(), lr_factor=0.9, control=True),
    "lr × 1.1": Arm(_ours(), lr_factor=1.1, control=True),
    "naive int8 v": Arm(_emulated(peers.naive_int8_second), control=True),
    "bf16 to nearest": Arm(_torch, True, control=True),
    "flashoptim's": Arm(_emulated(peers.flashoptim)),
    "bitsandbytes'": Arm(_emulated(peers.bitsandbytes)),
    "torchao's 4 bits": Arm(_emulated(peers.torchao4)),
}
EMULATED = {"flashoptim's", "bitsandbytes'", "torchao's 4 bits"}


class Run(NamedTuple):
    """One training."""

    task: str
    arm: str
    seed: int
    steps: int
    lr: float


def train(run: Run) -> dict[str, Any]:
    """Train and return a record of it; the loss is None where training diverged."""
    started = time.perf_counter()
    with one_torch_thread(), one_thread():
        loss = _test_loss(run)
    seconds = round(time.perf_counter() - started, 2)
    return {**run._asdict(), "loss": loss if math.isfinite(loss) else None, "seconds": seconds}


def _test_loss(run: Run) -> float:
    arm = ARMS[run.arm]
    lesson = LESSONS[TASKS[run.task].lesson](run.seed)
    model = lesson.model()
    if arm.low_precision:
        model.bfloat16()
    forward = _forward(model) if arm.low_precision else model
    optimizer = arm.make(model, run.lr)
    schedule = Cosine(run.steps)
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * arm.lr_factor * schedule(step)
        optimizer.zero_grad()
        lesson.batch_loss(forward, step).backward()
        optimizer.step()
    return lesson.test_loss(forward)


def _forward(model: nn.Module) -> Forward:
    """Compute in float32 with the numbers that bfloat16 parameters hold."""
    params = dict(model.named_parameters())

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        wide = {name: param.float() for name, param in params.items()}
        output: torch.Tensor = functional_call(model, wide, (inputs,))
        return output

    return forward


Records = dict[Run, float]


def read(path: Path) -> Records:
    """Return the losses of finished runs; a line that a kill has cut off is left out."""
    found: Records = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        loss = record["loss"]
        found[Run(*(record[key] for key in Run._fields))] = math.nan if loss is None else loss
    return found


def complete(runs: Sequence[Run], path: Path, workers: int) -> Records:
    """Do the runs that the file lacks, a line each; return all of its records."""
    done = read(path)
    missing = [run for run in runs if run not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are in {path}", flush=True)
    if not missing:
        return done
    with path.open("a") as file:
        file.write("\n" if path.stat().st_size and not path.read_text().endswith("\n") else "")
        for record in _records(missing, workers):
            file.write(json.dumps(record) + "\n")
            file.flush()
    return read(path)


def _records(runs: Sequence[Run], workers: int) -> Iterator[dict[str, Any]]:
    """Yield the records as they come, from processes of their own if there are several."""
    if workers == 1:
        yield from map(train, runs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for future in as_completed([pool.submit(train, run) for run in runs]):
            yield future.result()


class Verdict(NamedTuple):
    """One arm beside float32 on one task.

    Attributes:
        seeds: Pairs.
        difference: Mean of the paired differences in loss.
        low: Lower end of its 90 % interval.
        high: Upper end.
        margin: Half the deviation of float32's seeds.
        word: "equivalent", "different" (the interval excludes 0 too), "undecided" or "diverged".
    """

    seeds: int
    difference: float
    low: float
    high: float
    margin: float
    word: str


def verdict(arm: Sequence[float], reference: Sequence[float]) -> Verdict:
    """Compare losses, seed by seed, by two one-sided t tests at 5 %.

    Example:
        >>> reference = [1.0, 1.1, 0.9, 1.0, 1.05]
        >>> verdict([each + 0.001 for each in reference], reference).word
        'equivalent'
        >>> verdict([each + 0.1 for each in reference], reference).word
        'different'
    """
    from scipy.special import stdtrit

    count = len(reference)
    margin = MARGIN * statistics.stdev(reference)
    differences = [a - b for a, b in zip(arm, reference, strict=True)]
    mean = statistics.fmean(differences)
    if not math.isfinite(mean):
        return Verdict(count, mean, mean, mean, margin, "diverged")
    reach = float(stdtrit(count - 1, 0.95)) * statistics.stdev(differences) / math.sqrt(count)
    low, high = mean - reach, mean + reach
    if -margin < low and high < margin:
        word = "equivalent"
    else:
        word = "different" if low > 0 or high < 0 else "undecided"
    return Verdict(count, mean, low, high, margin, word)


def verdicts(records: Records, task: str, arms: Iterable[str]) -> dict[str, Verdict]:
    """Compare every arm of a task with float32, over the seeds that both have."""
    losses: dict[str, dict[int, float]] = {}
    for run, loss in records.items():
        if run.task == task and (run.lr, run.steps) == TASKS[task][1:]:
            losses.setdefault(run.arm, {})[run.seed] = loss
    reference = losses.get(REFERENCE, {})
    found = {}
    for arm in arms:
        seeds = sorted(reference.keys() & losses.get(arm, {}).keys())
        if arm != REFERENCE and len(seeds) > 2:
            found[arm] = verdict([losses[arm][s] for s in seeds], [reference[s] for s in seeds])
    return found


def report(task: str, found: dict[str, Verdict], reference: Sequence[float]) -> Iterator[str]:
    """Yield a task's table. What controls cannot tell apart shows nothing of the others."""
    passed = [arm for arm, v in found.items() if ARMS[arm].control and v.word == "equivalent"]
    missing = [arm for arm, each in ARMS.items() if each.control and arm not in found]
    yield (
        f"\n{task}: float32 ends at {statistics.fmean(reference):.4f} ± "
        f"{statistics.stdev(reference):.4f} (deviation of {len(reference)} seeds); the margin is "
        f"half of that"
    )
    for arm, v in found.items():
        word = v.word
        if ARMS[arm].control:
            word += ": the control passes" if v.word == "equivalent" else ", as it must not pass"
        elif v.word == "equivalent" and (passed or missing):
            word = "not shown"
        unit = 2 * v.margin
        yield (
            f"  {arm:<24}{v.difference / unit:+7.2f} deviations, 90 % "
            f"[{v.low / unit:+.2f}, {v.high / unit:+.2f}]  {v.seeds} seeds  {word}"
        )
    if passed or missing:
        why = [*(f"{arm} is told equivalent" for arm in passed), *(f"no {a}" for a in missing)]
        yield f"  nothing is shown by this task: {', '.join(why)}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    usual = [arm for arm in ARMS if arm not in EMULATED]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=usual)
    parser.add_argument("--seeds", type=int, default=10, help="pairs of runs, at least 3")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of every task; each has its own by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("parity.jsonl"), help="finished runs")
    asked = parser.parse_args()
    if asked.seeds < 3:
        parser.error("a deviation of fewer than 3 seeds says nothing")
    return asked


def main() -> None:
    """Train what is missing, print the verdicts."""
    asked = _arguments()
    if asked.steps:
        TASKS.update({name: each._replace(steps=asked.steps) for name, each in TASKS.items()})
    arms = list(dict.fromkeys([REFERENCE, *asked.arms]))
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    runs = [
        Run(task, arm, seed, TASKS[task].steps, TASKS[task].lr)
        for seed in seeds
        for task in asked.tasks
        for arm in arms
    ]
    records = complete(runs, asked.out, asked.workers)
    for task in asked.tasks:
        found = verdicts({run: records[run] for run in runs}, task, arms)
        reference = [records[run] for run in runs if run.task == task and run.arm == REFERENCE]
        print("\n".join(report(task, found, reference)))


if __name__ == "__main__":
    main()
