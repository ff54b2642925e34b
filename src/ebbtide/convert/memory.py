"""Weight decay from the length of a run: the normalised λ and the timescale."""

from __future__ import annotations

import math

from ebbtide.convert._conversion import Conversion, check_range

__all__ = ["batch_passes", "from_normalized", "from_timescale", "to_normalized"]


def batch_passes(*, dataset_size: float, batch_size: float, epochs: float) -> float:
    """Return the number of batches in a run, which need not be whole: N·epochs/B.

    Example:
        >>> batch_passes(dataset_size=50_000, batch_size=128, epochs=100)
        39062.5
    """
    for name, value in (
        ("dataset_size", dataset_size),
        ("batch_size", batch_size),
        ("epochs", epochs),
    ):
        check_range(name, value, above=0.0)
    return dataset_size * epochs / batch_size


def from_normalized(normalized: float, *, passes: float) -> Conversion:
    """Return the `independent` weight decay of a normalised one: λ = λ_norm/√passes.

    Args:
        normalized: λ_norm; the paper's good values are 0.025 and 0.05.
        passes: Batches in the run, or in the current cycle of warm restarts (`batch_passes`).

    Example:
        CIFAR-10, batch 128, 100 epochs:

        >>> passes = batch_passes(dataset_size=50_000, batch_size=128, epochs=100)
        >>> f"{from_normalized(0.025, passes=passes).value:.5e}"
        '1.26491e-04'

    References:
        Loshchilov & Hutter 2019, section B.1, arXiv:1711.05101, who call it "one possibility
        informed by few experiments".
    """
    check_range("normalized", normalized, at_least=0.0)
    check_range("passes", passes, above=0.0)
    return Conversion(
        value=normalized / math.sqrt(passes),
        rule="normalised weight decay",
        formula="λ = λ_norm/√(batch passes), for decay_policy='independent'",
        exact=True,
    )


def to_normalized(weight_decay: float, *, passes: float) -> Conversion:
    """Return the λ_norm of an `independent` weight decay: λ·√passes.

    Example:
        >>> round(to_normalized(1.26491e-4, passes=39_062.5).value, 6)
        0.025
    """
    check_range("weight_decay", weight_decay, at_least=0.0)
    check_range("passes", passes, above=0.0)
    return Conversion(
        value=weight_decay * math.sqrt(passes),
        rule="normalised weight decay",
        formula="λ_norm = λ·√(batch passes), from decay_policy='independent'",
        exact=True,
    )


def from_timescale(steps: float, *, lr: float) -> Conversion:
    """Return the `decoupled` weight decay whose memory is that many steps: λ = 1/(lr·τ).

    Args:
        steps: Timescale τ in steps, above 1: epochs times the steps of an epoch, or a share of
            the run times its length.
        lr: Learning rate before the schedule; above 0.

    Example:
        100 epochs of CIFAR-10 at batch 128:

        >>> round(from_timescale(100 * 50_000 / 128, lr=1e-3).value, 6)
        0.0256

    References:
        Wang & Aitchison 2024, arXiv:2405.13698.
    """
    check_range("steps", steps, above=1.0)
    check_range("lr", lr, above=0.0)
    return Conversion(
        value=1.0 / (lr * steps),
        rule="timescale",
        formula="λ = 1/(lr·τ), for decay_policy='decoupled'",
        exact=True,
    )
