"""The rules in vectorised torch operations: right wherever torch runs, and differentiable.

The path for what the compiled kernels do not take: other devices, `differentiable=True`, steps
captured in a graph, tensor subclasses, sparse gradients. The lines follow `reference.py`; float64
differs from it by torch's square root, which now and then is an ulp off. Nothing here waits for a
device, unless the caller asks for the counts of elements left untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbtide.rules import Rule, Scalars

__all__ = ["TensorRow", "Verdict", "run", "sum_squares", "tensor_scalars"]

_LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class TensorRow:
    """One parameter with its gradient and state, as tensors.

    Attributes:
        entry: Index in `Plan.entries`.
        group: Index of its param group.
        name: What the parameter is called in errors.
        state: The optimizer's state of this parameter; written.
        keys: Of the state arrays, in the order of `Rule.state_keys`.
        count: Steps taken, where the state has no count.
        differentiable: Keep the autograd graph of the update.
        capturable: The step may be part of a graph: nothing may wait for the device.
        salt: Of the parameter's name, for the random bits.
        offset: Index of the first element in the whole parameter, where this is a shard of it.
        stochastic: Round a 16-bit parameter stochastically, not to nearest.
    """

    entry: int
    group: int
    name: str
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    keys: tuple[str, ...]
    count: int = 0
    differentiable: bool = False
    capturable: bool = False
    salt: int = 0
    offset: int = 0
    stochastic: bool = True

    @property
    def counts_on_device(self) -> bool:
        """Whether the step count must not be read."""
        return self.capturable or ("step" in self.state and not self.state["step"].is_cpu)

    def next_step(self) -> Any:
        """Return the 1-based count of the step about to be taken; a tensor if on the device."""
        if "step" not in self.state:
            return self.count + 1
        step = self.state["step"]
        return step + 1 if self.counts_on_device else int(step) + 1


@dataclass(frozen=True)
class Verdict:
    """What is decided of a step before it begins; tensors where no device may be waited for.

    Attributes:
        scale: Multiplies every gradient.
        apply: Whether the step happens at all.
        norm: Global norm of the gradients, `None` if nobody asked.
    """

    scale: float | Tensor = 1.0
    apply: bool | Tensor = True
    norm: float | Tensor | None = None


def tensor_scalars(rule: Rule, group: Mapping[str, Any], step: Any) -> Scalars:
    """Compute the scalars of one step from hyperparameters that are tensors, without reading them.

    Args:
        rule: The update rule.
        group: Hyperparameters, numbers or tensors of one element.
        step: 1-based count of the step about to be taken, a number or a tensor.

    Returns:
        `Scalars` whose fields are numbers or 0-dim tensors.
    """
    lr, base_lr = _scalar(group["lr"]), group["base_lr"]
    weight_decay = _scalar(group["weight_decay"])
    share: Any = 0.0
    if group["decay_policy"] == "decoupled":
        share = lr * weight_decay
    elif group["decay_policy"] == "independent":
        share = (lr / base_lr) * weight_decay
    elif group["decay_policy"] == "corrected":
        share = lr * (lr / base_lr) * weight_decay
    common: dict[str, Any] = {
        "lr": lr,
        "decay": share * (lr > 0),  # negative where a schedule misses 0 by its rounding
        "l2": weight_decay if group["decay_policy"] == "l2" else 0.0,
        "cautious": float(group["cautious"]),
        "grad_scale": -1.0 if group["maximize"] else 1.0,
        "step": step,
        "seed": float(group["seed"]),
    }
    if rule.name == "sgd":
        first, momentum = step == 1, group["momentum"]
        return Scalars(
            **common,
            momentum=momentum,
            buffer_keep=0.0 if first else momentum,
            buffer_add=1.0 if first else 1.0 - group["dampening"],
            nesterov=float(group["nesterov"]),
        )
    beta1, beta2 = (_scalar(beta) for beta in group["betas"])
    corrected = group["bias_correction"]
    return Scalars(
        **common,
        exp_avg_weight=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=group["eps"],
        step_size=lr / (1 - beta1**step) if corrected else lr,
        sqrt_bias_correction2=_sqrt(1 - beta2**step) if corrected else 1.0,
    )


def sum_squares(grads: Sequence[Tensor], *, finite_only: bool = False) -> Tensor:
    """Return the sum of squares of all gradients, a float64 tensor (float32 where there is none).

    Args:
        grads: The gradients; any device and layout.
        finite_only: Leave out elements that are not finite, or whose square is not.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        sums.setdefault(grad.device, []).append(_sum_of_squares(grad, finite_only))
    totals = [torch.stack(each).sum() for each in sums.values()]
    # On the host where a gradient is: a device can be waited for, but has nothing to wait for.
    home = min(sums, key=lambda device: device.type != "cpu")
    return torch.stack([each.to(home) for each in totals]).sum()


