"""How near low-bit state comes to exact Adam, on the gradients of models in training.

    python -m benchmarks.fidelity --out fidelity.json

A model is trained by torch's AdamW in float32. Its gradients also go to shadows: Adam in float64,
Ebbtide's optimizers, and the formulas of other libraries (`benchmarks/peers.py`). Each shadow keeps
moments of its own, and the update it would take is compared with the exact one. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

import ebbtide
import ebbtide.torch
from benchmarks.lessons import LESSONS
from benchmarks.peers import CODECS, EmulatedAdam
from ebbtide.lab.torch_training import one_torch_thread

Tensors = Sequence[torch.Tensor]
BETA2 = (0.95, 0.99, 0.999)
EPS = 1e-8
_SMALLEST = 4096  # elements from which on state is kept in fewer bits


class Shadow(Protocol):
    """Sees gradients and says what it would do with them."""

    def step(self, grads: Tensors) -> Tensors:
        """Return the updates, to be multiplied by lr and subtracted."""

    def second_moments(self) -> Tensors:
        """Return what is kept of the second moments."""


class Exact:
    """Adam in float64."""

    def __init__(self, shapes: list[torch.Size], betas: tuple[float, float], eps: float) -> None:
        self._betas, self._eps, self._step = betas, eps, 0
        self._m, self._v = ([torch.zeros(s, dtype=torch.float64) for s in shapes] for _ in "mv")

    def step(self, grads: Tensors) -> list[torch.Tensor]:
        self._step += 1
        beta1, beta2 = self._betas
        updates = []
        for grad, m, v in zip(grads, self._m, self._v, strict=True):
            g = grad.double()
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            root = (v / (1 - beta2**self._step)).sqrt_().add_(self._eps)
            updates.append(m / (1 - beta1**self._step) / root)
        return updates

    def second_moments(self) -> list[torch.Tensor]:
        return self._v


class Ours:
    """Ebbtide's own kernels: the update is what a step with lr 1 takes from parameters at zero."""

    def __init__(
        self, shapes: list[torch.Size], betas: tuple[float, float], eps: float, state_format: str
    ) -> None:
        self._params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self._optimizer = ebbtide.torch.AdamW(
            self._params, lr=1.0, betas=betas, eps=eps, weight_decay=0.0, state_format=state_format
        )

    def step(self, grads: Tensors) -> list[torch.Tensor]:
        with torch.no_grad():
            for param, grad in zip(self._params, grads, strict=True):
                param.zero_()
                param.grad = grad
        self._optimizer.step()
        return [-param.detach() for param in self._params]

    def second_moments(self) -> list[torch.Tensor]:
        state = self._optimizer.state_dict(portable=True)["state"]
        return [state[index]["exp_avg_sq"] for index in range(len(self._params))]


@dataclass(frozen=True)
class Variant:
    """What is done to the gradients before any shadow sees them."""

    name: str
    change: Callable[[torch.Tensor, int, int, torch.Generator], torch.Tensor]
    eps: float = EPS


def _outlier(grad: torch.Tensor, step: int, steps: int, random: torch.Generator) -> torch.Tensor:
    changed = grad.flatten(1).clone()
    changed[:, changed.shape[1] // 3] *= 1000
    return changed.view_as(grad)


def _resting(grad: torch.Tensor, step: int, steps: int, random: torch.Generator) -> torch.Tensor:
    moves = torch.rand(len(grad), generator=random) < 0.01
    return grad * moves.view(-1, *[1] * (grad.ndim - 1))


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("as they are", lambda grad, *_: grad),
        Variant("a column × 1000", _outlier),
        Variant("rows zero 99 %", _resting),
        Variant("× 1e-6", lambda grad, *_: grad * 1e-6),
        Variant("× 1e-6, eps too", lambda grad, *_: grad * 1e-6, EPS * 1e-6),
        Variant("falling tenfold", lambda grad, step, steps, _: grad * 0.1 ** (step / steps)),
    )
}


@dataclass
class Fidelity:
    """One shadow beside the exact one, over a run.

    Attributes:
        error: ‖u − exact u‖ / ‖exact u‖, the mean over the steps, in percent.
        error_median: The median of the same.
        error_last: The median over the last quarter.
        projection: Share of the exact update that is taken: ⟨u, exact u⟩ / ‖exact u‖², the mean.
        largest: max|u| / max|exact u|, both over the run.
        largest_step: The same step by step, and the largest of that.
        drift: Median of √(v / exact v) over the elements at the end.
        drift_low: Its 5th percentile.
        drift_high: Its 95th percentile.
        zeros: Share of the elements whose v is zero at the end while the exact one is not, percent.
    """

    model: str
    beta2: float
    gradients: str
    state: str
    error: float
    error_median: float
    error_last: float
    projection: float
    largest: float
    largest_step: float
    drift: float
    drift_low: float
    drift_high: float
    zeros: float


