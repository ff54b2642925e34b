"""The NumPy face: AdamW, Adam and SGD over arrays, updated in place.

    optimizer = AdamW({"w": w, "b": b}, lr=1e-3, weight_decay=1e-2)
    optimizer.step({"w": dw, "b": db})

State is created at the first gradient of an array, and its steps are counted from there. Views,
Fortran order and arrays with gaps are stepped rightly; overlapping or read-only memory is refused
by name before anything is written. `param_groups` is for hyperparameters: which arrays are stepped
is settled when a group is added, so put no other array into its `params` later.
"""

from __future__ import annotations

from typing import Any

from ebbtide.hyperparameters import as_pair
from ebbtide.numpy.base import DecayMask, Optimizer, Params
from ebbtide.rules import ADAM
from ebbtide.rules import SGD as SGD_RULE

__all__ = ["SGD", "Adam", "AdamW"]


class AdamW(Optimizer):
    """Adam with decoupled weight decay, over NumPy arrays.

    The formula is `ebbtide.reference.adam`; what `weight_decay` removes is
    `ebbtide.weight_decay.decay_share`.

    Args:
        params: Arrays by name, a list of arrays, or a list of groups, each a mapping with
            `params` and hyperparameters of its own. float16, float32 or float64, updated in place.
        lr: Learning rate, at least 0; change it in `param_groups` between steps.
        betas: Decay rates of the two moving averages, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: λ, at least 0, in the convention of `decay_policy`.
        amsgrad: Divide by the running maximum of the second moment.
        maximize: Climb instead of descend.
        decay_policy: `"l2"`, `"decoupled"`, `"independent"` or `"corrected"`.
        cautious: Decay only where the step moves a parameter towards zero.
        base_lr: Learning rate that `independent` and `corrected` divide by; by default the group's
            lr at construction.
        bias_correction: Divide the moments by 1 - βᵗ.
        decay_mask: Which arrays decay: a mapping from every name to a bool, or a function of name
            and array. By default arrays of two dimensions or more.
        nonfinite: `"raise"` leaves elements with a non-finite gradient untouched and raises after
            the step; `"skip"` drops the whole step; `"propagate"` computes with them.
        clip_grad_norm: Clip the global norm of all gradients to this; gradients are not written.
        seed: Of stochastic rounding for float16 arrays, at least 0.

    Raises:
        TypeError, ValueError: Named after the array or hyperparameter at fault.

    Example:
        >>> import numpy as np
        >>> w, b = np.ones((2, 2), np.float32), np.zeros(2, np.float32)
        >>> optimizer = AdamW({"w": w, "b": b}, lr=0.1, weight_decay=0.5)
        >>> optimizer.step({"w": np.zeros((2, 2), np.float32), "b": np.ones(2, np.float32)})
        >>> w[0].round(6).tolist() == [np.float32(0.95)] * 2, (-b).round(6)
        (True, array([0.1, 0.1], dtype=float32))

    References:
        Loshchilov & Hutter 2019, arXiv:1711.05101. Deviation: the default policy multiplies λ by
        lr, as PyTorch does; `decay_policy="independent"` is the paper's.
    """

    _rule = ADAM
    _default_policy = "decoupled"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decay_policy: str | None = None,
        cautious: bool = False,
        base_lr: float | None = None,
        bias_correction: bool = True,
        decay_mask: DecayMask | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": as_pair(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decay_policy": decay_policy or self._default_policy,
            "cautious": cautious,
            "base_lr": base_lr,
            "bias_correction": bias_correction,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            decay_mask=decay_mask,
            nonfinite=nonfinite,
            clip_grad_norm=clip_grad_norm,
        )


class Adam(AdamW):
    """Adam; its weight decay is L2 unless `decay_policy` says otherwise. Arguments as in `AdamW`.

    Example:
        >>> import numpy as np
        >>> w = np.ones(3)
        >>> Adam([w], lr=0.1).step([np.full(3, 7.0)])
        >>> w.round(6).tolist()
        [0.9, 0.9, 0.9]

    References:
        Kingma & Ba 2015, arXiv:1412.6980.
    """

    _default_policy = "l2"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class SGD(Optimizer):
    """Stochastic gradient descent; with `decay_policy="decoupled"` it is SGDW.

    The formula is `ebbtide.reference.sgd`.

    Args:
        params: As in `AdamW`.
        lr: Learning rate, at least 0.
        momentum: Share of the buffer kept, at least 0; 0 keeps no buffer.
        dampening: Share of the gradient left out of the buffer, not applied at the first step.
        weight_decay: λ, at least 0, in the convention of `decay_policy`.
        nesterov: Look ahead by one more share of the buffer.
        maximize: Climb instead of descend.
        decay_policy: As in `AdamW`; `"l2"` by default.
        cautious: As in `AdamW`.
        base_lr: As in `AdamW`.
        decay_mask: As in `AdamW`.
        nonfinite: As in `AdamW`.
        clip_grad_norm: As in `AdamW`.
        seed: As in `AdamW`.

    Example:
        >>> import numpy as np
        >>> w = np.ones((1, 2))
        >>> SGD([w], lr=0.1, weight_decay=0.5, decay_policy="decoupled").step([np.ones((1, 2))])
        >>> w.round(6).tolist()
        [[0.85, 0.85]]
    """

    _rule = SGD_RULE

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decay_policy: str = "l2",
        cautious: bool = False,
        base_lr: float | None = None,
        decay_mask: DecayMask | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decay_policy": decay_policy,
            "cautious": cautious,
            "base_lr": base_lr,
            "bias_correction": True,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            decay_mask=decay_mask,
            nonfinite=nonfinite,
            clip_grad_norm=clip_grad_norm,
        )
