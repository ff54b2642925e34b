"""What a decay does over a run: timescale, kept share, equilibrium, bias correction.

Everything here starts from the share d of a weight that a step removes, whatever policy
computed it, and for Adam from the learning rate, the size of its update.

Imports the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

__all__ = [
    "bias_correction_factor",
    "default_warmup",
    "ema_coefficients",
    "equilibrium_rms",
    "half_life_steps",
    "kept_share",
    "late_first_step",
    "rms_after",
    "rotation_per_step",
    "timescale_steps",
    "total_decay",
    "weight_bound",
]


def timescale_steps(share: float) -> float:
    """Return how many steps back the weights remember: τ = 1/d.

    AdamW's weights are an exponential average of its updates, and τ is the length of that
    average: after τ steps an old weight has faded to 1/e.

    Args:
        share: Share of a weight removed each step, lr·λ under `decoupled`; at least 0.

    Example:
        The defaults of AdamW, lr 1e-3 and weight decay 0.01:

        >>> round(timescale_steps(1e-3 * 0.01))
        100000

    References:
        Wang & Aitchison 2024, arXiv:2405.13698.
    """
    _check_share(share)
    return 1.0 / share if share > 0 else math.inf


def half_life_steps(share: float) -> float:
    """Return the steps after which decay alone leaves half of a weight: ln ½ / ln(1 - d).

    The squared norm halves in half of that.

    Example:
        >>> round(half_life_steps(1e-4)), round(half_life_steps(1e-4) / 2)
        (6931, 3466)
    """
    _check_share(share)
    if share == 0:
        return math.inf
    return math.log(0.5) / math.log1p(-share) if share < 1 else 0.0


def total_decay(shares: Iterable[float]) -> float:
    """Return κ = Σ d_t, the timescales that go by in a run.

    Example:
        >>> total_decay(1e-4 for _ in range(10_000))
        1.0
    """
    return math.fsum(shares)


def kept_share(shares: Iterable[float]) -> float:
    """Return Π (1 - d_t), what is left of an initial weight: near e^-κ for small shares.

    Example:
        >>> round(kept_share(1e-4 for _ in range(10_000)), 5)
        0.36786
    """
    listed = list(shares)
    if all(share < 1 for share in listed):
        return math.exp(math.fsum(math.log1p(-share) for share in listed))
    return math.prod(1.0 - share for share in listed)


def ema_coefficients(shares: Sequence[float]) -> list[float]:
    """Return what every step contributes to the final weights.

        θ_T = c_0·θ_0 + Σ c_t·(what step t moves towards)
        c_t = d_t·Π_{s>t} (1 - d_s),    c_0 = Π (1 - d_s)

    The first number belongs to the initial weights, the others to the steps; they sum to 1.

    Example:
        >>> [round(c, 3) for c in ema_coefficients([0.5, 0.5, 0.25])]
        [0.188, 0.188, 0.375, 0.25]

    References:
        Bergsma et al. 2025, arXiv:2502.15938.
    """
    coefficients = []
    later = 1.0
    for share in reversed(shares):
        coefficients.append(share * later)
        later *= 1.0 - share
    coefficients.append(later)
    return coefficients[::-1]


def equilibrium_rms(lr: float, share: float) -> float:
    """Return the RMS at which Adam's noise and the decay balance.

        RMS = lr/√(2·d)        = √(lr/(2·λ)) under `decoupled`

    It holds for weights moved by gradient noise alone: those before a normalisation, or any
    weight late in training. The RMS² of such a weight goes 1 - kept² of the way there.

    Args:
        lr: Learning rate; the size of Adam's update.
        share: Share of a weight removed each step; above 0 for a finite result.

    Example:
        >>> [round(equilibrium_rms(lr, lr * wd), 6) for lr, wd in ((1e-3, 0.1), (3e-4, 0.1))]
        [0.070711, 0.03873]

    References:
        Kosson et al. 2023, arXiv:2305.17212.
    """
    _check_share(share)
    return lr / math.sqrt(2.0 * share) if share > 0 else math.inf


def rotation_per_step(share: float, momentum: float) -> float:
    """Return the angle by which a weight vector turns each step in equilibrium, in radians.

        √(2·d·(1 - β)/(1 + β))

    Args:
        share: Share of a weight removed each step.
        momentum: β1 of Adam, or the momentum of SGD.

    Example:
        >>> f"{rotation_per_step(1e-3 * 0.1, 0.9):.5e}"
        '3.24443e-03'

    References:
        Kosson et al. 2023, arXiv:2305.17212. For SGD with L2 they write √(2·lr·λ/(1 + μ)), the
        same once d = lr·λ/(1 - μ).
    """
    _check_share(share)
    return math.sqrt(2.0 * share * (1.0 - momentum) / (1.0 + momentum))


def rms_after(initial_rms: float, lrs: Iterable[float], shares: Iterable[float]) -> float:
    """Return the RMS of noise-driven weights under Adam after a whole schedule.

        RMS² ← (1 - d_t)²·RMS² + lr_t²

    Args:
        initial_rms: RMS before the first step.
        lrs: Learning rate of every step.
        shares: Share of a weight removed in every step.

    Example:
        Without decay the square grows by lr² a step:

        >>> round(rms_after(0.02, [1e-3] * 10_000, [0.0] * 10_000), 5)
        0.10198

    References:
        Su 2025, "Asymptotic estimation of AdamW's weight RMS", kexue.fm/archives/11307.
    """
    square = initial_rms * initial_rms
    for lr, share in zip(lrs, shares, strict=True):
        square = (1.0 - share) ** 2 * square + lr * lr
    return math.sqrt(square)


def weight_bound(lr: float, share: float) -> float:
    """Return the size that no weight exceeds for long under AdamW: lr/d = 1/λ.

    Adam's step is about `lr` at most, and at this size the decay takes that much back. In the
    full-batch limit AdamW minimises the loss under exactly this bound on every weight.

    Example:
        >>> round(weight_bound(lr=1e-3, share=1e-3 * 0.1), 9)
        10.0

    References:
        Xie & Li 2024, arXiv:2404.04454.
    """
    _check_share(share)
    return lr / share if share > 0 else math.inf


def default_warmup(beta2: float, *, total_steps: float | None = None, most: float = 0.1) -> float:
    """Return the length of a warmup nobody tuned: 2/(1 - β2) steps.

    Args:
        beta2: Decay rate of Adam's second moment, in [0, 1).
        total_steps: Length of the run; caps the warmup at the share `most` of it.
        most: Largest share of the run.

    Example:
        >>> [round(default_warmup(beta2)) for beta2 in (0.999, 0.99, 0.95)]
        [2000, 200, 40]
        >>> default_warmup(0.999, total_steps=5000)
        500.0

    References:
        Ma & Yarats 2019, arXiv:1910.04209. Deviation: the cap is ours.
    """
    _check_beta("beta2", beta2)
    warmup = 2.0 / (1.0 - beta2)
    return warmup if total_steps is None else min(warmup, most * total_steps)


def bias_correction_factor(step: int, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """Return ρ(t), the factor by which Adam's step would differ without bias correction.

        ρ(t) = √(1 - β2ᵗ) / (1 - β1ᵗ)

    With correction the step is ρ(t)·m/√v. Without it the factor is 1, so early steps are 1/ρ(t)
    times as long: 3.2 times at first for (0.9, 0.999), shorter for (0.95, 0.95).

    Args:
        step: 1-based count of the step.
        betas: β1 and β2 of Adam, each in [0, 1).

    Example:
        >>> [round(bias_correction_factor(t), 3) for t in (1, 12, 100, 1000)]
        [0.316, 0.152, 0.309, 0.795]

    References:
        Laing & Orvieto 2025, arXiv:2511.20516.
    """
    beta1, beta2 = betas
    _check_beta("beta1", beta1)
    _check_beta("beta2", beta2)
    if step < 1:
        raise ValueError(f"step counts from 1, got {step}")
    return math.sqrt(_one_minus_power(beta2, step)) / _one_minus_power(beta1, step)


def late_first_step(step: int, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """Return the first step, in units of lr, of a parameter that joins at the global step t.

        ρ(t)·(1 - β1)/√(1 - β2)

    This is what an optimizer with one count for all parameters does. With a count for each
    parameter, as here, the first step is 1.

    Example:
        >>> [round(late_first_step(t), 3) for t in (1, 1000, 100_000)]
        [1.0, 2.515, 3.162]
    """
    beta1, beta2 = betas
    return bias_correction_factor(step, betas) * (1.0 - beta1) / math.sqrt(1.0 - beta2)


def _one_minus_power(beta: float, step: int) -> float:
    # 1 - βᵗ without the cancellation for β near 1.
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0


def _check_share(share: float) -> None:
    if not 0 <= share < math.inf:
        raise ValueError(f"the share removed each step must be at least 0, got {share}")


def _check_beta(name: str, beta: float) -> None:
    if not 0 <= beta < 1:
        raise ValueError(f"{name} must be in [0, 1), got {beta}")
