"""What grouping knows of a parameter, without its framework, and what it decided about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Assignment", "ParamInfo", "bare_names"]

# Modules that torch's wrappers put between a module and its parameters, and PEFT between a layer
# and its adapters.
_WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)
_PREFIXES = ("module", "base_model.model")


@dataclass(frozen=True)
class ParamInfo:
    """One parameter.

    Attributes:
        name: The name it goes by, without what wrappers add.
        shape: Of the whole parameter, also where this process holds a shard of it.
        aliases: Every other name it is known by: of tied weights, and with the wrappers.
        owners: For each module that holds it, the qualified names of the module's class and its
            bases, the class first. Empty where only names are known.
        inside: Qualified names of the classes, bases included, of all modules on the way to it.
        frozen: Whether it takes no gradient.
        asked: Who asked that it should not decay, or nothing.
        dtype: Of its elements, such as `float32`.
        local_numel: Elements that this process holds; all of them by default.
        tied: The aliases that other modules know it by.
    """

    name: str
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()
    owners: tuple[tuple[str, ...], ...] = ()
    inside: frozenset[str] = frozenset()
    frozen: bool = False
    asked: str = ""
    dtype: str = "float32"
    local_numel: int | None = None
    tied: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        """All its names."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Assignment:
    """A parameter, the settings it gets, the name of its group and the reason for its decay.

    The settings of a frozen parameter are those it would have; its group is empty.
    """

    info: ParamInfo
    settings: Mapping[str, Any]
    reason: str
    group: str = ""

    @property
    def decays(self) -> bool:
        """Whether weight decay reaches the parameter."""
        return bool(self.settings["weight_decay"] > 0)


def bare_names(names: Sequence[str]) -> list[str]:
    """Return the names as the model has them before it was wrapped.

    Components that torch.compile, FSDP, activation checkpointing and PEFT layers add are dropped
    wherever they stand; `module.` of DDP and `base_model.model.` of PEFT where every name begins
    with them. A name that would then stand for two parameters is kept whole.

    Example:
        >>> bare_names(["module._orig_mod.fc.weight", "module._orig_mod.fc.bias"])
        ['fc.weight', 'fc.bias']
    """
    bare = [_without_wrappers(name) for name in names]
    while prefix := next((p for p in _PREFIXES if _all_begin_with(bare, f"{p}.")), None):
        bare = [_without_wrappers(name[len(prefix) + 1 :]) for name in bare]
    count = Counter(bare)
    return [short if count[short] == 1 else name for short, name in zip(bare, names, strict=True)]


def _without_wrappers(name: str) -> str:
    *path, leaf = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), leaf])


def _all_begin_with(names: Sequence[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)
