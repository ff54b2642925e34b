"""The update rules in Triton, in the order of `ebbtide.reference` and `csrc/update.h`.

A product and a sum are contracted exactly where the CPU's kernels with fma do it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ebbtide.backends.triton.arithmetic import (
    difference,
    fused,
    product,
    quotient,
    root,
    total,
    usual_share,
)

__all__ = ["adam_moments", "adam_param", "are_usual", "sgd"]

# Columns of the scalars: ebbtide.rules.Scalars.
_LR = tl.constexpr(0)
_DECAY = tl.constexpr(1)
_L2 = tl.constexpr(2)
_CAUTIOUS = tl.constexpr(3)
_EXP_AVG_WEIGHT = tl.constexpr(5)
_BETA2 = tl.constexpr(6)
_ONE_MINUS_BETA2 = tl.constexpr(7)
_EPS = tl.constexpr(8)
_STEP_SIZE = tl.constexpr(9)
_SQRT_BIAS_CORRECTION2 = tl.constexpr(10)
_MOMENTUM = tl.constexpr(11)
_BUFFER_KEEP = tl.constexpr(12)
_BUFFER_ADD = tl.constexpr(13)
_NESTEROV = tl.constexpr(14)


@triton.jit
def _decayed(param: tl.tensor, update: tl.tensor, s: tl.tensor, PLAIN: tl.constexpr) -> tl.tensor:
    keep = (1.0 - tl.load(s + _DECAY)).to(param.dtype)
    if not PLAIN:
        keep_away = tl.where(tl.load(s + _CAUTIOUS) != 0, 1.0, keep)
        keep = tl.where(product(update, param) < 0, keep_away, keep)
    return product(param, keep)


@triton.jit
def _with_l2(param: tl.tensor, grad: tl.tensor, s: tl.tensor, PLAIN: tl.constexpr) -> tl.tensor:
    if not PLAIN:
        l2 = tl.load(s + _L2).to(param.dtype)
        grad = tl.where(l2 != 0, fused(l2, param, grad), grad)
    return grad


@triton.jit
def adam_moments(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    maximum: tl.tensor,
    s: tl.tensor,
    MAXIMUM: tl.constexpr,
    PLAIN: tl.constexpr,
) -> tl.tensor:
    """Adam, AdamW, AMSGrad: returns both moments, and the larger of the second and its maximum."""
    grad = _with_l2(param, grad, s, PLAIN)
    weight = tl.load(s + _EXP_AVG_WEIGHT).to(param.dtype)
    if PLAIN:
        exp_avg = fused(weight, difference(grad, exp_avg), exp_avg)
    else:
        below = weight < 0.5
        exp_avg = fused(
            tl.where(below, weight, weight - 1.0), difference(grad, exp_avg),
            tl.where(below, exp_avg, grad),
        )  # fmt: skip
    share = tl.load(s + _ONE_MINUS_BETA2).to(param.dtype)
    kept = product(exp_avg_sq, tl.load(s + _BETA2).to(param.dtype))
    exp_avg_sq = fused(product(grad, share), grad, kept)
    second_moment = exp_avg_sq
    if MAXIMUM:
        second_moment = tl.where(maximum < exp_avg_sq, exp_avg_sq, maximum)
    return exp_avg, exp_avg_sq, second_moment


@triton.jit
def are_usual(param: tl.tensor, first: tl.tensor, second: tl.tensor, s: tl.tensor) -> tl.tensor:
    """Tell whether a tile needs no care: as good as always, but where gradients are zero for long.

    First moments lie from 2⁻⁷⁰ to 2⁴⁰, second ones from 2⁻⁸⁴ to 2²⁶, parameters below 2⁴⁰, and the
    scalars such that nothing of a step comes near the smallest or the largest numbers.
    """
    param = (param.to(tl.int32, bitcast=True) & 0x7FFFFFFF) - (57 << 23)
    first = (first.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) - (57 << 23)
    second = second.to(tl.uint32, bitcast=True) - (43 << 23)
    largest = tl.maximum(tl.maximum(first, second), tl.maximum(param, 0).to(tl.uint32))
    largest = tl.max(tl.max(largest, axis=1), axis=0)
    step_size = tl.load(s + _STEP_SIZE)
    allowed = (step_size >= 1e-8) & (step_size <= 1e3) & (tl.load(s + _EPS) <= 1)
    return (largest < (110 << 23)) & allowed & (tl.load(s + _SQRT_BIAS_CORRECTION2) >= 1e-6)


@triton.jit
def adam_param(
    param: tl.tensor,
    exp_avg: tl.tensor,
    second_moment: tl.tensor,
    s: tl.tensor,
    PLAIN: tl.constexpr,
    USUAL: tl.constexpr,
) -> tl.tensor:
    """Return the parameter after a step of Adam; USUAL where `are_usual` of a plain step."""
    correction = tl.load(s + _SQRT_BIAS_CORRECTION2).to(param.dtype)
    eps = tl.load(s + _EPS).to(param.dtype)
    size = root(second_moment, USUAL)
    if USUAL:
        denom = total(usual_share(size, correction), eps)
    else:
        denom = total(quotient(size, correction), eps)
    update = product(exp_avg, tl.load(s + _STEP_SIZE).to(param.dtype))
    update = quotient(update, denom, USUAL)
    if not PLAIN:
        update = tl.where(denom == 0, tl.zeros_like(update), update)
    return difference(_decayed(param, update, s, PLAIN), update)


@triton.jit
def sgd(
    param: tl.tensor,
    grad: tl.tensor,
    momentum_buffer: tl.tensor,
    s: tl.tensor,
    BUFFER: tl.constexpr,
    PLAIN: tl.constexpr,
) -> tl.tensor:
    """SGD, SGDW: returns the parameter, its buffer, and the witness of `update.h`."""
    grad = _with_l2(param, grad, s, PLAIN)
    direction = grad
    if BUFFER:
        keep = tl.load(s + _BUFFER_KEEP).to(param.dtype)
        add = tl.load(s + _BUFFER_ADD).to(param.dtype)
        momentum_buffer = fused(add, grad, product(momentum_buffer, keep))
        ahead = fused(tl.load(s + _MOMENTUM).to(param.dtype), momentum_buffer, grad)
        direction = tl.where(tl.load(s + _NESTEROV) != 0, ahead, momentum_buffer)
    lr = tl.load(s + _LR).to(param.dtype)
    kept = _decayed(param, product(direction, lr), s, PLAIN)
    return fused(-lr, direction, kept), momentum_buffer, direction
