"""The optimizers the laboratory compares, and how their grids correspond.

A grid is written in AdamW's units. Another optimizer gets the same number of points, moved to
where its own settings have about the same effect, so that no arm searches a smaller or a
less likely region than another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ebbtide.lab.errors import InputError
from ebbtide.weight_decay import decay_share

__all__ = ["OPTIMIZERS", "OptimizerSpec", "choose_optimizers", "numpy_optimizer", "scaled_grid"]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer of a comparison.

    Attributes:
        name: What the command line calls it.
        label: What a picture calls it.
        family: Name of the class in `ebbtide.numpy` and `ebbtide.torch`.
        options: Keyword arguments of that class.
        lr_unit: Its lr where AdamW's is 1.
        weight_decay_unit: Its weight decay where AdamW's is 1.
        update: One step in words and symbols, for the report.
    """

    name: str
    label: str
    family: str
    lr_unit: float
    weight_decay_unit: float
    update: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def can_run(self, lr: float, weight_decay: float) -> bool:
        """Tell whether a step leaves something of a parameter."""
        default = "decoupled" if self.family == "AdamW" else "l2"
        policy = self.options.get("decay_policy") or default
        base_lr = self.options.get("base_lr") or lr
        return decay_share(policy, lr=lr, base_lr=base_lr, weight_decay=weight_decay) < 1


# SGD's lr is ten times AdamW's. SGDW's weight decay is a tenth, so that lr·λ, the share decayed
# in a step, is AdamW's; SGD's another tenth, because momentum 0.9 applies a gradient ten times
# over. Adam's is a hundredth, the usual size of the root mean square gradient that Adam divides
# its L2 term by (0.003 to 0.01 on the digits network).
OPTIMIZERS: Mapping[str, OptimizerSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            OptimizerSpec(
                name="sgd",
                label="SGD + L2",
                family="SGD",
                lr_unit=10.0,
                weight_decay_unit=0.01,
                update="m ← 0.9·m + g + λθ, θ ← θ - lr·m",
                options=MappingProxyType({"momentum": 0.9}),
            ),
            OptimizerSpec(
                name="sgdw",
                label="SGDW",
                family="SGD",
                lr_unit=10.0,
                weight_decay_unit=0.1,
                update="m ← 0.9·m + g, θ ← θ - lr·λθ - lr·m",
                options=MappingProxyType({"momentum": 0.9, "decay_policy": "decoupled"}),
            ),
            OptimizerSpec(
                name="adam",
                label="Adam + L2",
                family="Adam",
                lr_unit=1.0,
                weight_decay_unit=0.01,
                update="Adam's step on g + λθ",
            ),
            OptimizerSpec(
                name="adamw",
                label="AdamW",
                family="AdamW",
                lr_unit=1.0,
                weight_decay_unit=1.0,
                update="θ ← θ - lr·λθ, then Adam's step on g",
            ),
        )
    }
)


def choose_optimizers(text: str) -> tuple[OptimizerSpec, ...]:
    """Return the optimizers named in a comma-separated list, in the order of `OPTIMIZERS`.

    Raises:
        InputError: A name is unknown, or there is none.

    Example:
        >>> [spec.label for spec in choose_optimizers("adamw,sgd")]
        ['SGD + L2', 'AdamW']
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown or not names:
        what = f"unknown optimizer {unknown[0]!r}" if unknown else "no optimizer named"
        raise InputError(f"{what}; choose among {', '.join(OPTIMIZERS)}")
    return tuple(spec for spec in OPTIMIZERS.values() if spec.name in names)


def scaled_grid(
    spec: OptimizerSpec, lrs: Sequence[float], weight_decays: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Move a grid in AdamW's units to the optimizer's own.

    Example:
        >>> scaled_grid(OPTIMIZERS["sgd"], [0.01], [0.0, 1.0])
        ((0.1,), (0.0, 0.01))
    """
    return (
        tuple(_tidy(lr * spec.lr_unit) for lr in lrs),
        tuple(_tidy(weight_decay * spec.weight_decay_unit) for weight_decay in weight_decays),
    )


def _tidy(value: float) -> float:
    return float(f"{value:.12g}")


def numpy_optimizer(spec: OptimizerSpec, groups: list[dict[str, Any]], **options: Any) -> Any:
    """Return the optimizer over NumPy arrays, with the groups' own lr and weight decay.

    Elements whose gradient is not finite are passed on as they are: the network they belong to
    has diverged, and its neighbours in the stack have not.
    """
    import ebbtide.numpy

    settings = {"nonfinite": "propagate", **spec.options, **options}
    return getattr(ebbtide.numpy, spec.family)(groups, **settings)