def _sum_of_squares(grad: Tensor, finite_only: bool) -> Tensor:
    squares = _wide(_values(grad)).square()
    if finite_only:
        squares = torch.where(torch.isfinite(squares), squares, 0.0)
    return squares.sum()


def run(
    rule: Rule,
    rows: Sequence[TensorRow],
    scalars_of: Callable[[TensorRow], Scalars],
    verdict: Verdict,
    *,
    guard: bool,
    counted: bool,
) -> list[tuple[int, int]]:
    """Take one step of every row.

    Args:
        rule: The update rule.
        rows: Already checked.
        scalars_of: The scalars of a row for the step about to be taken.
        verdict: The scale of the gradients, and whether the step happens.
        guard: Leave elements untouched whose new state would not be finite.
        counted: Report how many those were; it waits for the device.

    Returns:
        (entry, elements left untouched) of the rows that have any.
    """
    # All scalars first: whatever can be refused is refused before anything is written.
    scalars = [scalars_of(row) for row in rows]
    counts = []
    for row, each in zip(rows, scalars, strict=True):
        spoilt = _step(rule, row, each, verdict, guard)
        if spoilt is not None and counted:
            counts.append((row.entry, spoilt))
    return [(entry, int(count)) for entry, count in counts if int(count)]


def _step(rule: Rule, row: TensorRow, s: Scalars, verdict: Verdict, guard: bool) -> Tensor | None:
    """Step one row; the number of elements left untouched, if somebody guards."""
    if row.grad.is_sparse:
        return _step_sparse(row, s, verdict)
    stored = [row.param, *(_local(row.state[key]) for key in row.keys)]
    # A clone, since autograd may need the old parameter, which is about to be overwritten.
    old = [_working(_plain(each.clone() if row.differentiable else each)) for each in stored]
    grad = _working(_plain(row.grad)) * _on(s.grad_scale * verdict.scale, row.grad)
    new, witness = (_adam if rule.name == "adam" else _sgd)(old, grad, s)
    spoilt = None
    if guard:
        finite = torch.isfinite(witness.detach())
        new = [torch.where(finite, each, was) for each, was in zip(new, old, strict=True)]
        spoilt = finite.logical_not().sum()
    if verdict.apply is not True:
        keep = torch.as_tensor(verdict.apply, device=grad.device)
        new = [torch.where(keep, each, was) for each, was in zip(new, old, strict=True)]
    _write(row, stored, new, s)
    if "step" in row.state:
        row.state["step"].add_(1 if verdict.apply is True else verdict.apply)
    return spoilt


def _adam(old: list[Tensor], grad: Tensor, s: Scalars) -> tuple[list[Tensor], Tensor]:
    param, exp_avg, exp_avg_sq, *maximum = old
    if _nonzero(s.l2):
        grad = grad + s.l2 * param
    weight: Any = s.exp_avg_weight
    if isinstance(weight, Tensor):
        exp_avg = torch.lerp(exp_avg, grad, weight.to(grad))
    elif weight < 0.5:
        exp_avg = exp_avg + weight * (grad - exp_avg)
    else:
        exp_avg = grad + (weight - 1) * (grad - exp_avg)
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    second_moment = exp_avg_sq
    if maximum:
        second_moment = torch.maximum(maximum[0], exp_avg_sq)
    denom = second_moment.sqrt() / s.sqrt_bias_correction2 + s.eps
    zero = denom == 0
    update = (s.step_size * exp_avg / denom.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)
    param = _decayed(param, update, s) - update
    return [param, exp_avg, exp_avg_sq, *([second_moment] if maximum else [])], exp_avg_sq


def _sgd(old: list[Tensor], grad: Tensor, s: Scalars) -> tuple[list[Tensor], Tensor]:
    param, *buffers = old
    if _nonzero(s.l2):
        grad = grad + s.l2 * param
    direction = grad
    if buffers:
        buffers = [s.buffer_keep * buffers[0] + s.buffer_add * grad]
        direction = grad + s.momentum * buffers[0] if s.nesterov else buffers[0]
    update = s.lr * direction
    return [_decayed(param, update, s) - update, *buffers], direction


def _decayed(param: Tensor, update: Tensor, s: Scalars) -> Tensor:
    if not _nonzero(s.decay):
        return param
    kept = param * (1 - s.decay)
    return torch.where(update * param < 0, param, kept) if s.cautious else kept


