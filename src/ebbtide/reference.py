"""The update rules on single numbers: the definition every backend is tested against.

Two rules, written once each: `adam` (Adam, AdamW, AMSGrad) and `sgd` (SGD with momentum,
SGDW). Which weight decay they apply is decided by two numbers, `decay` (the share of the
parameter removed by this step) and `l2` (the coefficient of the parameter added to the
gradient); `ebbtide.weight_decay` computes them from a policy.

`csrc/update.h`, `backends/torch_ops.py` and `backends/triton.py` repeat these lines in this
order; where they disagree with this file they are wrong. Compiled for `double`,
`csrc/update.h` equals it bit for bit; the float32 kernels are judged by their distance
from it.

Imports nothing but the standard library, so that the oracle cannot share a bug with the
code it judges. Symbols: θ parameter, g gradient, m first moment, v second moment, b momentum
buffer, u what the step subtracts, t the 1-based count of steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["AdamState", "SGDState", "adam", "sgd"]


class AdamState(NamedTuple):
    """One element under `adam`, before or after a step."""

    param: float
    exp_avg: float = 0.0
    exp_avg_sq: float = 0.0
    max_exp_avg_sq: float | None = None


class SGDState(NamedTuple):
    """One element under `sgd`, before or after a step; `None` before the first gradient."""

    param: float
    momentum_buffer: float | None = None


def adam(
    state: AdamState,
    grad: float,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
    l2: float = 0.0,
    cautious: bool = False,
    maximize: bool = False,
    bias_correction: bool = True,
) -> AdamState:
    """Take one Adam, AdamW or AMSGrad step on one element.

        g ← −g if maximize
        g ← g + l2·θ
        m ← m + (1 − β1)·(g − m)
        v ← β2·v + (1 − β2)·g²
        w ← max(w, v) if AMSGrad else v
        u ← lr/(1 − β1ᵗ) · m / (√w/√(1 − β2ᵗ) + eps)
        θ ← θ·(1 − decay) − u

    Adam with L2 is `l2=weight_decay`, AdamW is `decay=lr * weight_decay`, AMSGrad is a state
    whose `max_exp_avg_sq` is not `None`.

    Args:
        state: θ, m, v and, for AMSGrad, the running maximum w of v.
        grad: Gradient of the loss with respect to θ.
        step: 1-based count t of this parameter's steps.
        lr: Learning rate of this step, after the schedule; ≥ 0.
        betas: β1, β2, each in [0, 1).
        eps: Added to the denominator after the square root; ≥ 0.
        decay: Share of θ removed by this step, in [0, 1).
        l2: Coefficient of θ in the gradient; ≥ 0.
        cautious: Decay only where the step moves θ towards zero, u·θ ≥ 0 with θ before decay.
        maximize: Climb instead of descend.
        bias_correction: Divide the moments by 1 − βᵗ; without it both divisors are 1.

    Returns:
        The element after the step.

    Example:
        The first step moves by lr, whatever the size of the gradient:

        >>> round(adam(AdamState(1.0), 123.0, step=1, lr=0.1).param, 6)
        0.9

        The second by hand: g = 1 then 3, β = (0.9, 0.99), lr = 0.1. Then
        m = 0.9·0.1 + 0.1·3 = 0.39, v = 0.99·0.01 + 0.01·9 = 0.0999,
        m̂ = 0.39/0.19 = 2.052632, v̂ = 0.0999/0.0199 = 5.020101, u = 0.1·m̂/√v̂ = 0.091612:

        >>> state = adam(AdamState(1.0), 1.0, step=1, lr=0.1, betas=(0.9, 0.99))
        >>> state = adam(state, 3.0, step=2, lr=0.1, betas=(0.9, 0.99))
        >>> [round(x, 5) for x in state[:3]]
        [0.80839, 0.39, 0.0999]

        Decoupled decay removes its share even where the gradient is zero:

        >>> adam(AdamState(2.0), 0.0, step=1, lr=0.1, decay=0.1 * 0.5).param
        1.9

        L2 in Adam moves by lr however small the coefficient is, because it is normalised too:

        >>> round(adam(AdamState(2.0), 0.0, step=1, lr=0.1, l2=0.001).param, 4)
        1.9

    References:
        Kingma & Ba 2015, Algorithm 1, arXiv:1412.6980. Loshchilov & Hutter 2019, Algorithm 2,
        arXiv:1711.05101. Reddi et al. 2018, Algorithm 2, arXiv:1904.09237. Chen et al. 2025
        (cautious weight decay), arXiv:2510.12402. Deviation: eps is added after bias correction,
        as in Algorithm 2 and PyTorch, not before it as in the authors' code; AMSGrad takes the
        maximum of the uncorrected v, as PyTorch does; where the denominator is exactly zero
        (eps = 0 and v = 0) u is zero, where PyTorch gives NaN.
    """
    beta1, beta2 = betas
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = state
    if maximize:
        grad = -grad
    if l2 != 0:
        grad = grad + l2 * param
    weight = 1 - beta1
    # Two forms of the same interpolation, each exact at its own end (β1 = 0 gives m = g).
    if weight < 0.5:
        exp_avg = exp_avg + weight * (grad - exp_avg)
    else:
        exp_avg = grad + (weight - 1) * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    second_moment = exp_avg_sq
    if max_exp_avg_sq is not None:
        max_exp_avg_sq = second_moment = max(max_exp_avg_sq, exp_avg_sq)
    bias_correction1 = 1 - beta1**step if bias_correction else 1.0
    bias_correction2 = 1 - beta2**step if bias_correction else 1.0
    # √v/√(1 − β2ᵗ), not √(v/(1 − β2ᵗ)): torch's order, and the two differ in the last bit.
    denom = math.sqrt(second_moment) / math.sqrt(bias_correction2) + eps
    update = lr / bias_correction1 * exp_avg / denom if denom != 0 else 0.0
    param = _decayed(param, update, decay, cautious) - update
    return AdamState(param, exp_avg, exp_avg_sq, max_exp_avg_sq)


def sgd(
    state: SGDState,
    grad: float,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    decay: float = 0.0,
    l2: float = 0.0,
    cautious: bool = False,
    maximize: bool = False,
) -> SGDState:
    """Take one SGD or SGDW step on one element.

        g ← −g if maximize
        g ← g + l2·θ
        b ← momentum·b + (1 − dampening)·g,   b ← g at the first gradient
        d ← g + momentum·b if nesterov else b,   d ← g without momentum
        θ ← θ·(1 − decay) − lr·d

    SGD with L2 is `l2=weight_decay`, SGDW is `decay=lr * weight_decay`.

    Args:
        state: θ and the buffer b; `None` before the first gradient.
        grad: Gradient of the loss with respect to θ.
        lr: Learning rate of this step, after the schedule; ≥ 0.
        momentum: Share of the buffer kept, ≥ 0; 0 keeps no buffer.
        dampening: Share of the gradient left out of the buffer, not applied at the first step.
        nesterov: Look ahead by one more share of the buffer.
        decay: Share of θ removed by this step, in [0, 1).
        l2: Coefficient of θ in the gradient; ≥ 0.
        cautious: Decay only where the step moves θ towards zero, lr·d·θ ≥ 0.
        maximize: Climb instead of descend.

    Returns:
        The element after the step.

    Example:
        Three steps with a constant gradient 0.5, lr 0.1, momentum 0.9, by hand:
        b = 0.5, 0.95, 1.355, so θ = 1 − 0.1·(0.5 + 0.95 + 1.355):

        >>> state = SGDState(1.0)
        >>> for _ in range(3):
        ...     state = sgd(state, 0.5, lr=0.1, momentum=0.9)
        >>> round(state.param, 6), round(state.momentum_buffer, 6)
        (0.7195, 1.355)

    References:
        Sutskever et al. 2013; Loshchilov & Hutter 2019, Algorithm 1, arXiv:1711.05101.
        Deviation: as in PyTorch, lr multiplies the buffer when it is applied; Algorithm 1 puts
        lr into the buffer, which differs while a schedule moves.
    """
    param, momentum_buffer = state
    if maximize:
        grad = -grad
    if l2 != 0:
        grad = grad + l2 * param
    direction = grad
    if momentum != 0:
        if momentum_buffer is None:
            momentum_buffer = grad
        else:
            momentum_buffer = momentum * momentum_buffer + (1 - dampening) * grad
        direction = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    update = lr * direction
    param = _decayed(param, update, decay, cautious) - update
    return SGDState(param, momentum_buffer)


def _decayed(param: float, update: float, decay: float, cautious: bool) -> float:
    """Remove the share `decay` of the parameter, or nothing where caution forbids it."""
    if cautious and update * param < 0:
        return param
    return param * (1 - decay)
