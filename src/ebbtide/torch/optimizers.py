"""AdamW, Adam and SGD with torch's signatures; what they add comes after torch's arguments."""

from __future__ import annotations

from typing import Any

import torch

from ebbtide.hyperparameters import as_pair
from ebbtide.rules import ADAM
from ebbtide.rules import SGD as SGD_RULE
from ebbtide.torch.base import Optimizer

__all__ = ["SGD", "Adam", "AdamW"]

Number = float | torch.Tensor


class Adam(Optimizer):
    """Adam; its weight decay is L2 unless `decay_policy` says otherwise.

    Arguments up to `decoupled_weight_decay` are those of `torch.optim.Adam`, the others those of
    `AdamW`.

    References:
        Kingma & Ba 2015, arXiv:1412.6980.
    """

    _rule = ADAM
    _default_policy = "l2"

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        decay_policy: str | None = None,
        cautious: bool = False,
        base_lr: float | None = None,
        bias_correction: bool = True,
        seed: int = 0,
        state_format: str | None = None,
        master_format: str | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
    ) -> None:
        betas = _checked_betas(lr, betas, foreach=foreach, capturable=capturable)
        if decay_policy is None:
            decay_policy = "decoupled" if decoupled_weight_decay else self._default_policy
        elif decoupled_weight_decay and decay_policy == "l2":
            raise ValueError("decoupled_weight_decay=True contradicts decay_policy='l2'")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decay_policy != "l2",
            "decay_policy": decay_policy,
            "cautious": cautious,
            "base_lr": base_lr,
            "bias_correction": bias_correction,
            "seed": seed,
            "state_format": state_format,
            "master_format": master_format,
        }
        super().__init__(params, defaults, nonfinite=nonfinite, clip_grad_norm=clip_grad_norm)
        _check_flags(self, fused=fused, foreach=foreach, differentiable=differentiable)


class AdamW(Adam):
    """Adam with decoupled weight decay: `torch.optim.AdamW` with one import changed.

    The formula is `ebbtide.reference.adam`; what `weight_decay` removes is
    `ebbtide.weight_decay.decay_share`. Fast without a flag; `foreach` and `fused` are accepted.

    Args:
        params: Tensors, (name, tensor) pairs, or groups of them.
        lr: Learning rate, at least 0; a number or a tensor of one element.
        betas: Decay rates of the two moving averages, each in [0, 1).
        eps: Added to the denominator, at least 0.
        weight_decay: λ, at least 0, in the convention of `decay_policy`.
        amsgrad: Divide by the running maximum of the second moment.
        maximize: Climb instead of descend.
        foreach: Accepted; a hint at an implementation.
        capturable: As in torch.
        differentiable: As in torch.
        fused: Accepted; with `True` the step does a GradScaler's unscaling and skipping itself.
        decay_policy: `"l2"`, `"decoupled"` (default), `"independent"` or `"corrected"`.
        cautious: Decay only where the step moves a parameter towards zero.
        base_lr: Learning rate that `independent` and `corrected` divide by; by default the group's
            lr at construction. With OneCycleLR pass its `max_lr`.
        bias_correction: Divide the moments by 1 - βᵗ.
        seed: Of stochastic rounding for 16-bit parameters, at least 0.
        state_format: Of the moments: `"float32"`, `"bfloat16"` or `"8bit"`; by default float32, and
            bfloat16 for 16-bit parameters. Parameters below two dimensions or of fewer than 4096
            elements, and embeddings, are kept in float32 where one is asked for.
        master_format: What 16-bit parameters lack: `"stochastic"` (default) rounds them
            stochastically, `"24bit"` and `"32bit"` keep 8 and 16 bits more beside them, `"none"`
            rounds to nearest, which loses small updates.
        nonfinite: `"raise"` leaves elements with a non-finite gradient untouched and raises after
            the step; `"skip"` drops the whole step; `"propagate"` is torch's behaviour.
        clip_grad_norm: Clip the global norm of all gradients to this; gradients are not written.

    Raises:
        TypeError, ValueError: Named after the parameter or hyperparameter at fault.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = AdamW([w], lr=0.1, weight_decay=0.5)
        >>> w.grad = torch.zeros(2, 2)
        >>> optimizer.step()
        >>> w.detach()[0]
        tensor([0.9500, 0.9500])

    References:
        Loshchilov & Hutter 2019, arXiv:1711.05101. Deviation: the default policy multiplies λ by
        lr, as PyTorch does; `decay_policy="independent"` is the paper's.
    """

    _default_policy = "decoupled"

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decay_policy: str | None = None,
        cautious: bool = False,
        base_lr: float | None = None,
        bias_correction: bool = True,
        seed: int = 0,
        state_format: str | None = None,
        master_format: str | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decay_policy=decay_policy,
            cautious=cautious,
            base_lr=base_lr,
            bias_correction=bias_correction,
            seed=seed,
            state_format=state_format,
            master_format=master_format,
            nonfinite=nonfinite,
            clip_grad_norm=clip_grad_norm,
        )


class SGD(Optimizer):
    """Stochastic gradient descent; with `decay_policy="decoupled"` it is SGDW.

    Arguments up to `fused` are those of `torch.optim.SGD`, the others those of `AdamW`. The
    formula is `ebbtide.reference.sgd`.
    """

    _rule = SGD_RULE
    _default_policy = "l2"

    def __init__(
        self,
        params: Any,
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decay_policy: str = "l2",
        cautious: bool = False,
        base_lr: float | None = None,
        seed: int = 0,
        state_format: str | None = None,
        master_format: str | None = None,
        nonfinite: str = "raise",
        clip_grad_norm: float | None = None,
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decay_policy": decay_policy,
            "cautious": cautious,
            "base_lr": base_lr,
            "bias_correction": True,
            "seed": seed,
            "state_format": state_format,
            "master_format": master_format,
        }
        super().__init__(params, defaults, nonfinite=nonfinite, clip_grad_norm=clip_grad_norm)
        _check_flags(self, fused=fused, foreach=foreach, differentiable=differentiable)


def _checked_betas(
    lr: Number, betas: Any, *, foreach: bool | None, capturable: bool
) -> tuple[Number, Number]:
    """Refuse what torch refuses of tensor hyperparameters, in its words; return 0-dim betas."""
    betas = as_pair(betas)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not isinstance(value, torch.Tensor):
            continue
        if foreach and not capturable:
            raise ValueError(
                f"{name} as a Tensor is not supported for capturable=False and foreach=True"
            )
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
    if isinstance(betas[0], torch.Tensor) != isinstance(betas[1], torch.Tensor):
        raise ValueError("betas must be either both floats or both Tensors")
    beta1, beta2 = (b.squeeze() if isinstance(b, torch.Tensor) else b for b in betas)
    return beta1, beta2


def _check_flags(
    optimizer: Optimizer, *, fused: bool | None, foreach: bool | None, differentiable: bool
) -> None:
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if fused:
        optimizer._step_supports_amp_scaling = True
