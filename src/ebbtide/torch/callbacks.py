"""The monitor inside other people's training loops: Hugging Face's Trainer and Lightning.

Neither of the two is imported before a callback is made.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from ebbtide.torch.monitor import DecayMonitor, Sink, decay_in_force

__all__ = ["huggingface_callback", "lightning_callback"]

_LOGGER = logging.getLogger("ebbtide")


def huggingface_callback(
    *,
    every: int = 100,
    per_param: bool = False,
    samples: int = 16_384,
    log: Sink | None = None,
    say: Callable[[str], Any] | None = None,
) -> Any:
    """Return a `transformers.TrainerCallback` that monitors the decay.

    When training begins it says which weight decay is in force, group by group, since Trainer
    puts `TrainingArguments.weight_decay` into the groups whatever else was given. Whenever
    Trainer logs, the last sample of a `DecayMonitor` is added to what it logs and to
    `state.log_history`. Callbacks that come before this one have been called by then, those that
    `report_to` brings among them: put it first for those to see the values,
    `trainer.callback_handler.callbacks.insert(0, callback)`, or pass `log`.

    Args:
        every: As for `DecayMonitor`.
        per_param: As for `DecayMonitor`.
        samples: As for `DecayMonitor`.
        log: Called with every sample and Trainer's step, such as `wandb.log`.
        say: Called with every line about the weight decay in force; by default the logger
            `ebbtide` warns with it, so that it is seen.

    Returns:
        The callback; its `monitor` is the `DecayMonitor` while training lasts and after.

    Raises:
        ImportError: transformers is not installed.
    """
    return _huggingface_class()(_options(every, per_param, samples), log, say or _LOGGER.warning)


def lightning_callback(
    *,
    every: int = 100,
    per_param: bool = False,
    samples: int = 16_384,
    say: Callable[[str], Any] | None = None,
) -> Any:
    """Return a `Callback` for Lightning's Trainer that monitors the decay.

    When training begins it says which weight decay is in force, group by group. Every sample
    goes to all loggers of the Trainer, under its `global_step`; with several optimizers the names
    begin with `optimizer0/` and so on.

    Args:
        every: As for `DecayMonitor`.
        per_param: As for `DecayMonitor`.
        samples: As for `DecayMonitor`.
        say: Called with every line about the weight decay in force; by default the logger
            `ebbtide` warns with it, so that it is seen.

    Returns:
        The callback; its `monitors` are the `DecayMonitor`s, one for each optimizer.

    Raises:
        ImportError: Neither lightning nor pytorch_lightning is installed.
    """
    return _lightning_class()(_options(every, per_param, samples), say or _LOGGER.warning)


def _options(every: int, per_param: bool, samples: int) -> dict[str, Any]:
    return {"every": every, "per_param": per_param, "samples": samples}


@cache
def _huggingface_class() -> Any:
    base = importlib.import_module("transformers").TrainerCallback
    return type("DecayCallback", (_HuggingFace, base), {"__doc__": _HuggingFace.__doc__})


@cache
def _lightning_class() -> Any:
    return type(
        "DecayCallback", (_Lightning, _lightning().Callback), {"__doc__": _Lightning.__doc__}
    )


class _HuggingFace:
    """Monitors the decay of a Trainer's optimizer; see `huggingface_callback`."""

    def __init__(
        self, options: dict[str, Any], log: Sink | None, say: Callable[[str], Any]
    ) -> None:
        self.monitor: DecayMonitor | None = None
        self._options, self._log, self._say = options, log, say
        self._fresh = False
        self._step = 0

    def on_train_begin(
        self, args: Any, state: Any, _control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        """Attach the monitor, and say what decays."""
        say = self._say if state.is_world_process_zero else _nothing
        self.monitor = _attached(optimizer, self._options, say)
        if self.monitor is None:
            return
        say(f"TrainingArguments.weight_decay is {args.weight_decay:g}")
        self.monitor.log_to(self._take)
        self.monitor.steps = self._step = state.global_step

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Keep Trainer's count of the step that is about to be taken."""
        self._step = state.global_step + 1

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Add what was seen since the last time."""
        if self._fresh and self.monitor is not None and logs is not None:
            self._fresh = False
            logs.update(self.monitor.last)
            if state.log_history:
                state.log_history[-1].update(self.monitor.last)

    def on_train_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        """Detach the monitor."""
        if self.monitor is not None:
            self.monitor.remove()

    def _take(self, values: dict[str, float], _: int) -> None:
        self._fresh = True
        if self._log is not None:
            self._log(values, self._step)


class _Lightning:
    """Monitors the decay of a Trainer's optimizers; see `lightning_callback`."""

    def __init__(self, options: dict[str, Any], say: Callable[[str], Any]) -> None:
        self.monitors: list[DecayMonitor] = []
        self._options, self._say = options, say

    def on_train_start(self, trainer: Any, _module: Any) -> None:
        """Attach a monitor to each optimizer, and say what decays."""
        several = len(trainer.optimizers) > 1
        self.monitors = []
        for index, optimizer in enumerate(trainer.optimizers):
            prefix = f"optimizer{index}/" if several else ""
            say = _prefixed(self._say, prefix) if trainer.is_global_zero else _nothing
            monitor = _attached(optimizer, self._options, say)
            if monitor is not None:
                self.monitors.append(monitor.log_to(_to_loggers(trainer, prefix)))

    def on_train_end(self, _trainer: Any, _module: Any) -> None:
        """Detach the monitors."""
        for monitor in self.monitors:
            monitor.remove()


def _attached(
    optimizer: Any, options: dict[str, Any], say: Callable[[str], Any]
) -> DecayMonitor | None:
    """Return a monitor of the optimizer, having said what decays; None if it is not known."""
    try:
        monitor = DecayMonitor(optimizer, **options)
    except TypeError as error:  # no reason to end a training run
        say(f"{error}; nothing is monitored")
        return None
    for line in decay_in_force(optimizer):
        say(line)
    return monitor


def _nothing(_: str) -> None:
    """Stand in for `say` on all processes but the first."""


def _prefixed(say: Callable[[str], Any], prefix: str) -> Callable[[str], Any]:
    return lambda line: say(prefix + line)


def _to_loggers(trainer: Any, prefix: str) -> Sink:
    def log(values: dict[str, float], _: int) -> None:
        named = {prefix + name: value for name, value in values.items()}
        for logger in trainer.loggers:
            logger.log_metrics(named, step=trainer.global_step)

    return log


def _lightning() -> Any:
    """Return whichever of its two packages there is; they do not know each other's callbacks."""
    try:
        return importlib.import_module("lightning.pytorch")
    except ImportError:
        return importlib.import_module("pytorch_lightning")
