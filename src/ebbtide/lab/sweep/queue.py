"""The cells of a sweep as the trials of an Optuna study.

A cell waits (WAITING), is run by somebody (RUNNING), and ends (COMPLETE, PRUNED or FAIL). Its
state is changed last, so that whatever was written before is complete when it says so. A cell
whose worker died goes back to WAITING and stays the same trial. Only a failure that is tried
again gets another, and then the last one counts. Every change is made while holding the queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from ebbtide.lab.sweep.definition import Definition, Slot
from ebbtide.lab.sweep.locks import Locks, new_holder
from ebbtide.lab.sweep.outcome import FAULTS, Outcome, Record

__all__ = ["Claim", "Counts", "Key", "Queue", "key"]

Key = tuple[str, float, float, int]

_SLOT, _SETTINGS, _OWNER = "slot", "settings", "owner"
_RECORD, _KILLED = "record", "killed"


@dataclass(frozen=True)
class Claim:
    """A cell that this process shall run.

    Attributes:
        slot: Its place in the sweep.
        settings: optimizer, lr, weight_decay and seed.
        trial: Optuna's trial.
    """

    slot: Slot
    settings: Mapping[str, Any]
    trial: Any


@dataclass(frozen=True)
class Counts:
    """How many cells are in which state.

    Attributes:
        total: All of them.
        running: Being run by somebody.
        waiting: In the queue, or not yet in it.
        outcomes: Those that ended, by what became of them.
    """

    total: int
    running: int
    waiting: int
    outcomes: Mapping[str, int]

    @property
    def done(self) -> int:
        """Cells that ended."""
        return sum(self.outcomes.values())

    @property
    def faults(self) -> int:
        """Cells that failed or ran out of time."""
        return sum(self.outcomes.get(outcome, 0) for outcome in FAULTS)


class Queue:
    """The cells of one study.

    Args:
        study: Optuna's study.
        storage: Optuna's storage that it is in.
        definition: What it is a sweep of.
        locks: The locks of the study.
    """

    def __init__(self, study: Any, storage: Any, definition: Definition, locks: Locks) -> None:
        from optuna.trial import TrialState

        self.definition = definition
        self.holder = new_holder()
        self._study, self._storage, self._locks = study, storage, locks
        self._states = TrialState
        self._id = storage.get_study_id_from_name(study.study_name)
        self._read: dict[int, Record] = {}
        study.sampler = _sampler(definition)

    def hold(self) -> None:
        """Show others that this process is alive, before its first claim."""
        self._locks.hold(self.holder)

    def fill(self, known: Mapping[Key, Record] = MappingProxyType({})) -> None:
        """Queue every cell that the study lacks; a killed command may have queued a part.

        Args:
            known: Records of cells that were run elsewhere, taken over where they fit.
        """
        with self._locks.queue():
            present = self._latest()
            for slot in self.definition.slots:
                if slot.index not in present:
                    self._enqueue(slot, present, known)

    def recover(self) -> int:
        """Give the cells of dead workers back to the queue; return how many."""
        with self._locks.queue():
            lost = [trial for trial in self._trials(self._states.RUNNING) if self._is_lost(trial)]
            for trial in lost:
                self._give_back(trial._trial_id)
            return len(lost)

    def retry_failed(self) -> int:
        """Queue the cells that failed or ran out of time once more; return how many."""
        with self._locks.queue():
            failed = [t for t in self._latest().values() if t.state == self._states.FAIL]
            for trial in failed:
                # A sampled point is tried again where it was.
                attrs = {key: trial.user_attrs[key] for key in (_SLOT, _SETTINGS)}
                self._study.enqueue_trial(dict(trial.params), user_attrs=attrs)
            return len(failed)

    def claim(self) -> Claim | None:
        """Take the next cell, or return None where none waits."""
        with self._locks.queue():
            if not self._trials(self._states.WAITING):
                return None
            trial = self._study.ask()
            trial.set_user_attr(_OWNER, self.holder)
            slot = self.definition.slots[trial.user_attrs[_SLOT]]
            axes = _axes(self.definition, slot.optimizer)
            place = [trial.suggest_float(*ends, log=log) for *ends, log in axes]
            settings = _settings(self.definition, slot, *place)
            trial.set_user_attr(_SETTINGS, settings)
            if slot.place is None and len(self.definition.seeds) > 1:
                self.fill()
            return Claim(slot, settings, trial)

    def finish(self, claim: Claim, record: Record) -> Record | None:
        """Record what became of a cell, and return that; None where others have a say by now.

        A cell that is judged by another number than the cells before it has failed.
        """
        with self._locks.queue():
            if not self._is_mine(claim):
                return None
            other = self._other_metric(record)
            if other is not None:
                error = f"the function returned {record.metric!r} here and {other!r} in another "
                error += "cell: say which counts with --metric"
                record = replace(record, outcome=Outcome.FAILED, value=None, error=error)
            claim.trial.set_user_attr(_RECORD, record.to_dict())
            self._tell(claim.trial, record)
            return record

    def release(self, claim: Claim) -> None:
        """Give a cell back to the queue."""
        with self._locks.queue():
            if self._is_mine(claim):
                self._give_back(claim.trial._trial_id)

    def count_kill(self, claim: Claim) -> int:
        """Count that a cell's process was killed from outside; return how often it was by now."""
        kills = int(claim.trial.user_attrs.get(_KILLED, 0)) + 1
        claim.trial.set_user_attr(_KILLED, kills)
        return kills

    def counts(self) -> Counts:
        """Return how far the sweep has come."""
        trials = self._latest().values()
        outcomes: dict[str, int] = {}
        for record in filter(None, map(self._record, trials)):
            outcomes[record.outcome] = outcomes.get(record.outcome, 0) + 1
        running = sum(trial.state == self._states.RUNNING for trial in trials)
        total = len(self.definition.slots)
        return Counts(total, running, total - running - sum(outcomes.values()), outcomes)

    def cells(self) -> Iterator[tuple[Slot, Mapping[str, Any], Record | None]]:
        """Yield every cell of the sweep: its slot, its settings and its record, if it ended.

        The settings are empty where the sampler has not chosen them yet.
        """
        latest = self._latest()
        for slot in self.definition.slots:
            trial = latest.get(slot.index)
            if trial is not None and _SETTINGS in trial.user_attrs:
                yield slot, trial.user_attrs[_SETTINGS], self._record(trial)
            else:
                place = () if slot.place is None else slot.place
                yield slot, _settings(self.definition, slot, *place) if place else {}, None

    def _enqueue(self, slot: Slot, present: Mapping[int, Any], known: Mapping[Key, Record]) -> None:
        attrs: dict[str, Any] = {_SLOT: slot.index}
        params: dict[str, float] = {}
        if slot.place is not None:
            axes = _axes(self.definition, slot.optimizer)
            params = {name: value for (name, *_), value in zip(axes, slot.place, strict=True)}
            attrs[_SETTINGS] = _settings(self.definition, slot, *slot.place)
            record = known.get(key(attrs[_SETTINGS]))
            if record is not None and self._other_metric(record) is None:
                self._take_over(slot, params, attrs, record)
                return
        elif slot.seed != self.definition.seeds[0]:
            # A repetition of a point that is to be chosen under the first seed.
            first = slot.index % (len(self.definition.slots) // len(self.definition.seeds))
            params = dict(present[first].params) if first in present else {}
            if not params:
                return
        self._study.enqueue_trial(params, user_attrs=attrs)

    def _take_over(
        self, slot: Slot, params: Mapping[str, float], attrs: Mapping[str, Any], record: Record
    ) -> None:
        from optuna.distributions import FloatDistribution
        from optuna.trial import create_trial

        axes = _axes(self.definition, slot.optimizer)
        trial = create_trial(
            value=record.value if record.outcome == Outcome.FINISHED else self._worst,
            params=dict(params),
            distributions={
                name: FloatDistribution(low, high, log=log) for name, low, high, log in axes
            },
            user_attrs={**attrs, _RECORD: record.to_dict()},
        )
        self._study.add_trial(trial)

    def _other_metric(self, record: Record) -> str | None:
        """Return what the cells that came to a number are judged by, where this one is not."""
        if not record.is_number:
            return None
        records = filter(None, map(self._record, self._latest().values()))
        metric = next((other.metric for other in records if other.is_number), record.metric)
        return None if metric == record.metric else metric

    @property
    def _worst(self) -> float:
        return -math.inf if self.definition.maximize else math.inf

    def _trials(self, *states: Any) -> list[Any]:
        chosen = states or None
        return list(self._storage.get_all_trials(self._id, deepcopy=False, states=chosen))

    def _latest(self) -> dict[int, Any]:
        return {trial.user_attrs[_SLOT]: trial for trial in self._trials()}

    def _record(self, trial: Any) -> Record | None:
        if not trial.state.is_finished():
            return None
        if trial.number not in self._read:
            content = trial.user_attrs.get(_RECORD)
            self._read[trial.number] = (
                Record(Outcome.FAILED, error="another program ended it")
                if content is None
                else Record.from_dict(content)
            )
        return self._read[trial.number]

    def _give_back(self, trial_id: int) -> None:
        # Nobody's first: who takes it next may die before it has put its own name to it.
        self._storage.set_trial_user_attr(trial_id, _OWNER, None)
        self._storage.set_trial_state_values(trial_id, self._states.WAITING)

    def _is_lost(self, trial: Any) -> bool:
        owner = trial.user_attrs.get(_OWNER)
        return owner != self.holder and (owner is None or not self._locks.is_held(owner))

    def _is_mine(self, claim: Claim) -> bool:
        trial = self._storage.get_trial(claim.trial._trial_id)
        if trial.state != self._states.RUNNING:
            return False
        return bool(trial.user_attrs.get(_OWNER) == self.holder)

    def _tell(self, trial: Any, record: Record) -> None:
        """End a trial in the state that Optuna's samplers understand best."""
        if record.outcome in FAULTS:
            self._study.tell(trial, state=self._states.FAIL)
        elif record.outcome == Outcome.PRUNED:
            step, value = record.curve[-1]
            trial.report(value, step)
            self._study.tell(trial, state=self._states.PRUNED)
        elif record.outcome == Outcome.DIVERGED:
            self._study.tell(trial, self._worst)
        else:
            self._study.tell(trial, record.value)


def key(settings: Mapping[str, Any]) -> Key:
    """Return what distinguishes a cell from all others of the same function."""
    return (
        settings["optimizer"], settings["lr"], settings["weight_decay"], settings["seed"]
    )  # fmt: skip


def _axes(definition: Definition, optimizer: str) -> list[tuple[str, float, float, bool]]:
    """Return Optuna's name, range and scale of an optimizer's two axes."""
    axes = {"lr": definition.lrs[optimizer], definition.axis: definition.seconds[optimizer]}
    return [
        (f"{optimizer}.{name}", min(points), max(points), min(points) > 0)
        for name, points in axes.items()
    ]


def _settings(definition: Definition, slot: Slot, lr: float, second: float) -> dict[str, Any]:
    return {
        "optimizer": slot.optimizer,
        "lr": lr,
        "weight_decay": definition.weight_decay(lr, second),
        "seed": slot.seed,
        definition.axis: second,
    }


def _sampler(definition: Definition) -> Any:
    import warnings

    from optuna.exceptions import ExperimentalWarning
    from optuna.samplers import RandomSampler, TPESampler

    if definition.sampler != "tpe":
        return RandomSampler(seed=0)  # never asked, since every cell is queued with its settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        # Optimizers share no axis, and each is searched by what is known of it alone.
        return TPESampler(multivariate=True, group=True, constant_liar=True, seed=None)
