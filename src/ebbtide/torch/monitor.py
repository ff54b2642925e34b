"""What weight decay does while a model trains, measured on some of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from ebbtide.convert import DEAD_BELOW
from ebbtide.forecast import DecaySettings
from ebbtide.hyperparameters import numbers
from ebbtide.plan import clip_scale
from ebbtide.timescale import equilibrium_rms, timescale_steps
from ebbtide.torch.measure import Numbers, Snapshot, Sums, measure
from ebbtide.weight_decay import decay_share

__all__ = ["DecayMonitor", "ScalarWriter", "Sink", "decay_in_force"]

Sink = Callable[[dict[str, float], int], Any]
"""Takes the values of a sample by name, and the count of steps; `wandb.log` is one."""


class ScalarWriter(Protocol):
    """Whatever takes one number at a time, as TensorBoard's `SummaryWriter` does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Record one number."""


class DecayMonitor:
    """Watches an optimizer and measures, now and then, what its weight decay does.

    On the first step and every `every` steps after it, a sample of the elements of each parameter
    is compared before and after the step. Other steps cost two calls that do nothing; without a
    monitor nothing is done at all. Names of the values begin with `decay/` and the group: its
    `name`, or `group0` for the first. What does not apply is left out, so every value is finite.

        lr, weight_decay           as this step used them
        share                      of θ that the step removes under the policy: lr·λ for AdamW
        timescale_steps            1/share, how many steps back the weights remember
        expected_share             share, over the elements that a cautious decay reaches
        realised_share             what the step did remove, measured
        realised_error             standard error of that
        realised_to_expected       over all samples so far, 1 where decay does what it says
        realised_to_expected_error standard error of that
        update_rms, param_rms      root mean squares of the update without decay, and of θ
        update_to_weight           their ratio
        lost_to_rounding           share of the intended change that did not happen; near 0, also
                                   below, where rounding is stochastic
        unmoved                    share of the elements that should have changed and did not
        equilibrium_rms            lr/√(2·share), at which Adam's noise and the decay balance
        rms_to_equilibrium         param_rms as a multiple of it

    Of our optimizers also `decay/skipped_steps`, and with `clip_grad_norm` `decay/grad_norm`
    and `decay/clip_rate`, the share of steps that were clipped since the sample before.

    Under L2 the decay is part of the gradient: `share` is what it comes to (for Adam with the
    median √v̂), and nothing is measured against it. Distributed parameters are measured on this
    process's shards. The measure itself is `ebbtide.torch.measure.measure`.

    Args:
        optimizer: One of `ebbtide.torch`, or `torch.optim`'s AdamW, Adam or SGD; also what
            Accelerate or Lightning have wrapped around one.
        every: Steps from one sample to the next, at least 1.
        per_param: Whether to report every parameter too, as `decay/<group>/<parameter>/...`.
        samples: Most elements of a parameter that are looked at, at least 1. More make the
            error of `realised_share` smaller, which matters in 16 bits.

    Attributes:
        last: Values of the last sample by name, plain floats; empty before the first.
        steps: Steps seen. May be set, to go on with the count of an earlier run.

    Raises:
        TypeError: The optimizer has another rule.
        ValueError: `every` or `samples` is below 1.

    Example:
        >>> from ebbtide.torch import AdamW
        >>> weight = torch.nn.Parameter(torch.randn(64, 64))
        >>> optimizer = AdamW([weight], lr=1e-3, weight_decay=0.1)
        >>> monitor = DecayMonitor(optimizer, every=10)
        >>> weight.grad = torch.randn(64, 64)
        >>> optimizer.step()
        >>> round(monitor.last["decay/group0/timescale_steps"])
        10000
        >>> round(monitor.last["decay/group0/realised_to_expected"], 2)
        1.0
        >>> monitor.remove()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 100,
        per_param: bool = False,
        samples: int = 16_384,
    ) -> None:
        for name, value in (("every", every), ("samples", samples)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self._optimizer = _unwrapped(optimizer)
        _check_rule(self._optimizer)
        self.every = every
        self.per_param = per_param
        self.samples = samples
        self.last: dict[str, float] = {}
        self.steps = 0
        self._sinks: list[Sink] = []
        self._due = True
        self._before: list[list[Snapshot]] | None = None
        # Over all samples, by the name of a group or parameter.
        self._totals: dict[str, tuple[float, float, float]] = {}
        self._clipped: Any = 0
        self._steps_at_sample = 0
        self._generator = np.random.default_rng(0)
        self._handles: list[RemovableHandle] = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Stop watching; `last` stays."""
        for handle in self._handles:
            handle.remove()

    def log_to(self, sink: Sink) -> DecayMonitor:
        """Have every sample passed on, as `sink(values, steps)`; returns the monitor itself.

        Args:
            sink: Such as `wandb.log`; it gets a dictionary of its own.
        """
        self._sinks.append(sink)
        return self

    def log_to_tensorboard(self, writer: ScalarWriter) -> DecayMonitor:
        """Have every sample written to TensorBoard; returns the monitor itself.

        Args:
            writer: A `SummaryWriter`, or anything else with its `add_scalar`.
        """

        def write(values: dict[str, float], steps: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, steps)

        return self.log_to(write)

    def _before_step(self, *_: Any) -> None:
        self._before = None
        if self.steps % self.every == 0:
            self._due = True
        self.steps += 1
        if self._due and not _capturing():
            self._before = [
                [Snapshot.take(param, self.samples, self._generator) for param in group["params"]]
                for group in self._optimizer.param_groups
            ]

    def _after_step(self, *_: Any) -> None:
        optimizer = self._optimizer
        unread: Any = getattr(optimizer, "_unread", None)
        skipped, norm = (False, None) if unread is None else unread()
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
            skipped = skipped | (found_inf != 0)  # torch's fused steps tell nobody
        limit = getattr(optimizer, "clip_grad_norm", None)
        if limit is not None and norm is not None:
            # Adds on the device where the norm is there: only a sample waits for it.
            self._clipped = self._clipped + (norm > limit) * (skipped ^ True)
        if self._before is None or bool(skipped):
            return  # a skipped step is no sample: the next one is
        before, self._before, self._due = self._before, None, False
        self.last = dict(self._values(before))
        self._clipped, self._steps_at_sample = 0, self.steps
        for sink in self._sinks:
            sink(dict(self.last), self.steps)

    def _values(self, before: list[list[Snapshot]]) -> Iterator[tuple[str, float]]:
        optimizer = self._optimizer
        if hasattr(optimizer, "skipped_steps"):
            yield "decay/skipped_steps", float(optimizer.skipped_steps)
        norm = getattr(optimizer, "last_grad_norm", None)
        if norm is not None and math.isfinite(norm):
            yield "decay/grad_norm", float(norm)
            if getattr(optimizer, "clip_grad_norm", None) is not None:
                steps = max(self.steps - self._steps_at_sample, 1)
                yield "decay/clip_rate", float(self._clipped) / steps
        labels = _labels(optimizer)
        for label, group, snapshots in zip(labels, optimizer.param_groups, before, strict=True):
            yield from self._group_values(f"decay/{label}", group, snapshots)

    def _group_values(
        self, prefix: str, group: dict[str, Any], snapshots: list[Snapshot]
    ) -> Iterator[tuple[str, float]]:
        group = _with_share(group)
        scale = _gradient_factor(self._optimizer)
        found: list[tuple[str, Sums, Numbers | None]] = []
        for name, snapshot in zip(_names(group), snapshots, strict=True):
            measured = None
            if snapshot.was_stepped:
                state = self._optimizer.state.get(snapshot.param, {})
                measured = measure(snapshot, state, group, scale)
            if measured is not None:
                found.append((name, *measured))
        scales = [each for *_, each in found if each is not None]
        total = Sums.total(sums for _, sums, _ in found) if found else None
        yield from self._describe(prefix, group, total, scales, whole=True)
        if self.per_param:
            for name, sums, each in found:
                own = [] if each is None else [each]
                yield from self._describe(f"{prefix}/{name}", group, sums, own, whole=False)

    def _describe(
        self,
        prefix: str,
        group: Mapping[str, Any],
        sums: Sums | None,
        scales: list[Numbers],
        *,
        whole: bool,
    ) -> Iterator[tuple[str, float]]:
        """Put into words what was seen of a group or of a parameter."""
        share = _effective_share(group, scales)
        if whole:
            yield f"{prefix}/lr", float(group["lr"])
            yield f"{prefix}/weight_decay", float(group["weight_decay"])
        if share is not None and (whole or group["decay_policy"] == "l2"):
            yield f"{prefix}/share", share
            if share > 0:
                yield f"{prefix}/timescale_steps", timescale_steps(share)
        if sums is None:
            return
        if group["share"] > 0 and sums.decayed > 0:
            yield from self._decay(prefix, group["share"], sums)
        yield from _change(prefix, sums)
        if "betas" in group and share and not group.get("cautious"):
            equilibrium = equilibrium_rms(float(group["lr"]), share)
            yield f"{prefix}/equilibrium_rms", equilibrium
            yield (
                f"{prefix}/rms_to_equilibrium",
                math.sqrt(sums.theta / sums.elements) / equilibrium,
            )

    def _decay(self, prefix: str, share: float, sums: Sums) -> Iterator[tuple[str, float]]:
        seen = (sums.realised, share * sums.decayed, sums.variance)
        yield f"{prefix}/expected_share", seen[1] / sums.theta
        yield f"{prefix}/realised_share", seen[0] / sums.theta
        yield f"{prefix}/realised_error", math.sqrt(seen[2]) / sums.theta
        realised, expected, variance = (
            old + new
            for old, new in zip(self._totals.get(prefix, (0.0, 0.0, 0.0)), seen, strict=True)
        )
        self._totals[prefix] = realised, expected, variance
        yield f"{prefix}/realised_to_expected", realised / expected
        yield f"{prefix}/realised_to_expected_error", math.sqrt(variance) / expected


