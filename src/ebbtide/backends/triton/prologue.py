"""What a step needs before it begins where the host must not wait: one small launch.

It decides what of the gradients is applied (unscaling, clipping, skipping), and for rows whose step
count or hyperparameters lie on the device it counts the step and computes its scalars, as
`ebbtide.rules` does on the host, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.codecs import epoch_key

__all__ = ["NUMBERS", "POLICIES", "VERDICT", "prepare"]

# What is decided, float64; "skipped" counts, "max_norm" is given.
VERDICT = ("scale", "apply", "norm", "skipped", "max_norm")
_SCALE = tl.constexpr(0)
_APPLY = tl.constexpr(1)
_NORM = tl.constexpr(2)
_SKIPPED = tl.constexpr(3)
_MAX_NORM = tl.constexpr(4)

# Hyperparameters of a group, float64; words and flags as numbers.
NUMBERS = (
    "lr", "base_lr", "weight_decay", "decay_policy", "cautious", "maximize", "seed", "beta1",
    "beta2", "eps", "bias_correction", "momentum", "dampening", "nesterov",
)  # fmt: skip
POLICIES = ("l2", "decoupled", "independent", "corrected")
_GROUP = tl.constexpr(len(NUMBERS))
_SCALAR_COUNT = tl.constexpr(19)


# A binary is used again whatever these are.
@triton.jit(do_not_specialize=["partial", "partials", "found_inf", "loss_scale", "count"])
def prepare(
    verdict: tl.tensor,
    partial: tl.tensor,
    partials: tl.tensor,
    found_inf: tl.tensor,
    loss_scale: tl.tensor,
    counters: tl.tensor,
    count: tl.tensor,
    numbers: tl.tensor,
    sources: tl.tensor,
    scalars: tl.tensor,
    DECIDE: tl.constexpr,
    JUDGED: tl.constexpr,
    FOUND_INF: tl.constexpr,
    LOSS_SCALE: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    ADAM: tl.constexpr,
) -> None:
    """Decide, then count and compute. One program.

    Args:
        verdict: `VERDICT`; written, but for `max_norm`.
        partial: Sums of squares.
        partials: Their number; 0 if nobody asks for the norm.
        found_inf: What a GradScaler found; 0 means all finite.
        loss_scale: That the gradients are divided by.
        counters: Of each row the address of its step count, whether that is float64, its group.
        count: Number of rows that count on the device.
        numbers: `NUMBERS` of each group.
        sources: Address of each number that is a tensor, negative for float64, 0 for others.
        scalars: `Scalars` and key of each row; written.
        DECIDE: Whether the verdict is found here.
        JUDGED: Whether there is a verdict, from here or from another device.
        FOUND_INF: Whether there is a `found_inf`.
        LOSS_SCALE: Whether there is a `loss_scale`.
        CLIP: Whether the norm is clipped.
        SKIP: Whether a step that is not finite is dropped.
        ADAM: Whether the rule is Adam.
    """
    apply = tl.full((), 1.0, tl.float64)
    if DECIDE:
        apply = _decide(verdict, partial, partials, found_inf, loss_scale,
                        FOUND_INF, LOSS_SCALE, CLIP, SKIP)  # fmt: skip
    elif JUDGED:
        apply = tl.load(verdict + _APPLY)
    for start in range(0, count, 32):
        at = start + tl.arange(0, 32)
        _count(counters + at * 3, at < count, apply, numbers, sources,
               scalars + at * _SCALAR_COUNT, ADAM)  # fmt: skip


@triton.jit
def _decide(
    verdict: tl.tensor,
    partial: tl.tensor,
    partials: tl.tensor,
    found_inf: tl.tensor,
    loss_scale: tl.tensor,
    FOUND_INF: tl.constexpr,
    LOSS_SCALE: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
) -> tl.tensor:
    """Write the verdict; returns whether the step is applied."""
    apply = tl.full((), 1.0, tl.float64)
    scale = tl.full((), 1.0, tl.float64)
    if FOUND_INF:
        apply = tl.where(tl.load(found_inf) == 0, apply, 0.0)
    if LOSS_SCALE:
        scale = scale / tl.load(loss_scale).to(tl.float64)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, partials, 1024):
        at = start + tl.arange(0, 1024)
        total += tl.sum(tl.load(partial + at, mask=at < partials, other=0.0), axis=0)
    total = total * (scale * scale)
    norm = tl.sqrt(total)
    if SKIP:
        apply = tl.where(total - total == 0, apply, 0.0)
    if CLIP:
        clipped = tl.load(verdict + _MAX_NORM) / (norm + 1e-6)
        scale = scale * tl.where(clipped > 1.0, 1.0, clipped)  # NaN stays
    tl.store(verdict + _SCALE, scale)
    tl.store(verdict + _APPLY, apply)
    tl.store(verdict + _NORM, norm)
    tl.store(verdict + _SKIPPED, tl.load(verdict + _SKIPPED) + (1.0 - apply))
    return apply


@triton.jit
def _count(
    counter: tl.tensor,
    inside: tl.tensor,
    apply: tl.tensor,
    numbers: tl.tensor,
    sources: tl.tensor,
    to: tl.tensor,
    ADAM: tl.constexpr,
) -> None:
    """Count the step of some rows and compute its scalars."""
    address = tl.load(counter, mask=inside, other=0)
    double = inside & (tl.load(counter + 1, mask=inside, other=0) != 0)
    single = inside & (double == 0)
    as_double = address.to(tl.pointer_type(tl.float64))
    as_single = address.to(tl.pointer_type(tl.float32))
    before = tl.load(as_double, mask=double, other=0.0)
    before += tl.load(as_single, mask=single, other=0.0).to(tl.float64)
    step = before + 1.0
    if apply != 0:
        tl.store(as_double, step, mask=double)
        tl.store(as_single, step.to(tl.float32), mask=single)
    group = tl.load(counter + 2, mask=inside, other=0) * _GROUP
    number, source = numbers + group, sources + group
    lr = _number(number, source, 0, inside)
    base_lr = _number(number, source, 1, inside)
    weight_decay = _number(number, source, 2, inside)
    policy = _number(number, source, 3, inside)
    share = tl.where(policy == 1, lr * weight_decay, 0.0)
    share = tl.where(policy == 2, lr / base_lr * weight_decay, share)
    share = tl.where(policy == 3, lr * (lr / base_lr) * weight_decay, share)
    share = tl.where(lr > 0, share, 0.0)  # negative where a schedule misses 0 by its rounding
    zero = tl.zeros_like(lr)
    tl.store(to, lr, mask=inside)
    tl.store(to + 1, share, mask=inside)
    tl.store(to + 2, tl.where(policy == 0, weight_decay, 0.0), mask=inside)
    tl.store(to + 3, _number(number, source, 4, inside), mask=inside)
    tl.store(to + 4, 1.0 - 2.0 * _number(number, source, 5, inside), mask=inside)
    if ADAM:
        _adam(number, source, inside, lr, step, to)
    else:
        momentum = _number(number, source, 11, inside)
        first = step == 1
        tl.store(to + 11, momentum, mask=inside)
        tl.store(to + 12, tl.where(first, zero, momentum), mask=inside)
        dampening = _number(number, source, 12, inside)
        tl.store(to + 13, tl.where(first, 1.0, 1.0 - dampening), mask=inside)
        tl.store(to + 14, _number(number, source, 13, inside), mask=inside)
    tl.store(to + 15, step, mask=inside)
    seed = _number(number, source, 6, inside)
    key = epoch_key(seed.to(tl.uint64), step.to(tl.uint64))
    tl.store(to + 16, seed, mask=inside)
    tl.store(to + 17, (key & 0xFFFFFFFF).to(tl.float64), mask=inside)
    tl.store(to + 18, (key >> 32).to(tl.float64), mask=inside)


@triton.jit
def _adam(
    number: tl.tensor,
    source: tl.tensor,
    inside: tl.tensor,
    lr: tl.tensor,
    step: tl.tensor,
    to: tl.tensor,
) -> None:
    beta1 = _number(number, source, 7, inside)
    beta2 = _number(number, source, 8, inside)
    corrected = _number(number, source, 10, inside) != 0
    bias_correction1 = tl.where(corrected, 1.0 - _power(beta1, step), 1.0)
    bias_correction2 = tl.where(corrected, 1.0 - _power(beta2, step), 1.0)
    tl.store(to + 5, 1.0 - beta1, mask=inside)
    tl.store(to + 6, beta2, mask=inside)
    tl.store(to + 7, 1.0 - beta2, mask=inside)
    tl.store(to + 8, _number(number, source, 9, inside), mask=inside)
    tl.store(to + 9, lr / bias_correction1, mask=inside)
    tl.store(to + 10, tl.sqrt(bias_correction2), mask=inside)


@triton.jit
def _number(
    number: tl.tensor, source: tl.tensor, column: tl.constexpr, inside: tl.tensor
) -> tl.tensor:
    """Read a hyperparameter of each row, from the table or from the tensor that it is."""
    value = tl.load(number + column, mask=inside, other=1.0)
    address = tl.load(source + column, mask=inside, other=0)
    single = (address > 0) & inside
    double = (address < 0) & inside
    from_single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=single, other=0.0)
    from_double = tl.load((-address).to(tl.pointer_type(tl.float64)), mask=double, other=0.0)
    value = tl.where(single, from_single.to(tl.float64), value)
    return tl.where(double, from_double, value)


@triton.jit
def _power(beta: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Return betaᵗ; β = 0 gives 0."""
    return tl.exp2(step * tl.log2(beta))
