"""How arrays lie in memory, and whether a step would write the same memory twice.

Plain Python on shapes, strides and addresses; imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise, product
from typing import NamedTuple

__all__ = ["Region", "check_overlap", "extents_of", "layout_of"]


class Region(NamedTuple):
    """Memory that a step writes.

    Attributes:
        name: Of the parameter that it belongs to.
        address: Of the first element.
        itemsize: Bytes of one element.
        extents: Shape and stride of each dimension, flat, in elements; see `extents_of`.
    """

    name: str
    address: int
    itemsize: int
    extents: tuple[int, ...]

    def span(self) -> tuple[int, int]:
        """Return the first byte and the one behind the last; equal where there is no element."""
        low = high = 0
        for extent, stride in _pairs(self.extents):
            if extent == 0:
                return self.address, self.address
            reach = (extent - 1) * stride
            low, high = low + min(reach, 0), high + max(reach, 0)
        return self.address + low * self.itemsize, self.address + (high + 1) * self.itemsize

    def runs(self) -> Iterable[tuple[int, int]]:
        """Yield the ranges of bytes that hold elements."""
        for start, length in _runs(self.extents):
            first = self.address + start * self.itemsize
            yield first, first + length * self.itemsize


def layout_of(shape: Sequence[int], strides: Sequence[int]) -> str:
    """Classify how an array lies in memory.

    Args:
        shape: Extent of each dimension.
        strides: In elements.

    Returns:
        `"dense"` (any order of dimensions, no gaps), `"strided"` (gaps), or `"overlapping"`
        (elements share memory, or could: the strides do not exclude it).

    Example:
        >>> layout_of((2, 3), (1, 2)), layout_of((4,), (2,)), layout_of((4,), (0,))
        ('dense', 'strided', 'overlapping')
    """
    if 0 in shape:
        return "dense"
    expected, dense = 1, True
    for stride, extent in sorted((abs(s), n) for n, s in zip(shape, strides, strict=True) if n > 1):
        if stride < expected:
            return "overlapping"
        dense = dense and stride == expected
        expected += stride * (extent - 1)
    forward = all(s > 0 for n, s in zip(shape, strides, strict=True) if n > 1)
    return "dense" if dense and forward else "strided"


def extents_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return shape and stride of each dimension other than one, flat, as `csrc/tensor.h` does."""
    return tuple(value for n, s in zip(shape, strides, strict=True) if n != 1 for value in (n, s))


def check_overlap(regions: Iterable[Region]) -> None:
    """Refuse memory that would be written twice.

    Args:
        regions: Whatever the step writes: parameters and their state.

    Raises:
        ValueError: Two of them share memory; both are named.
    """
    clusters: list[list[Region]] = []
    end = 0
    for start, stop, region in sorted((*region.span(), region) for region in regions):
        if start == stop:
            continue
        if start >= end:
            clusters.append([])
        clusters[-1].append(region)
        end = max(end, stop)
    for cluster in clusters:
        if len(cluster) > 1:
            _check_runs(cluster)


def _check_runs(cluster: Sequence[Region]) -> None:
    """Compare element by element: spans may interleave without sharing anything."""
    runs = sorted((*run, region.name) for region in cluster for run in region.runs())
    for (_, stop, name), (start, _, other) in pairwise(runs):
        if start < stop:
            what = (
                f"the state of parameter {name!r} overlaps itself"
                if name == other
                else f"parameters {name!r} and {other!r} share memory"
            )
            raise ValueError(f"{what}: one step would update it twice; pass one of them only")


@lru_cache(maxsize=64)
def _runs(extents: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Return (first element, length) of the runs of adjacent elements."""
    length = 1
    outer: list[range] = []
    for extent, stride in sorted(_pairs(extents), key=lambda pair: abs(pair[1])):
        if stride == length and not outer:
            length *= extent
        else:
            outer.append(range(0, extent * stride, stride))
    return tuple((sum(offsets), length) for offsets in product(*outer))


def _pairs(extents: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip(extents[::2], extents[1::2], strict=True))
