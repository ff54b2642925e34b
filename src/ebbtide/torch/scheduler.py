"""Drive the hyperparameters of an optimizer by schedules, from its own count of applied steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ebbtide.forecast import Curve, plot_curves
from ebbtide.notice import warn
from ebbtide.schedules import Schedule
from ebbtide.schedules._arithmetic import check_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Scheduler"]

# Records kept for the picture; when they are full, every other one goes.
_MOST_RECORDS = 4096
_PLANNED_POINTS = 500

# A group's own value, before any schedule, under the name torch's schedulers use for lr.
_INITIAL = {"lr": "initial_lr", "weight_decay": "initial_weight_decay"}
_BETAS = {"beta1": 0, "beta2": 1}


class _Record(NamedTuple):
    """What one step was taken with: for each driven key, a number for each group."""

    step: int
    values: dict[str, list[float]]


class Scheduler:
    """Let schedules drive `lr`, `weight_decay` and `betas` of an optimizer.

        lr_t           = initial_lr·lr(t)
        weight_decay_t = initial_weight_decay·weight_decay(t)
        betas_t        = (beta1(t), beta2(t))

    t is the number of steps that the optimizer has applied. The optimizer itself reports them, so
    nothing needs to be called in the training loop, and a step that is skipped (a loss scaler
    found an overflow, gradients were not finite) does not count, however it came to be skipped.
    Loops that call `step()` after every step may go on doing so; it changes nothing.

    To resume, pass the number of steps, or load the state, which is that number. Every group keeps
    its own values, before any schedule, under `initial_lr` and `initial_weight_decay`, and they
    travel with the optimizer's state. Groups may be added at any time.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        lr: Multiplier of every group's learning rate. None leaves it alone.
        weight_decay: Multiplier of every group's weight decay. None leaves it alone. Under the
            `decoupled`, `independent` and `corrected` policies the decay follows the learning
            rate already; this comes on top.
        betas: Values of β1 and β2, either of them None to leave it alone.
        step: Steps already applied.

    Raises:
        ValueError: No schedule is given, a group lacks a driven key, or a schedule returns
            what is no multiplier.

    Example:
        >>> import torch
        >>> from ebbtide.schedules import Cosine, Warmup
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.AdamW([weight], lr=1e-3)
        >>> scheduler = Scheduler(optimizer, lr=Warmup(2, Cosine(8)))
        >>> for _ in range(3):
        ...     print(optimizer.param_groups[0]["lr"])
        ...     weight.grad = torch.ones(3)
        ...     optimizer.step()
        0.0005
        0.001
        0.001
        >>> scheduler.state_dict()
        {'step': 3}
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        lr: Schedule | None = None,
        weight_decay: Schedule | None = None,
        betas: tuple[Schedule | None, Schedule | None] | None = None,
        step: int = 0,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
        _check_schedules(lr, weight_decay, betas)
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        if not self._driven():
            raise ValueError("pass a schedule: lr, weight_decay or betas")
        self._records: list[_Record] = []
        self._record_every = 1
        self._written: list[dict[str, float]] = []
        self._warned = False
        self.seek(step)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @property
    def applied_steps(self) -> int:
        """Steps the optimizer has applied; the schedules' argument for the next one."""
        return self._applied_steps

    def seek(self, step: int) -> None:
        """Go to a step and write what the schedules say there into every group.

        Args:
            step: Number of applied steps; a whole number of at least 0.
        """
        if not _is_count(step):
            raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
        self._applied_steps = int(step)
        self._apply()

    def step(self, *_ignored: Any) -> None:
        """Change nothing: the optimizer reports its own steps."""

    def extend(
        self,
        *,
        lr: Schedule | None = None,
        weight_decay: Schedule | None = None,
        betas: tuple[Schedule | None, Schedule | None] | None = None,
    ) -> None:
        """Replace schedules from the next step on; those not given stay.

        Args:
            lr: New multiplier of the learning rate, a function of the whole run's step.
            weight_decay: New multiplier of the weight decay.
            betas: New values of β1 and β2.
        """
        _check_schedules(lr, weight_decay, betas)
        self.lr = self.lr if lr is None else lr
        self.weight_decay = self.weight_decay if weight_decay is None else weight_decay
        self.betas = self.betas if betas is None else betas
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """Return the number of applied steps; there is no other state."""
        return {"step": self._applied_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to the step of a saved state.

        Raises:
            ValueError: It is the state of something else.
        """
        if not isinstance(state_dict, Mapping):
            what = type(state_dict).__name__
            raise ValueError(f"this is no Scheduler's state but a {what}; a file is read first")
        if "step" not in state_dict:
            raise ValueError(f"a Scheduler's state is its 'step'; this one has {[*state_dict]}")
        self.seek(state_dict["step"])

    def get_last_lr(self) -> list[float]:
        """Return every group's learning rate, as torch's schedulers do."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def plot(self, total_steps: int, path: str | Path | None = None) -> Figure:
        """Draw what was applied, as a solid line, and what will be, dashed.

        Args:
            total_steps: Step up to which the plan is drawn.
            path: File to write; its ending decides the format. None to return the figure only.
        """
        curves: list[Curve] = []
        for key in self._driven():
            for index, group in enumerate(self.optimizer.param_groups):
                label = str(group.get("name", f"group {index}"))
                curves += self._curves(key, index, label, total_steps)
        figure = plot_curves(curves, title="Applied and planned", now=self._applied_steps)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _curves(self, key: str, index: int, label: str, total_steps: int) -> list[Curve]:
        seen = [record for record in self._records if index < len(record.values.get(key, ()))]
        steps = [record.step for record in seen]
        planned = _evenly_spaced(self._applied_steps, total_steps)
        if seen and planned:
            # The plan begins where the record ends, so that the line has no gap.
            planned = [steps[-1], *planned]
        applied = Curve(key, label, steps, [record.values[key][index] for record in seen])
        group = self.optimizer.param_groups[index]
        future = [self._value(key, group, step) for step in planned]
        return [applied, Curve(key, label, planned, future, "planned")]

    def _driven(self) -> dict[str, Schedule]:
        beta1, beta2 = self.betas or (None, None)
        schedules = {
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "beta1": beta1,
            "beta2": beta2,
        }
        return {key: schedule for key, schedule in schedules.items() if schedule is not None}

    def _value(self, key: str, group: dict[str, Any], step: int) -> float:
        value = self._driven()[key](step)
        if not 0 <= value < math.inf or (key in _BETAS and value >= 1):
            raise ValueError(f"the schedule of {key} returned {value} at step {step}")
        return float(group[_INITIAL[key]]) * value if key in _INITIAL else value

    def _apply(self) -> None:
        self._written = []
        for index, group in enumerate(self.optimizer.param_groups):
            written = {}
            for key in self._driven():
                if key in _INITIAL:
                    _remember_initial(group, key, index)
                written[key] = self._value(key, group, self._applied_steps)
                _write(group, key, written[key], index)
            self._written.append(written)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_arguments: Any) -> None:
        if len(self._written) != len(optimizer.param_groups):
            self._apply()
        for index, (group, written) in enumerate(
            zip(optimizer.param_groups, self._written, strict=True)
        ):
            for key in written:
                if key in _INITIAL:
                    self._look_for_others(f"param group {index}", key, group.get(key), written[key])

    def _look_for_others(self, where: str, key: str, found: Any, written: float) -> None:
        # A tensor may be on a device that a step must not wait for; what is no number, the
        # optimizer refuses itself; 0 is what the creation of state for a checkpoint sets.
        if self._warned or not isinstance(found, Real) or found in (written, 0):
            return
        self._warned = True
        warn(
            f"{where} takes this step with {key}={float(found):g}, not the {written:g} of the "
            "Scheduler: something else sets it too, such as another scheduler",
        )

    def _after_step(self, optimizer: torch.optim.Optimizer, *_arguments: Any) -> None:
        if _was_skipped(optimizer) or self._only_creates_state(optimizer):
            return
        self._record(optimizer)
        self._applied_steps += 1
        self._apply()

    def _only_creates_state(self, optimizer: torch.optim.Optimizer) -> bool:
        # torch.distributed.checkpoint takes a step at lr 0 to have the state created.
        groups = list(zip(optimizer.param_groups, self._written, strict=True))
        scheduled = self.lr is not None and all(written["lr"] == 0 for _, written in groups)
        return not scheduled and all(
            _read(group, "lr", written.get("lr", math.nan)) == 0 for group, written in groups
        )

    def _record(self, optimizer: torch.optim.Optimizer) -> None:
        if self._applied_steps % self._record_every:
            return
        groups = list(zip(optimizer.param_groups, self._written, strict=True))
        values = {
            key: [_read(group, key, written[key]) for group, written in groups]
            for key in self._driven()
        }
        self._records.append(_Record(self._applied_steps, values))
        if len(self._records) >= _MOST_RECORDS:
            self._records = self._records[::2]
            self._record_every *= 2


