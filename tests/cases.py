"""The matrix of what can be combined, as data: rule × dtype × policy × layout × backend.

A trajectory of a case is computed three ways: by the face under test, by `reference.py` one
element at a time, and, where torch has the rule, by torch.optim. Nothing is skipped in a test body:
what a combination should do stands here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ebbtide import reference
from ebbtide.weight_decay import decay_share, l2_coefficient

Array = np.ndarray[Any, Any]

RULES: dict[str, dict[str, Any]] = {
    "adam": {"betas": (0.9, 0.999)},
    "adam-low-betas": {"betas": (0.3, 0.9), "eps": 1e-6},
    "adam-no-momentum": {"betas": (0.0, 0.99)},
    "amsgrad": {"betas": (0.9, 0.95), "amsgrad": True},
    "adam-uncorrected": {"bias_correction": False},
    "sgd": {},
    "sgd-momentum": {"momentum": 0.9},
    "sgd-dampened": {"momentum": 0.8, "dampening": 0.3},
    "sgd-nesterov": {"momentum": 0.9, "nesterov": True},
}
POLICIES: dict[str, dict[str, Any]] = {
    "none": {"weight_decay": 0.0},
    "l2": {"weight_decay": 0.1, "decay_policy": "l2"},
    "decoupled": {"weight_decay": 0.1, "decay_policy": "decoupled"},
    "independent": {"weight_decay": 0.02, "decay_policy": "independent", "base_lr": 0.1},
    "corrected": {"weight_decay": 0.3, "decay_policy": "corrected", "base_lr": 0.1},
    "cautious": {"weight_decay": 0.3, "decay_policy": "decoupled", "cautious": True},
}


@dataclass(frozen=True)
class Case:
    """One combination of rule and policy."""

    rule: str
    policy: str
    maximize: bool = False
    steps: int = 30
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_adam(self) -> bool:
        """Whether the rule is of the Adam family."""
        return not self.rule.startswith("sgd")

    def keywords(self) -> dict[str, Any]:
        """Return what both faces' classes take."""
        lr = 0.02 if self.is_adam else 0.05
        flags = {"maximize": self.maximize}
        return {"lr": lr, **RULES[self.rule], **POLICIES[self.policy], **flags, **self.options}

    def __str__(self) -> str:
        return f"{self.rule}-{self.policy}{'-maximize' if self.maximize else ''}"


def matrix() -> Iterator[Case]:
    """Yield every rule with every policy, and each rule once climbing."""
    for rule, policy in itertools.product(RULES, POLICIES):
        yield Case(rule, policy)
    for rule in RULES:
        yield Case(rule, "decoupled", maximize=True)


def optimizer_of(module: Any, case: Case, params: Any, **options: Any) -> Any:
    """Build the case's optimizer of a face (`ebbtide.numpy` or `ebbtide.torch`)."""
    kind = module.Adam if case.is_adam else module.SGD
    return kind(params, **case.keywords(), **options)


def gradients(shape: tuple[int, ...], steps: int, seed: int) -> list[Array]:
    """Return gradients of changing size, with signs, zeros and a jump in scale."""
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.uniform(-3, 1, size=shape)
    listed = [rng.normal(size=shape) * scale * (3.0 if t % 7 == 0 else 1.0) for t in range(steps)]
    for t in range(0, steps, 5):
        listed[t] = np.where(rng.random(shape) < 0.3, 0.0, listed[t])
    return listed


def start(shape: tuple[int, ...], seed: int) -> Array:
    """Return the parameter before the first step."""
    return np.random.default_rng(seed + 1000).normal(size=shape)


def reference_trajectory(case: Case, param: Array, grads: list[Array]) -> list[list[float]]:
    """Step every element through `reference.py`; returns [θ, state...] of each element."""
    words = case.keywords()
    policy = words.get("decay_policy", "l2")
    lr, weight_decay = words["lr"], words["weight_decay"]
    common = {
        "lr": lr,
        "decay": decay_share(
            policy, lr=lr, base_lr=words.get("base_lr", lr), weight_decay=weight_decay
        ),
        "l2": l2_coefficient(policy, weight_decay=weight_decay),
        "cautious": words.get("cautious", False),
        "maximize": words["maximize"],
    }
    results = []
    for index in np.ndindex(param.shape):
        series = [float(grad[index]) for grad in grads]
        if case.is_adam:
            results.append(_adam(float(param[index]), series, words, common))
        else:
            results.append(_sgd(float(param[index]), series, words, common))
    return results


def _adam(
    param: float, grads: list[float], words: dict[str, Any], common: dict[str, Any]
) -> list[float]:
    state = reference.AdamState(param, 0.0, 0.0, 0.0 if words.get("amsgrad") else None)
    for step, grad in enumerate(grads, 1):
        state = reference.adam(
            state,
            grad,
            step=step,
            betas=words.get("betas", (0.9, 0.999)),
            eps=words.get("eps", 1e-8),
            bias_correction=words.get("bias_correction", True),
            **common,
        )
    return [value for value in state if value is not None]


def _sgd(
    param: float, grads: list[float], words: dict[str, Any], common: dict[str, Any]
) -> list[float]:
    state = reference.SGDState(param)
    for grad in grads:
        state = reference.sgd(
            state,
            grad,
            momentum=words.get("momentum", 0.0),
            dampening=words.get("dampening", 0.0),
            nesterov=words.get("nesterov", False),
            **common,
        )
    return [value for value in state if value is not None]
