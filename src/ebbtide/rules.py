"""What the kernels need to know of a rule: its state, and the scalars of one step.

The general rules are written in `reference.py`; here they get names. A rule sees numbers only:
the weight decay reaches it as `decay` (share of θ removed) and `l2` (coefficient of θ in the
gradient), the schedule as `lr`. The scalars are computed in float64, once for each param group and
step count, and every backend reads the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["ADAM", "SGD", "Rule", "Scalars"]


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

    def prepare(
        self, group: Mapping[str, Any], decay: float, l2: float
    ) -> Callable[[int], Scalars]:
        """Read a group once; what is returned gives the scalars of a step.

        Args:
            group: Hyperparameters as numbers, by torch's names.
            decay: Share of θ removed, from `ebbtide.weight_decay.decay_share`.
            l2: Coefficient of θ in the gradient.

        Returns:
            A function of the 1-based count of the step about to be taken (for SGD only 1 or more
            matters). Its scalars are finite.
        """
        common = (
            float(group["lr"]),
            decay,
            l2,
            1.0 if group["cautious"] else 0.0,
            -1.0 if group["maximize"] else 1.0,
        )
        prepare = _prepare_adam if self.name == "adam" else _prepare_sgd
        return prepare(group, common, float(group["seed"]))


def _prepare_adam(
    group: Mapping[str, Any], common: tuple[float, ...], seed: float
) -> Callable[[int], Scalars]:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    corrected = bool(group["bias_correction"])
    lr, *_ = common
    fixed = (*common, 1 - beta1, beta2, 1 - beta2, float(group["eps"]))

    def scalars(step: int) -> Scalars:
        bias_correction1 = 1 - beta1**step if corrected else 1.0
        bias_correction2 = 1 - beta2**step if corrected else 1.0
        step_size, root = lr / bias_correction1, math.sqrt(bias_correction2)
        return Scalars._make((*fixed, step_size, root, 0.0, 0.0, 1.0, 0.0, float(step), seed))

    return scalars


def _prepare_sgd(
    group: Mapping[str, Any], common: tuple[float, ...], seed: float
) -> Callable[[int], Scalars]:
    momentum = float(group["momentum"])
    add = 1.0 - float(group["dampening"])
    nesterov = 1.0 if group["nesterov"] else 0.0
    fixed = (*common, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, momentum)

    def scalars(step: int) -> Scalars:
        keep_add = (0.0, 1.0) if step == 1 else (momentum, add)
        return Scalars._make((*fixed, *keep_add, nesterov, float(step), seed))

    return scalars


ADAM = Rule("adam", counts_steps=True)
SGD = Rule("sgd", counts_steps=False)