def _check_schedules(lr: Any, weight_decay: Any, betas: Any) -> None:
    if betas is not None and not (isinstance(betas, Sequence) and len(betas) == 2):
        raise TypeError(f"betas must be two schedules, of β1 and of β2, got {betas!r}")
    beta1, beta2 = betas or (None, None)
    given = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2}
    for name, schedule in given.items():
        if schedule is not None:
            check_schedule(name, schedule)


def _is_count(step: Any) -> bool:
    try:
        return not isinstance(step, bool) and bool(step == int(step) >= 0)
    except (TypeError, ValueError, OverflowError):
        return False


def _evenly_spaced(first: int, end: int) -> list[int]:
    count = min(end - first, _PLANNED_POINTS)
    if count <= 1:
        return list(range(first, end))
    return sorted({first + round(i * (end - 1 - first) / (count - 1)) for i in range(count)})


def _remember_initial(group: dict[str, Any], key: str, index: int) -> None:
    if key not in group:
        raise ValueError(f"param group {index} has no {key!r} to drive")
    if _INITIAL[key] not in group:
        # A copy: the tensor itself will be written to.
        group[_INITIAL[key]] = float(group[key])


def _write(group: dict[str, Any], key: str, value: float, index: int) -> None:
    if key in _BETAS:
        if "betas" not in group:
            raise ValueError(f"param group {index} has no 'betas' to drive")
        betas: Sequence[Any] = group["betas"]
        position = _BETAS[key]
        if isinstance(betas[position], torch.Tensor):
            betas[position].fill_(value)
        else:
            group["betas"] = (value, betas[1]) if position == 0 else (betas[0], value)
    elif isinstance(group[key], torch.Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def _read(group: dict[str, Any], key: str, written: float) -> float:
    value = group["betas"][_BETAS[key]] if key in _BETAS else group[key]
    if isinstance(value, torch.Tensor):
        # Reading it from an accelerator would make the host wait.
        return float(value) if value.device.type == "cpu" else written
    return float(value)


def _was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    if getattr(optimizer, "_skipped", None) is False:  # known without waiting for a GPU
        return False
    skipped = getattr(optimizer, "last_step_skipped", None)
    if skipped is not None:
        return bool(skipped)
    # Left by a loss scaler for the time of a step that does its own unscaling.
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf != 0)
