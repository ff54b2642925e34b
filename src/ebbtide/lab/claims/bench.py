"""What the claims' experiments share: the effort, the progress, and runs that several read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from threading import Event
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ebbtide.lab.digits import DigitsArm
from ebbtide.lab.experiment import ArmResult, Experiment, Watcher, run
from ebbtide.lab.memory import FORGETFUL, Memory
from ebbtide.lab.optimizers import OPTIMIZERS, OptimizerSpec
from ebbtide.lab.parallel import on_all_processors, stoppable
from ebbtide.lab.tasks import Cell, Metric, Outcomes, Task, Tick

__all__ = [
    "ADAMW",
    "CAUTIOUS",
    "INDEPENDENT",
    "LOSS",
    "MULTI_SCALE",
    "PLAIN",
    "SHARED",
    "STANDARDISED",
    "Bench",
    "Effort",
    "Shared",
    "everything",
]

T = TypeVar("T")

ADAMW = OPTIMIZERS["adamw"]

INDEPENDENT = replace(
    ADAMW,
    name="adamw-independent",
    label="AdamW, decay without lr",
    # λ here is the share decayed at the peak of the schedule: lr·λ of AdamW at lr 0.01.
    weight_decay_unit=0.01,
    options=MappingProxyType({"decay_policy": "independent"}),
)
CAUTIOUS = replace(
    ADAMW,
    name="adamw-cautious",
    label="AdamW, cautious decay",
    options=MappingProxyType({"cautious": True}),
)


def everything(name: str, array: NDArray[np.float32]) -> bool:
    """Decay every array, vectors included: a decay mask."""
    del name, array
    return True


LOSS = Metric("loss", "nats", higher_is_better=False, decimals=3)
PLAIN = DigitsArm("plain", "Pixels as they are", "")
MULTI_SCALE = DigitsArm("multi-scale", "Columns on very different scales", "", column_spread=0.7)
STANDARDISED = DigitsArm(
    "standardised",
    "The same columns brought to mean 0 and deviation 1",
    "",
    column_spread=0.7,
    standardise=True,
)


@dataclass(frozen=True)
class Effort:
    """How much is spent: the full run, or a minute in all."""

    quick: bool = False
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of a training run."""
        return 300 if self.quick else 1000

    @property
    def seeds(self) -> tuple[int, ...]:
        """Paired seeds that results are reported on."""
        return tuple(range(self._first + 500, self._first + 500 + (5 if self.quick else 20)))

    @property
    def selection_seeds(self) -> tuple[int, ...]:
        """Seeds that settings are chosen by; none of the others."""
        return tuple(range(self._first, self._first + (2 if self.quick else 8)))

    @property
    def _first(self) -> int:
        return 1000 * self.seed

    def replicates(self, full: int) -> int:
        """Return how often to repeat a simulation that the full run repeats `full` times."""
        return max(4, full // 5) if self.quick else full


@dataclass(frozen=True)
class Shared:
    """An experiment that several claims read: optimizers, each over its grid, on one arm."""

    arm: DigitsArm
    specs: tuple[OptimizerSpec, ...]
    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    quick_lrs: tuple[float, ...]
    quick_weight_decays: tuple[float, ...]

    def experiment(self, effort: Effort) -> Experiment:
        """Return the experiment at an effort."""
        arm = replace(self.arm, steps=effort.steps)
        return Experiment(
            task=Task(arm.name, arm.title, arm.description, (arm,)),
            specs=self.specs,
            lrs=self.quick_lrs if effort.quick else self.lrs,
            weight_decays=self.quick_weight_decays if effort.quick else self.weight_decays,
            selection_seeds=effort.selection_seeds,
            test_seeds=effort.seeds,
        )


_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_DECAYS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_GRID = (_LRS, _DECAYS, (1e-3, 3e-3, 1e-2, 3e-2), (0.0, 0.3, 1.0, 3.0))
_VALLEY_LRS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
_VALLEY_DECAYS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
_VALLEY = (_VALLEY_LRS, _VALLEY_DECAYS, _VALLEY_LRS[::2], _VALLEY_DECAYS[::2])
_ALL = tuple(OPTIMIZERS.values())
_ADAMS = (OPTIMIZERS["adam"], ADAMW)

SHARED = MappingProxyType(
    {
        "plain": Shared(PLAIN, (*_ALL, CAUTIOUS), *_GRID),
        "multi-scale": Shared(MULTI_SCALE, (*_ALL, CAUTIOUS), *_GRID),
        "standardised": Shared(STANDARDISED, _ADAMS, *_GRID),
        "valley": Shared(replace(PLAIN, metric=LOSS), (*_ADAMS, INDEPENDENT), *_VALLEY),
    }
)


class Bench:
    """Where the claims' experiments are done.

    Args:
        effort: How much to spend.
        watcher: Told of training steps done.
        memory: Of training runs made before.
    """

    def __init__(self, effort: Effort, watcher: Watcher, memory: Memory = FORGETFUL) -> None:
        self.effort = effort
        self.watcher = watcher
        self.tick = watcher.advance
        self.memory = memory
        self._results: dict[str, ArmResult] = {}
        self._calls = 0

    def start(self, title: str, total: int) -> None:
        """Ignore the announcement of a part: the whole is announced elsewhere."""

    def advance(self, units: int) -> None:
        """Pass on the steps done."""
        self.watcher.advance(units)

    def skip(self, units: int) -> None:
        """Pass on the steps that need not be done."""
        self.watcher.skip(units)

    def compare(self, name: str) -> ArmResult:
        """Return a shared experiment, run at its first use."""
        if name not in self._results:
            experiment = SHARED[name].experiment(self.effort)
            self._results[name] = run(experiment, self, self.memory.within(name))[0]
        return self._results[name]

    def digits(self, arm: DigitsArm) -> DigitsArm:
        """Return an arm with the effort's number of steps."""
        return replace(arm, steps=self.effort.steps)

    def train(
        self, jobs: Sequence[tuple[DigitsArm, OptimizerSpec, Sequence[Cell]]], curve_points: int = 1
    ) -> list[Outcomes]:
        """Train cells under the reporting seeds, the jobs side by side."""
        seeds = self.effort.seeds
        # The same command asks for the same things in the same order.
        self._calls += 1
        memory = self.memory.within(f"train-{self._calls}")

        def train(
            tick: Tick, place: int, arm: DigitsArm, spec: OptimizerSpec, cells: Sequence[Cell]
        ) -> Outcomes:
            return memory.outcomes(
                str(place),
                lambda: arm.train(spec, cells, seeds, curve_points=curve_points, tick=tick),
                lambda: self.skip(len(cells) * len(seeds) * arm.steps),
            )

        return self.spread(train, [(place, *job) for place, job in enumerate(jobs)])

    def spread(self, work: Callable[..., T], jobs: Iterable[tuple[object, ...]]) -> list[T]:
        """Return the results of `work(tick, *job)` in order, done on all processors."""
        stop = Event()
        tick = stoppable(self.tick, stop)
        return on_all_processors(work, [(tick, *job) for job in jobs], stop)
