"""What the kernels need to know of a rule: its state, and the scalars of one step.

The general rules are written in `reference.py`; here they get names. A rule sees numbers only:
the weight decay reaches it as `decay` (share of θ removed) and `l2` (coefficient of θ in the
gradient), the schedule as `lr`. The scalars are computed in float64, once for each param group and
step count, and every backend reads the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["ADAM", "SGD", "Recipe", "Rule", "Scalars"]


class Scalars(NamedTuple):
    """The numbers of one step for one group and step count, in the order of `csrc/step.h`.

    `grad_scale` multiplies the gradient (−1 climbs; clipping and loss scales multiply it
    further). The Adam rule reads `exp_avg_weight` (1 − β1) to `sqrt_bias_correction2`; the SGD
    rule reads `momentum` to `nesterov`. At the first step of a momentum buffer `momentum` enters
    the buffer as 0 and the gradient as 1, hence `buffer_keep` and `buffer_add`.
    """

    lr: float
    decay: float
    l2: float
    cautious: float
    grad_scale: float
    exp_avg_weight: float = 0.0
    beta2: float = 0.0
    one_minus_beta2: float = 0.0
    eps: float = 0.0
    step_size: float = 0.0
    sqrt_bias_correction2: float = 1.0
    momentum: float = 0.0
    buffer_keep: float = 0.0
    buffer_add: float = 1.0
    nesterov: float = 0.0
    step: float = 1.0
    seed: float = 0.0


class Recipe(NamedTuple):
    """What the scalars of a group's steps are computed from; read once, until the group changes.

    The compiled core does the same arithmetic between steps (`csrc/groups.h`).

    Attributes:
        fixed: The scalars, of which those that depend on the step are filled in.
        beta1: Of the bias correction of the first moment; 0 where it is not corrected.
        beta2: Of that of the second.
    """

    fixed: Scalars
    beta1: float = 0.0
    beta2: float = 0.0

    def __call__(self, step: int) -> Scalars:
        """Return the scalars of a step.

        Args:
            step: 1-based count of the step about to be taken; for SGD only 1 or more matters.
        """
        s = self.fixed
        step_size = s.lr / (1 - self.beta1**step)
        root = math.sqrt(1 - self.beta2**step)
        keep, add = (0.0, 1.0) if step == 1 else (s.buffer_keep, s.buffer_add)
        return Scalars._make(
            (*s[:9], step_size, root, s.momentum, keep, add, s.nesterov, float(step), s.seed)
        )

    def at_rates(self, lr: float, decay: float, l2: float) -> Recipe:
        """Return the same under another learning rate and weight decay."""
        return Recipe(Scalars._make((lr, decay, l2, *self.fixed[3:])), self.beta1, self.beta2)


@dataclass(frozen=True)
class Rule:
    """A named update rule.

    Attributes:
        name: `"adam"` or `"sgd"`; the kernels know the two by this name.
        counts_steps: Whether the state holds a `step` count of its own.
    """

    name: str
    counts_steps: bool

    def state_keys(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Name the state arrays of the shape of the parameter, in the order the kernels take."""
        if self.name == "adam":
            return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def prepare(self, group: Mapping[str, Any], decay: float, l2: float) -> Recipe:
        """Read a group once; what is returned gives the scalars of its steps, all finite.

        Args:
            group: Hyperparameters as numbers, by torch's names.
            decay: Share of θ removed, from `ebbtide.weight_decay.decay_share`.
            l2: Coefficient of θ in the gradient.
        """
        common = Scalars(
            lr=float(group["lr"]),
            decay=decay,
            l2=l2,
            cautious=1.0 if group["cautious"] else 0.0,
            grad_scale=-1.0 if group["maximize"] else 1.0,
            seed=float(group["seed"]),
        )
        return _of_adam(group, common) if self.name == "adam" else _of_sgd(group, common)


def _of_adam(group: Mapping[str, Any], common: Scalars) -> Recipe:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    fixed = common._replace(
        exp_avg_weight=1 - beta1, beta2=beta2, one_minus_beta2=1 - beta2, eps=float(group["eps"])
    )
    return Recipe(fixed, beta1, beta2) if group["bias_correction"] else Recipe(fixed)


def _of_sgd(group: Mapping[str, Any], common: Scalars) -> Recipe:
    momentum = float(group["momentum"])
    return Recipe(
        common._replace(
            momentum=momentum,
            buffer_keep=momentum,
            buffer_add=1.0 - float(group["dampening"]),
            nesterov=1.0 if group["nesterov"] else 0.0,
        )
    )


ADAM = Rule("adam", counts_steps=True)
SGD = Rule("sgd", counts_steps=False)
