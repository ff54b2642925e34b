"""The update rules in Triton, in the order of `ebbtide.reference` and `csrc/update.h`.

Float32 contracts a product and a sum exactly where the CPU's kernels with fma do, through `tl.fma`,
and nowhere else (launched with `enable_fp_fusion=False`); roots and quotients are rounded to
nearest. Triton's interpreter does not contract: there the arithmetic is that of the CPU's baseline
instruction set. Float64 never contracts.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["adam", "sgd"]

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
def _madd(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    return a * b + c if c.dtype == tl.float64 else tl.fma(a, b, c)


@triton.jit
def _sqrt(x: tl.tensor) -> tl.tensor:
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _quotient(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _decayed(param: tl.tensor, update: tl.tensor, s: tl.tensor) -> tl.tensor:
    keep = (1.0 - tl.load(s + _DECAY)).to(param.dtype)
    # Not `< 0`: a product that the CPU flushes to zero does not forbid the decay.
    if param.dtype == tl.float64:
        away = update * param <= -2.2250738585072014e-308
    else:
        away = update * param <= -1.1754943508222875e-38
    keep_away = tl.where(tl.load(s + _CAUTIOUS) != 0, 1.0, keep)
    return param * tl.where(away, keep_away, keep)


@triton.jit
def _with_l2(param: tl.tensor, grad: tl.tensor, s: tl.tensor) -> tl.tensor:
    l2 = tl.load(s + _L2).to(param.dtype)
    return tl.where(l2 != 0, _madd(l2, param, grad), grad)


@triton.jit
def adam(
    param: tl.tensor,
    grad: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    maximum: tl.tensor,
    s: tl.tensor,
    MAXIMUM: tl.constexpr,
) -> tl.tensor:
    """Adam, AdamW, AMSGrad: returns the parameter, its state, and the witness of `update.h`."""
    grad = _with_l2(param, grad, s)
    weight = tl.load(s + _EXP_AVG_WEIGHT).to(param.dtype)
    below = weight < 0.5
    exp_avg = _madd(
        tl.where(below, weight, weight - 1.0), grad - exp_avg, tl.where(below, exp_avg, grad)
    )
    share = tl.load(s + _ONE_MINUS_BETA2).to(param.dtype)
    exp_avg_sq = _madd(share * grad, grad, tl.load(s + _BETA2).to(param.dtype) * exp_avg_sq)
    second_moment = exp_avg_sq
    if MAXIMUM:
        second_moment = tl.where(maximum < exp_avg_sq, exp_avg_sq, maximum)
    root = _quotient(
        _sqrt(second_moment),
        tl.broadcast_to(tl.load(s + _SQRT_BIAS_CORRECTION2).to(param.dtype), param.shape),
    )
    denom = root + tl.load(s + _EPS).to(param.dtype)
    update = _quotient(tl.load(s + _STEP_SIZE).to(param.dtype) * exp_avg, denom)
    update = tl.where(denom == 0, tl.zeros_like(update), update)
    param = _decayed(param, update, s) - update
    return param, exp_avg, exp_avg_sq, second_moment, exp_avg_sq


@triton.jit
def sgd(
    param: tl.tensor,
    grad: tl.tensor,
    momentum_buffer: tl.tensor,
    s: tl.tensor,
    BUFFER: tl.constexpr,
) -> tl.tensor:
    """SGD, SGDW: returns the parameter, its buffer, and the witness of `update.h`."""
    grad = _with_l2(param, grad, s)
    direction = grad
    if BUFFER:
        keep = tl.load(s + _BUFFER_KEEP).to(param.dtype)
        add = tl.load(s + _BUFFER_ADD).to(param.dtype)
        momentum_buffer = _madd(add, grad, keep * momentum_buffer)
        ahead = _madd(tl.load(s + _MOMENTUM).to(param.dtype), momentum_buffer, grad)
        direction = tl.where(tl.load(s + _NESTEROV) != 0, ahead, momentum_buffer)
    lr = tl.load(s + _LR).to(param.dtype)
    kept = _decayed(param, lr * direction, s)
    return _madd(-lr, direction, kept), momentum_buffer, direction