class _Course:
    """One variant at one β2: the exact Adam, its shadows, and what has been measured of them."""

    def __init__(
        self,
        shapes: list[torch.Size],
        beta2: float,
        variant: Variant,
        steps: int,
        peers: Sequence[str],
    ) -> None:
        self.beta2, self.variant, self._steps = beta2, variant, steps
        fixed = shapes, (0.9, beta2), variant.eps
        self._exact = Exact(*fixed)
        self._shadows: dict[str, Shadow] = {
            "ebbtide 8bit": Ours(*fixed, "8bit"),
            "ebbtide bfloat16": Ours(*fixed, "bfloat16"),
            **{name: EmulatedAdam(*fixed, CODECS[name]) for name in peers},
        }
        self._random = torch.Generator().manual_seed(0)
        self._measured: dict[str, list[list[float]]] = {name: [] for name in self._shadows}

    def step(self, step: int, grads: Tensors) -> None:
        seen = [self.variant.change(g, step, self._steps, self._random) for g in grads]
        exact = _joined(self._exact.step(seen))
        for name, shadow in self._shadows.items():
            update = _joined(shadow.step(seen))
            if exact.any():  # while nothing has moved yet there is nothing to compare
                self._measured[name].append(_compare(update, exact))

    def results(self, model: str) -> Iterator[Fidelity]:
        exact = _joined(self._exact.second_moments())
        live = exact > 2.0**-124  # below it even float32 loses bits
        for name, shadow in self._shadows.items():
            measured = torch.tensor(self._measured[name], dtype=torch.float64)
            kept = _joined(shadow.second_moments())[live]
            ratios = (kept / exact[live]).sqrt()
            low, median, high = _percentiles(ratios, (0.05, 0.5, 0.95))
            yield Fidelity(
                model, self.beta2, self.variant.name, name,
                error=100 * float(measured[:, 0].mean()),
                error_median=100 * float(measured[:, 0].median()),
                error_last=100 * float(measured[-(len(measured) // 4 or 1) :, 0].median()),
                projection=float(measured[:, 1].mean()),
                largest=float(measured[:, 2].max() / measured[:, 3].max()),
                largest_step=float((measured[:, 2] / measured[:, 3]).max()),
                drift=median, drift_low=low, drift_high=high,
                zeros=100 * float((kept == 0).double().mean()),
            )  # fmt: skip


def _joined(tensors: Tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def _compare(update: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Return relative error, projection, and the largest elements of both."""
    square = float(exact @ exact)
    error = float((update - exact).norm()) / square**0.5
    largest = float(update.abs().max()), float(exact.abs().max())
    return [error, float(update @ exact) / square, *largest]


def _percentiles(values: torch.Tensor, shares: Sequence[float]) -> list[float]:
    ordered = values.sort().values
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]


def study(
    model_name: str,
    steps: int,
    pairs: Sequence[tuple[float, str]],
    *,
    lr: float = 1e-3,
    peers: Sequence[str] = tuple(CODECS),
) -> list[Fidelity]:
    """Train one model and measure all shadows on its gradients.

    Args:
        model_name: One of `LESSONS`.
        steps: Of the training, the lr falling to zero along a cosine.
        pairs: β2 of the shadows, and what is done to the gradients.
        lr: Of the training.
        peers: Names of the codecs of others that take part.
    """
    with one_torch_thread():
        lesson = LESSONS[model_name](0)
        model = lesson.model()
        low_bit = [p for p in model.parameters() if p.ndim > 1 and p.numel() >= _SMALLEST]
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        shapes = [param.shape for param in low_bit]
        courses = [_Course(shapes, beta2, VARIANTS[name], steps, peers) for beta2, name in pairs]
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            lesson.batch_loss(model, step - 1).backward()
            grads = [param.grad for param in low_bit if param.grad is not None]
            for course in courses:
                course.step(step, grads)
            optimizer.step()
            schedule.step()
        return [result for course in courses for result in course.results(model_name)]


COLUMNS = ("error", "median", "last", "proj.", "max |u|", "a step", "√v", "5 %", "95 %", "zeros")


def table(results: Sequence[Fidelity]) -> Iterator[str]:
    """Yield the lines of a table for people."""
    before = None
    for each in results:
        if before != (before := (each.model, each.beta2, each.gradients)):
            yield f"\n{each.model}, β2 {each.beta2}, gradients {each.gradients}"
            yield " " * 19 + "".join(f"{name:>9}" for name in COLUMNS)
        yield (
            f"  {each.state:<17}{each.error:8.2f}%{each.error_median:8.2f}%{each.error_last:8.2f}%"
            f"{each.projection:9.3f}{each.largest:9.3f}{each.largest_step:9.3f}{each.drift:9.3f}{each.drift_low:9.2f}{each.drift_high:9.2f}"
            f"{each.zeros:8.2f}%"
        )


def summary(results: Sequence[Fidelity]) -> Iterator[str]:
    """Yield, for each state, the worst of all models and β2 by what was done to the gradients."""
    yield "\nThe worst of the models and β2: error, its median, projection, max |u|, in a step, √v"
    for name in dict.fromkeys(each.gradients for each in results):
        yield f"\ngradients {name}"
        some = [each for each in results if each.gradients == name]
        for state in dict.fromkeys(each.state for each in some):
            of = [each for each in some if each.state == state]
            yield (
                f"  {state:<17}{max(e.error for e in of):10.2f}%"
                f"{max(e.error_median for e in of):9.2f}%"
                f"{min(e.projection for e in of):9.3f} …{max(e.projection for e in of):7.3f}"
                f"{max(e.largest for e in of):9.3f}{max(e.largest_step for e in of):9.3f}"
                f"{min(e.drift for e in of):9.3f} …{max(e.drift for e in of):7.3f}"
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=LESSONS, default=list(LESSONS))
    parser.add_argument("--beta2", nargs="+", type=float, default=BETA2)
    parser.add_argument("--gradients", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    return parser.parse_args()


FACTS = {
    "ebbtide": ebbtide.__version__,
    "torch": torch.__version__,
    "processor": platform.machine(),
}


def main() -> None:
    """Measure, print, write."""
    asked = _arguments()
    pairs = [(beta2, name) for name in asked.gradients for beta2 in asked.beta2]
    results = []
    for name in asked.models:
        found = study(name, asked.steps, pairs)
        print("\n".join(table(found)), flush=True)
        results += found
    print("\n".join(summary(results)))
    if asked.out:
        record = {"steps": asked.steps, "facts": FACTS, "results": [asdict(r) for r in results]}
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