def decay_in_force(optimizer: torch.optim.Optimizer) -> list[str]:
    r"""Say in words what decays in every group, and whether anything does.

    Trainers make the groups themselves, so the weight decay in force may not be the one that the
    user gave: HF Trainer puts `TrainingArguments.weight_decay` into its groups, whatever
    `optimizer_cls_and_kwargs` holds.

    Args:
        optimizer: Ours or torch's.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = torch.optim.AdamW([{"params": [weight], "weight_decay": 0.0}], lr=1e-3)
        >>> print(*decay_in_force(optimizer), sep="\n")
        group0 (1 tensors, 3 numbers): lr 0.001, no weight decay
        no group decays anything
        weight_decay=0.01 was the optimizer's argument or default; no group uses it
    """
    optimizer = _unwrapped(optimizer)
    lines, used = [], set()
    for label, raw in zip(_labels(optimizer), optimizer.param_groups, strict=True):
        group = _with_share(raw)
        used.add(float(group["weight_decay"]))
        count = sum(param.numel() for param in group["params"])
        lines.append(
            f"{label} ({len(group['params'])} tensors, {count:,} numbers): "
            f"lr {float(group['lr']):g}, {_decay_words(group)}"
        )
    if not any(used):
        lines.append("no group decays anything")
    default = optimizer.defaults.get("weight_decay")
    if default is not None and float(default) not in used:
        lines.append(
            f"weight_decay={float(default):g} was the optimizer's argument or default; no group "
            "uses it"
        )
    return lines


