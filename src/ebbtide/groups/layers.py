"""Layer-wise learning rates: how deep a parameter lies below the top of its model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ebbtide.groups.kinds import is_embedding
from ebbtide.groups.records import ParamInfo
from ebbtide.groups.rules import matches

__all__ = ["depths_below_top"]

# Stages hold blocks; what a block holds is no layer of its own.
_STAGES = frozenset({"stages", "stage", "layers", "levels"})
_BLOCKS = frozenset({"blocks", "block", "layers", "layer"})
_LEAST_SHARE = 0.1


@dataclass
class _Tower:
    """Numbered layers under one name, such as `encoder.layer`."""

    stem: tuple[str, ...]
    elements: dict[tuple[int, ...], int] = field(default_factory=lambda: defaultdict(int))
    composite: bool = False
    first: int = 0

    @property
    def numel(self) -> int:
        return sum(self.elements.values())

    def common(self, path: Sequence[str]) -> int:
        """Return how many components the path begins with in common."""
        pairs = zip(self.stem, path, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.stem))


def depths_below_top(
    infos: Sequence[ParamInfo], layers: Sequence[str] | None = None
) -> tuple[list[int], int]:
    """Return how many layers lie above each parameter, and the depth of the lowest.

    The numbered layers are found by name (`blocks.0`, `stages.1.layers.2`, `layer1.0`), each tower
    of a model with several for itself. Below them is what comes before them and every embedding;
    above, at depth 0, is all the rest.

    Args:
        infos: All parameters, in the order of the model.
        layers: Globs from the bottom to the top, the first match wins, where names do not tell.

    Raises:
        ValueError: No numbered layers are found, or `layers` leaves a parameter without a layer or
            a glob without a parameter.

    Example:
        >>> names = ["embed.weight", "blocks.0.fc.weight", "blocks.1.fc.weight", "head.weight"]
        >>> depths_below_top([ParamInfo(name, (4, 4)) for name in names])
        ([3, 2, 1, 0], 3)
    """
    if layers is not None:
        return _explicit(infos, layers)
    indices = [_numbered(info.name) for info in infos]
    towers = _towers(infos, indices)
    if not towers:
        raise ValueError(
            "layer_decay finds no numbered layers in the names of the parameters; give them from "
            "the bottom to the top, as layers=['embed*', 'body1.*', 'body2.*', 'head*']"
        )
    ranks = {
        stem: {index: rank for rank, index in enumerate(sorted(tower.elements))}
        for stem, tower in towers.items()
    }
    depths = []
    for order, (info, numbered) in enumerate(zip(infos, indices, strict=True)):
        if numbered is not None and numbered[0] in towers:
            stem, index = numbered
            depths.append(len(ranks[stem]) - ranks[stem][index])
        else:
            depths.append(_outside(info, order, list(towers.values())))
    return depths, 1 + max(len(tower.elements) for tower in towers.values())


def _explicit(infos: Sequence[ParamInfo], layers: Sequence[str]) -> tuple[list[int], int]:
    found = [[i for i, glob in enumerate(layers) if matches(glob, info)] for info in infos]
    for info, layer in zip(infos, found, strict=True):
        if not layer:
            raise ValueError(f"{info.name!r} is in none of the layers {list(layers)}")
    for i, glob in enumerate(layers):
        if not any(i in layer for layer in found):
            raise ValueError(f"the layer {glob!r} matches no parameter")
    top = len(layers) - 1
    return [top - layer[0] for layer in found], top


def _numbered(name: str) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    """Return what a name has before its layer number, and the number: of the stage and the block.

    >>> _numbered("encoder.stages.0.layers.1.fc.weight")
    (('encoder', 'stages'), (0, 1))
    >>> _numbered("layer1.0.conv2.weight")
    (('layer',), (1, 0))
    """
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return None
    stem = parts[:at]
    index: tuple[int, ...] = (int(parts[at]),)
    if stem and (stage := re.fullmatch(r"(.*[a-z_])(\d+)", stem[-1])):
        stem[-1], index = stage[1], (int(stage[2]), *index)
    elif stem and stem[-1] in _STAGES and at + 2 < len(parts):
        inner, number = parts[at + 1 : at + 3]
        if inner in _BLOCKS and number.isdigit():
            index = (*index, int(number))
    return tuple(stem), index


def _towers(
    infos: Sequence[ParamInfo],
    indices: Sequence[tuple[tuple[str, ...], tuple[int, ...]] | None],
) -> dict[tuple[str, ...], _Tower]:
    """Return the numbered containers that are the body of the model, not a small head or stem."""
    towers: dict[tuple[str, ...], _Tower] = {}
    for order, (info, numbered) in enumerate(zip(infos, indices, strict=True)):
        if numbered is not None:
            stem, index = numbered
            tower = towers.setdefault(stem, _Tower(stem, first=order))
            tower.elements[index] += info.numel
            # blocks.0.fc.weight, where an item of a plain Sequential is 0.weight
            tower.composite |= info.name.count(".") > len(stem) + 1
    several = {stem: tower for stem, tower in towers.items() if len(tower.elements) > 1}
    composite = {stem: tower for stem, tower in several.items() if tower.composite}
    chosen = composite or several
    largest = max((tower.numel for tower in chosen.values()), default=0)
    return {s: tower for s, tower in chosen.items() if tower.numel >= _LEAST_SHARE * largest}


def _outside(info: ParamInfo, order: int, towers: Sequence[_Tower]) -> int:
    path = info.name.split(".")
    common = [tower.common(path) for tower in towers]
    nearest = [t for t, shared in zip(towers, common, strict=True) if shared == max(common)]
    bottom = 1 + max(len(tower.elements) for tower in nearest)
    if is_embedding(info):
        return bottom
    # A temperature in front of two towers belongs to neither.
    return bottom if len(nearest) == 1 and info.numel > 1 and order < nearest[0].first else 0
