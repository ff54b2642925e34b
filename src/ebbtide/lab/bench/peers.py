"""Who is measured: ours, torch's three implementations, and what else is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

import ebbtide.torch
from ebbtide.lab.bench.workloads import CLIP

__all__ = ["BASELINE", "Optax", "Peers", "installed"]

BASELINE = "fused"
Maker = Callable[[list[torch.Tensor]], Any]
Peers = dict[str, tuple[Maker, str | None]]


def _torch(**flags: Any) -> Maker:
    return lambda params: torch.optim.AdamW(params, **flags)


def _compiled(params: list[torch.Tensor]) -> Any:
    optimizer = torch.optim.AdamW(params, lr=torch.tensor(1e-3))
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def _from(module: str, name: str, **words: Any) -> Maker | None:
    """Return a maker of a class of another package; `None` where that cannot be imported."""
    try:
        kind = getattr(importlib.import_module(module), name)
    except Exception:  # a peer's import may fail in any way
        return None
    return lambda params: kind(params, **words)


def installed(
    *, clip: bool = False, all_peers: bool = False, options: Mapping[str, Any] | None = None
) -> Peers:
    """Return the optimizers that can be measured here: how to make each, and where it clips.

    Args:
        clip: Clip in each step.
        all_peers: Also those that are slow to start or seldom installed.
        options: Further keywords of ours.
    """
    before = "before" if clip else None
    keywords = {"clip_grad_norm": CLIP if clip else None, **(options or {})}
    ours: Maker = lambda params: ebbtide.torch.AdamW(params, **keywords)  # noqa: E731
    makers: dict[str, Maker | None] = {
        BASELINE: _torch(fused=True),
        "default": _torch(),
        "foreach": _torch(foreach=True),
    }
    if all_peers:
        makers |= {
            "compiled": _compiled,
            "optimi": _from("optimi", "AdamW", lr=1e-3),
            "bitsandbytes, 8-bit": _from("bitsandbytes.optim", "AdamW8bit"),
            "deepspeed": _from("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        }
    found: Peers = {name: (maker, before) for name, maker in makers.items() if maker is not None}
    if all_peers and importlib.util.find_spec("optax") is not None:
        found["optax"] = (lambda params: Optax(params, CLIP if clip else None), None)
    return {**found, "ebbtide": (ours, "inside" if clip else None)}


class Optax:
    """optax's AdamW, compiled by JAX, over copies of torch's parameters.

    Parameters and state are donated to each step, so that JAX can update in place. The gradients
    are those of the first step: to hand over later ones would be timed as part of the step.

    Args:
        params: Copied once; they stay as they are.
        max_norm: Clip the global norm in each step.
    """

    def __init__(self, params: list[torch.Tensor], max_norm: float | None) -> None:
        jax: Any = importlib.import_module("jax")
        optax: Any = importlib.import_module("optax")
        rule = optax.adamw(1e-3, weight_decay=1e-2)
        if max_norm is not None:
            rule = optax.chain(optax.clip_by_global_norm(max_norm), rule)

        def step(values: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = rule.update(gradients, state, values)
            return optax.apply_updates(values, updates), state

        self._params = params
        self._copied: Callable[[torch.Tensor], Any] = lambda tensor: jax.numpy.asarray(
            tensor.detach().numpy().copy()
        )
        self._values = [self._copied(param) for param in params]
        self._state = rule.init(self._values)
        self._gradients: list[Any] = []
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._wait = jax.block_until_ready

    def step(self) -> None:
        """Take one step and wait for its end."""
        if not self._gradients:
            for param in self._params:
                assert param.grad is not None
                self._gradients.append(self._copied(param.grad))
        self._values, self._state = self._step(self._values, self._state, self._gradients)
        self._wait(self._values)
