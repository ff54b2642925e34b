"""Who is measured: ours, torch's three implementations, and what else is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

import ebbtide.torch
from ebbtide.lab.bench.workloads import CLIP

__all__ = ["BASELINE", "installed"]

BASELINE = "fused"
Maker = Callable[[list[torch.Tensor]], Any]


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
    *, clip: bool = False, all_peers: bool = False
) -> dict[str, tuple[Maker, str | None]]:
    """Return the optimizers that can be measured here: how to make each, and where it clips.

    Args:
        clip: Clip in each step.
        all_peers: Also those that are slow to start or seldom installed.
    """
    before = "before" if clip else None
    ours: Maker = lambda params: ebbtide.torch.AdamW(  # noqa: E731
        params, clip_grad_norm=CLIP if clip else None
    )
    makers: dict[str, Maker | None] = {
        BASELINE: _torch(fused=True),
        "default": _torch(),
        "foreach": _torch(foreach=True),
    }
    if all_peers:
        makers |= {
            "compiled": _compiled,
            "optimi": _from("optimi", "AdamW", lr=1e-3),
            "bitsandbytes": _from("bitsandbytes.optim", "AdamW8bit"),
            "deepspeed": _from("deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        }
    found = {name: (maker, before) for name, maker in makers.items() if maker is not None}
    return {**found, "ebbtide": (ours, "inside" if clip else None)}
