"""The settings of one parameter group that decide its decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebbtide.weight_decay import DECAY_POLICIES, decay_share

__all__ = ["DecaySettings"]

RULES = ("adam", "sgd", "other")


@dataclass(frozen=True)
class DecaySettings:
    """What decides the decay of one parameter group.

    Args:
        lr: Learning rate before the schedule; at least 0.
        weight_decay: λ in the convention of the policy; at least 0.
        decay_policy: One of `weight_decay.DECAY_POLICIES`.
        rule: "adam", "sgd" or "other"; decides how L2 reaches the weights.
        base_lr: Learning rate that `independent` and `corrected` divide by; None for `lr`.
        betas: β1 and β2 of Adam.
        momentum: Momentum of SGD, in [0, 1).
        dampening: Dampening of SGD.
        cautious: Whether decay is masked to weights that the step moves towards zero.
        gradient_scale: Typical √v̂; under Adam, L2 needs it. None where it is not known.
        name: Name of the group.

    Raises:
        ValueError: A number is out of range, or the policy or rule is unknown.

    Example:
        >>> DecaySettings(lr=1e-3, weight_decay=0.01).share(1e-3, 0.01)
        1e-05
    """

    lr: float
    weight_decay: float
    decay_policy: str = "decoupled"
    rule: str = "adam"
    base_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    dampening: float = 0.0
    cautious: bool = False
    gradient_scale: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("lr", "weight_decay"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ValueError(f"{field} must be a finite number of at least 0, got {value}")
        for field, choices in (("decay_policy", DECAY_POLICIES), ("rule", RULES)):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"unknown {field} {getattr(self, field)!r}; choose from {', '.join(choices)}"
                )
        for field, value in zip(("beta1", "beta2", "momentum"), self._decay_rates, strict=True):
            if not 0 <= value < 1:
                raise ValueError(f"{field} must be in [0, 1), got {value}")
        if self.gradient_scale is not None and not 0 < self.gradient_scale < math.inf:
            raise ValueError(f"gradient_scale must be above 0, got {self.gradient_scale}")

    @property
    def _decay_rates(self) -> tuple[float, float, float]:
        return (*self.betas, self.momentum)

    @classmethod
    def from_group(
        cls, group: Mapping[str, Any], *, name: str = "", gradient_scale: float | None = None
    ) -> DecaySettings:
        """Read the settings from a parameter group of an optimizer, ours or torch's.

        Under a schedule the group's `lr` is that of the moment; `initial_lr` is read instead
        where a scheduler has left it.

        Args:
            group: Parameter group with its hyperparameters.
            name: Name for a group that carries none.
            gradient_scale: Typical √v̂ of the group, where it is known.
        """
        has_betas = "betas" in group
        policy = group.get("decay_policy")
        if policy is None:
            policy = "decoupled" if group.get("decoupled_weight_decay") else "l2"
        betas = group.get("initial_betas", group["betas"]) if has_betas else (0.0, 0.0)
        base_lr = group.get("base_lr")
        return cls(
            lr=float(group.get("initial_lr", group["lr"])),
            weight_decay=float(group.get("initial_weight_decay", group["weight_decay"])),
            decay_policy=policy,
            rule="adam" if has_betas else "sgd" if "dampening" in group else "other",
            base_lr=None if base_lr is None else float(base_lr),
            betas=(float(betas[0]), float(betas[1])),
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            cautious=bool(group.get("cautious", False)),
            gradient_scale=gradient_scale,
            name=str(group.get("name", name)),
        )

    def share(self, lr: float, weight_decay: float) -> float | None:
        """Return the share of a weight that a step removes; None where it cannot be known.

            l2 under SGD     lr·λ·(1 - dampening)/(1 - momentum)
            l2 under Adam    lr·λ/√v̂
            other policies   `weight_decay.decay_share`

        Args:
            lr: Learning rate of the step, after its schedule.
            weight_decay: λ of the step, after its schedule.
        """
        if self.decay_policy != "l2" or lr == 0 or weight_decay == 0:
            base_lr = self.lr if self.base_lr is None else self.base_lr
            return decay_share(self.decay_policy, lr=lr, base_lr=base_lr, weight_decay=weight_decay)
        if self.rule == "sgd":
            return lr * weight_decay * (1.0 - self.dampening) / (1.0 - self.momentum)
        if self.rule == "adam" and self.gradient_scale is not None:
            return lr * weight_decay / self.gradient_scale
        return None
