"""What one step did to a sample of the elements of a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ebbtide.torch.ranks import local_of
from ebbtide.torch.storage import plain

__all__ = ["Numbers", "Snapshot", "Sums", "measure"]

# NumPy for what is done with them: torch's threads would cost more than the sample is worth.
Numbers = NDArray[np.float64]

# With fewer elements than this the update's own coefficient is not fitted but taken to be 1.
_FEWEST_FITTED = 10
# The same where update and parameter are this close to parallel: a fit cannot part them.
_PARALLEL = 1.0 - 1e-6


class Sums(NamedTuple):
    """Sums over elements; each sampled one stands for as many as the sample leaves out.

    θ is the parameter before the step, z the part of it that decays (all of it unless the decay
    is cautious), u the update, d the share that the step should remove.
    """

    elements: float
    theta: float  # Σ θ²
    decayed: float  # Σ z²
    realised: float  # Σ z², times the share of z that the step removed
    variance: float  # of `realised`
    update: float  # Σ u²
    intended: float  # Σ (d·z + u)²
    carried_out: float  # Σ (d·z + u)·(what was subtracted)
    meant_to_move: float  # elements with d·z + u ≠ 0
    unmoved: float  # those of them that are what they were

    @staticmethod
    def total(parts: Iterable[Sums]) -> Sums:
        """Add up parameters, or steps."""
        return Sums(*map(math.fsum, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Snapshot:
    """Some elements of a parameter before a step.

    Attributes:
        param: The parameter; of a distributed one the local shard is looked at.
        index: Which elements, counted along its rows; those of complex ones twice as many.
        before: Their values.
        version: Tells whether the parameter has been written since.
    """

    param: torch.Tensor
    index: NDArray[np.int64]
    before: Numbers
    version: int

    @classmethod
    def take(cls, param: torch.Tensor, most: int, generator: np.random.Generator) -> Snapshot:
        """Look at up to `most` elements: one at random from each of that many equal pieces."""
        elements = _real(param)
        count = elements.numel()
        index = np.arange(min(count, most))
        if count > most:
            pieces = (index + generator.random(most)) * (count / most)
            index = np.minimum(pieces.astype(np.int64), count - 1)
        return cls(param, index, _take(elements, index), _version(param))

    @property
    def was_stepped(self) -> bool:
        """Whether a step that was not skipped has reached the parameter."""
        # torch's fused steps leave the version as it was; steps inside backward free the gradient.
        return self.param.grad is not None or _version(self.param) != self.version


def measure(
    snapshot: Snapshot, state: Mapping[str, Any], group: Mapping[str, Any], scale: float
) -> tuple[Sums, Numbers | None] | None:
    """Compare what a step did with what it should have done.

    The update u is computed in float64 from the state after the step; where there is no momentum,
    from the gradient. Then what was subtracted from θ is split by least squares into a part along
    z and a part along u:

        θ_before - θ_after ≈ a·z + b·u

    a is the share of z that the step removed. Fitting b beside it keeps an update that was lost
    in rounding, or scaled, from being taken for decay.

    Args:
        snapshot: From before the step.
        state: Of the parameter, after the step.
        group: Hyperparameters as numbers, with `decay_policy`, and `share`, what the step should
            remove of θ beside its update.
        scale: What the step multiplied the gradient by.

    Returns:
        The sums, and √v̂ of the elements where there is a second moment; None where the parameter
        has no elements here or its state is not in plain numbers.
    """
    found = _update(snapshot, state, group, scale)
    if found is None or not len(snapshot.before):
        return None
    update, gradient_scale = found
    before = snapshot.before
    subtracted = before - _take(_real(snapshot.param), snapshot.index)
    decayed = before
    if group.get("cautious"):
        decayed = before * (update * before >= 0)
    share, variance = _fit(decayed, update, subtracted)
    intended = group["share"] * decayed + update
    meant = intended != 0
    norm = _dot(decayed, decayed)
    weight = _real(snapshot.param).numel() / len(before)
    sums = Sums(
        elements=len(before),
        theta=_dot(before, before),
        decayed=norm,
        realised=norm * share,
        variance=weight * norm**2 * variance,
        update=_dot(update, update),
        intended=_dot(intended, intended),
        carried_out=_dot(intended, subtracted),
        meant_to_move=float(meant.sum()),
        unmoved=float((meant & (subtracted == 0)).sum()),
    )
    return Sums(*(weight * value for value in sums)), gradient_scale


def _fit(decayed: Numbers, update: Numbers, subtracted: Numbers) -> tuple[float, float]:
    """Return the share of `decayed` that was subtracted, and the variance of that number.

    The variance is that of rounding, which differs from element to element (White's estimate).
    """
    size, update_size = (math.sqrt(_dot(each, each)) for each in (decayed, update))
    if size == 0 or not math.isfinite(size + update_size):
        return 0.0, 0.0
    along = decayed / size
    other = update / update_size if update_size > 0 else update
    cosine = _dot(along, other)
    influence, rest, fitted = along, subtracted - update, 1
    if update_size > 0 and len(decayed) >= _FEWEST_FITTED and abs(cosine) < _PARALLEL:
        # What each direction has that the other has not.
        influence, counterpart = (
            (mine - cosine * its) / (1.0 - cosine**2)
            for mine, its in ((along, other), (other, along))
        )
        rest, fitted = subtracted - _dot(counterpart, subtracted) * other, 2
    share = _dot(influence, rest)
    scatter = influence * (rest - share * along)
    freedom = max(len(decayed) - fitted, 1) / len(decayed)
    return share / size, _dot(scatter, scatter) / freedom / size**2


def _dot(left: Numbers, right: Numbers) -> float:
    return float((left * right).sum())


def _update(
    snapshot: Snapshot, state: Mapping[str, Any], group: Mapping[str, Any], scale: float
) -> tuple[Numbers, Numbers | None] | None:
    """Return u and √v̂ of the elements; None where the state does not tell."""
    state = plain(state)

    def elements(key: str) -> Numbers | None:
        tensor = state.get(key)
        if not isinstance(tensor, torch.Tensor) or tensor.shape != snapshot.param.shape:
            return None
        return _take(_real(tensor), snapshot.index)

    lr = float(group["lr"])
    if "betas" not in group:
        direction = _sgd_direction(snapshot, elements("momentum_buffer"), group, scale)
        return None if direction is None else (lr * direction, None)
    exp_avg = elements("exp_avg")
    exp_avg_sq = elements("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    if exp_avg is None or exp_avg_sq is None:
        return None
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    corrected = group.get("bias_correction", True)
    bias_correction1 = 1.0 - beta1**step if corrected else 1.0
    bias_correction2 = 1.0 - beta2**step if corrected else 1.0
    root = np.sqrt(exp_avg_sq / bias_correction2)
    denom = root + float(group["eps"])
    update = np.zeros_like(denom)
    np.divide(lr / bias_correction1 * exp_avg, denom, out=update, where=denom > 0)
    return update, root


def _sgd_direction(
    snapshot: Snapshot, buffer: Numbers | None, group: Mapping[str, Any], scale: float
) -> Numbers | None:
    momentum = float(group["momentum"])
    if momentum != 0 and not group["nesterov"]:
        return buffer
    grad = snapshot.param.grad
    if grad is None or grad.is_sparse or local_of(grad).shape != local_of(snapshot.param).shape:
        return None
    direction = scale * _take(_real(grad), snapshot.index)
    if group["maximize"]:
        direction = -direction
    if group["decay_policy"] == "l2":
        direction = direction + float(group["weight_decay"]) * snapshot.before
    if momentum == 0:
        return direction
    return None if buffer is None else direction + momentum * buffer


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor as real numbers."""
    local = local_of(tensor.detach())
    return torch.view_as_real(local.resolve_conj()) if local.is_complex() else local


def _take(tensor: torch.Tensor, index: NDArray[np.int64]) -> Numbers:
    """Return elements of a tensor of any layout, touching no others."""
    if not tensor.is_contiguous():
        places = np.unravel_index(index, tuple(tensor.shape))
        steps = zip(places, tensor.stride(), strict=True)
        index = sum((place * step for place, step in steps), start=np.zeros_like(index))
        extent = 1 + sum(
            (n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
        )
        tensor = tensor.as_strided((extent,), (1,))
    chosen = torch.from_numpy(index).to(tensor.device)
    taken: Numbers = tensor.flatten().index_select(0, chosen).cpu().double().numpy()
    return taken


def _version(param: torch.Tensor) -> int:
    # Steps on the local shard of a DTensor do not always reach the counter of the whole.
    local = local_of(param)
    return param._version + (0 if local is param else local._version)