def _step_sparse(row: TensorRow, s: Scalars, verdict: Verdict) -> Tensor:
    """Step plain SGD where the gradient has elements; decoupled decay reaches every element."""
    grad = row.grad.coalesce()
    values = grad.values() * _on(s.grad_scale * verdict.scale, row.grad)
    finite = torch.isfinite(values)
    if _nonzero(s.decay):
        row.param.mul_(1 - s.decay)
    # Scaled before it is added: `alpha` must not be a tensor.
    update = (values * s.lr).masked_fill(~finite, 0.0)
    row.param.sub_(
        torch.sparse_coo_tensor(grad.indices(), update, grad.shape, check_invariants=False)
    )
    if "step" in row.state:
        row.state["step"].add_(1)
    return finite.logical_not().sum()


def _write(row: TensorRow, stored: list[Tensor], new: list[Tensor], s: Scalars) -> None:
    for index, (target, value) in enumerate(zip(stored, new, strict=True)):
        if row.differentiable:
            value = value.to(target.real.dtype)
        elif target.dtype in _LOW_PRECISION:
            # The first moment is rounded to nearest; moments of squares would stall that way.
            nearest = index == 1 or (index == 0 and not row.stochastic)
            bits = None if nearest else _element_bits(row, s, value, state=index > 0)
            value = _rounded(value.float(), target.dtype, bits)
        if target.is_complex():
            value = torch.view_as_complex(value)
        if index > 0 and row.differentiable:
            row.state[row.keys[index - 1]] = value
        else:
            target.copy_(value)


def _local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this process holds; another tensor itself."""
    local: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _element_bits(row: TensorRow, s: Scalars, like: Tensor, *, state: bool) -> Tensor:
    """Return 32 random bits for each element: `codecs.dither_bits`, vectorised."""
    step, seed = _whole(s.step, like.device), _whole(s.seed, like.device)
    key = _mix(_mix(seed) ^ _mix((step >> 7) * _signed(0xD1342543DE82EF95)) ^ _signed(row.salt))
    first, lead = divmod(row.offset, 128)
    stop = lead + like.numel()
    blocks = torch.arange(first, first - (-stop // 128), device=like.device)
    hashes = _mix(key ^ (blocks << 1))
    halves = _shifted(hashes, 32) if state else hashes & 0xFFFFFFFF
    words = (halves + step * 0x9E376A09) & 0xFFFFFFFF
    bits = words[:, None] ^ _lanes(like.device)
    return bits.reshape(-1)[lead:stop].reshape(like.shape)


def _whole(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device, torch.int64)
    return torch.full((), int(number), dtype=torch.int64, device=device)


def _lanes(device: torch.device) -> Tensor:
    """Return `codecs.lane_constant` of every lane, computed there: a copy would be waited for."""
    lane = torch.arange(128, device=device)
    reversed_lane = torch.zeros_like(lane)
    for bit in range(7):
        reversed_lane |= ((lane >> bit) & 1) << (6 - bit)
    filling = _mix(lane)
    upper = (reversed_lane << 9) | _shifted(filling, 55)
    return (upper << 16) | ((lane * 85 & 127) << 9) | (filling & 511)


def _mix(x: Tensor) -> Tensor:
    """Mix 64 bits as `codecs` does; int64 wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def _rounded(x: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """Round float32 to 16 bits, stochastically with `bits`; finite numbers stay finite."""
    limit = torch.finfo(dtype).max
    infinite = torch.isinf(x)
    x = torch.where(infinite, x, x.clamp(-limit, limit))
    if bits is None:
        return x.to(dtype)
    kept = 16 if dtype == torch.bfloat16 else 13
    magnitude = x.view(torch.int32).long() & 0x7FFFFFFF
    add = bits >> (32 - kept)
    up = ((magnitude + add) >> kept << kept).to(torch.int32).view(torch.float32)
    if dtype == torch.float16:  # below 2⁻¹⁴: a multiple of 2⁻²⁴
        small = torch.floor(x.abs() * 2.0**24 + add * 2.0**-13) * 2.0**-24
        up = torch.where(x.abs() < 2.0**-14, small, up)
    up = torch.where(torch.isfinite(x), up.clamp(max=limit), x.abs())
    return torch.copysign(up, x).to(dtype)


def _on(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.device) if isinstance(value, Tensor) else value


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor as real numbers that lie as they read; a view where that is possible."""
    tensor = tensor.resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _working(tensor: Tensor) -> Tensor:
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        tensor = tensor * 1  # subclasses know arithmetic; what it gives takes any operation
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _values(grad: Tensor) -> Tensor:
    return _plain(grad.coalesce().values() if grad.is_sparse else grad)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _scalar(value: Any) -> Any:
    return value.squeeze() if isinstance(value, Tensor) else value


def _sqrt(value: Any) -> Any:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _nonzero(value: Any) -> bool:
    """Whether a term has to be computed; that of a tensor always is, for it must not be read."""
    return isinstance(value, Tensor) or value != 0