def _decay_words(group: Mapping[str, Any]) -> str:
    weight_decay, policy = float(group["weight_decay"]), group["decay_policy"]
    if weight_decay == 0:
        return "no weight decay"
    if policy == "l2":
        return f"weight_decay {weight_decay:g} as L2, in the gradient"
    words = f"weight_decay {weight_decay:g} ({policy})"
    if group["share"] == 0:
        return f"{words}, nothing removed while lr is 0"
    return (
        f"{words} removes {group['share']:g} of a parameter in a step, timescale "
        f"{timescale_steps(group['share']):,.0f} steps"
    )


def _change(prefix: str, sums: Sums) -> Iterator[tuple[str, float]]:
    param_rms = math.sqrt(sums.theta / sums.elements)
    update_rms = math.sqrt(sums.update / sums.elements)
    yield f"{prefix}/update_rms", update_rms
    yield f"{prefix}/param_rms", param_rms
    if param_rms > 0:
        yield f"{prefix}/update_to_weight", update_rms / param_rms
    if sums.intended > 0:
        yield f"{prefix}/lost_to_rounding", 1.0 - sums.carried_out / sums.intended
        yield f"{prefix}/unmoved", sums.unmoved / sums.meant_to_move


def _with_share(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with numbers for tensors, its policy, and the share its decay removes."""
    settings = DecaySettings.from_group(numbers(group))
    lr, weight_decay = (float(numbers(group)[key]) for key in ("lr", "weight_decay"))
    base_lr = settings.lr if settings.base_lr is None else settings.base_lr
    policy = settings.decay_policy
    share = decay_share(policy, lr=lr, base_lr=base_lr, weight_decay=weight_decay)
    return {**numbers(group), "decay_policy": policy, "share": share}


def _effective_share(group: Mapping[str, Any], scales: list[Numbers]) -> float | None:
    """Return the share, for L2 what it comes to; None where Adam's √v̂ does not tell."""
    if group["decay_policy"] != "l2":
        return float(group["share"])
    live = np.concatenate(scales) if scales else np.empty(0)
    live = live[live >= DEAD_BELOW]
    scale = float(np.median(live)) if len(live) else None
    settings = DecaySettings.from_group(group, gradient_scale=scale)
    return settings.share(float(group["lr"]), float(group["weight_decay"]))


def _gradient_factor(optimizer: Any) -> float:
    """Return what the step has multiplied every gradient by: unscaling and clipping."""
    scale = getattr(optimizer, "grad_scale", None)
    factor = 1.0 if scale is None else 1.0 / float(scale)
    norm = getattr(optimizer, "last_grad_norm", None)
    if norm is None:
        return factor
    return factor * clip_scale(float(norm) ** 2, optimizer.clip_grad_norm)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside what trainers have wrapped around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer  # type: ignore[no-any-return]


def _check_rule(optimizer: torch.optim.Optimizer) -> None:
    known = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
    if not (hasattr(optimizer, "_rule") or isinstance(optimizer, known)):
        raise TypeError(
            f"DecayMonitor knows AdamW, Adam and SGD of ebbtide.torch and of torch.optim, not "
            f"{type(optimizer).__name__}"
        )


def _labels(optimizer: torch.optim.Optimizer) -> list[str]:
    labels: list[str] = []
    for index, group in enumerate(optimizer.param_groups):
        label = str(group.get("name", f"group{index}")).replace("/", ".")
        labels.append(label if label not in labels else f"{label}.{index}")
    return labels


def _names(group: Mapping[str, Any]) -> list[str]:
    names = group.get("param_names") or [f"param{i}" for i in range(len(group["params"]))]
    return [str(name).replace("/", ".") for name in names]


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, which reading values would break."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
