"""The two moments of Adam between float32 and eight bits, whole tensors at a time.

`ebbtide.codecs` defines the encoding, and the kernels decode and encode in every step; this is for
when state changes its format: loading, `state_dict(portable=True)`, a group that changes its mind.
Encoding rounds to nearest. Blocks of 128 elements follow the order of the indices, whatever the
layout of the parameter, and end with each index of the first dimension.
"""

from __future__ import annotations

import math

import torch

__all__ = ["blocks_of", "decode", "encode", "is_finite"]

_BLOCK = 128
_SMALLEST, _LARGEST = 1 << 24, 0x7E800000  # bits of v: what is below is zero, above the largest
_INFINITY = 0x7F800000  # its bits
_DORMANT = 28 << 23
_HALF = 0x8000_8000  # in place of random bits: rounds to nearest
_NORMAL = 2.0**-126
_AT_ONCE = 1 << 20  # elements: encoding one takes some 50 bytes meanwhile


def blocks_of(shape: torch.Size) -> tuple[int, int]:
    """Return how many rows of blocks a parameter has, and how many blocks each has."""
    rows = shape[0]
    return rows, math.ceil(math.prod(shape[1:]) / _BLOCK)


def decode(codes: list[torch.Tensor], scales: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the moments that codes stand for, float32 of the shape of the parameter.

    Args:
        codes: int8 of the first moment, uint8 of the second and, for AMSGrad, of its maximum.
        scales: float32 (rows, blocks) of the first moment, uint8 (rows, blocks, 2) of the others.
    """
    shape = codes[0].shape
    seconds = [
        _second(_blocked(each), _windows(windows))
        for each, windows in zip(codes[1:], scales[1:], strict=True)
    ]
    first = _blocked(codes[0])
    squares = (first.to(torch.int32) * first.to(torch.int32).abs()).to(torch.float32)
    units = (seconds[0] >> 1 & 0x7F800000).view(torch.float32)
    moment = _flushed(squares * (scales[0] * 2.0**64)[..., None] * units)
    return [_flat(each, shape) for each in (moment, *(s.view(torch.float32) for s in seconds))]


def encode(moments: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Encode moments to nearest; the inverse of `decode`.

    Args:
        moments: First moment, second moment and, for AMSGrad, the maximum of the second, all of the
            shape of the parameter.
    """
    rows, run = moments[0].shape[0], math.prod(moments[0].shape[1:])
    some = max(1, _AT_ONCE // max(1, run))
    parts = [
        _encode([each[row : row + some] for each in moments])
        for row in range(0, max(1, rows), some)
    ]
    if len(parts) == 1:
        return parts[0]
    codes, scales = (
        [torch.cat(each) for each in zip(*arrays, strict=True)]
        for arrays in zip(*parts, strict=True)
    )
    return codes, scales


def _encode(moments: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    shape = moments[0].shape
    first, *seconds = [_blocked(each.to(torch.float32)) for each in moments]
    first, bits = _holdable(first, seconds)
    ratio = _ratio(first, bits[0])
    largest = ratio.abs().amax(-1)
    windows = [_window_of(each, ratio != 0) for each in bits]
    codes = [_encode_second(each, window) for each, window in zip(bits, windows, strict=True)]
    alive = largest >= 2.0**-60
    ratio = _ratio(first, _second(codes[0], windows[0]))
    inverse = torch.where(alive, torch.full_like(largest, 16128.9) / largest * 2.0**32, 0.0)
    root = (ratio.abs() * inverse[..., None]).sqrt().to(torch.int32)
    first_codes = (torch.where(ratio < 0, -root, root) + (_HALF & 0xFFFF)) >> 16
    scale = torch.where(alive, largest / (127.0 * 127.0), 0.0)
    stored = [first_codes.to(torch.int8), *(each.to(torch.uint8) for each in codes)]
    scales = [scale, *(_as_bytes(each) for each in windows)]
    return [_flat(each, shape) for each in stored], scales


def is_finite(codes: torch.Tensor, windows: torch.Tensor) -> bool:
    """Tell whether second moments are finite numbers, as all that have been encoded are.

    Args:
        codes: uint8.
        windows: uint8 (rows, blocks, 2).
    """
    highest = _blocked(codes).amax(-1, keepdim=True)
    return bool((_second(highest, _windows(windows).to(torch.int64)) < _INFINITY).all())


def _blocked(tensor: torch.Tensor) -> torch.Tensor:
    """Return (rows, blocks, 128), zeros behind the end of each row."""
    rows, blocks = blocks_of(tensor.shape)
    flat = tensor.reshape(rows, math.prod(tensor.shape[1:]))
    return torch.nn.functional.pad(flat, (0, blocks * _BLOCK - flat.shape[1])).reshape(
        rows, blocks, _BLOCK
    )


def _flat(blocked: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return blocked.flatten(1)[:, : math.prod(shape[1:])].reshape(shape).contiguous()


def _windows(stored: torch.Tensor) -> torch.Tensor:
    return stored[..., 0].to(torch.int32) | stored[..., 1].to(torch.int32) << 8


def _as_bytes(windows: torch.Tensor) -> torch.Tensor:
    return torch.stack([windows & 0xFF, windows >> 8], -1).to(torch.uint8)


def _second(codes: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Return the bits of second moments."""
    shift, base, coarse = _grid(windows)
    wide = codes.to(windows.dtype)
    return torch.where(codes != 0, (base + wide + wide.minimum(coarse)) << shift, 0)


def _grid(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the shift, the base in steps of 2^shift, and how many codes are coarse."""
    leading = [windows >> (16 - k) == (1 << k) - 1 for k in range(1, 8)]
    shift = 16 + torch.stack(leading).sum(0, dtype=windows.dtype)[..., None]
    unit = (24 - shift).clamp(max=4)
    windows = windows[..., None]
    base = (windows << unit) & ((1 << (31 - shift)) - 1)
    return shift, base, (windows >> (23 - shift)) & (256 - (256 >> unit))


def _holdable(
    first: torch.Tensor, seconds: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return first moments, and the bits of the others, with zero for what cannot be kept."""
    holds = torch.ones_like(first, dtype=torch.bool)
    bits = []
    for each in seconds:
        keeps = (each >= 0) & (each < math.inf)
        found = torch.where(keeps, each + 0.0, 0.0).view(torch.int32).clamp(max=_LARGEST)
        bits.append(torch.where(found >= _SMALLEST, found, 0))
        holds &= each < math.inf
    there = bits[0] != 0
    holds &= torch.where(there, _ratio(first, bits[0]).abs(), 0.0) < 2.0**64
    return torch.where(holds & there, first, 0.0), [torch.where(holds, each, 0) for each in bits]


def _ratio(first: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return m/S: S is the power of two nearest the root of the number with these bits."""
    return _flushed(first * (0x5F000000 - (bits >> 1 & 0x7F800000)).view(torch.float32))


def _flushed(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < _NORMAL, 0.0 * x, x)


def _window_of(bits: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    highest = bits.amax(-1)
    ceiling = highest[..., None]
    lowest = torch.where(bits != 0, bits, ceiling).amin(-1)
    moving_low = torch.where((bits != 0) & moving, bits, ceiling).amin(-1)
    low = torch.minimum(moving_low, torch.maximum(lowest, highest - _DORMANT))
    windows = torch.zeros_like(highest)
    for shift in reversed(range(16, 24)):  # the smallest that fits is written last
        unit = min(24 - shift, 4)
        fits = (highest >> shift) - (low >> shift) <= 509 - (1 << unit) - (256 >> unit)
        base = ((low >> shift) - 2) & -(1 << unit)
        missing = ((highest >> shift) - base - 254).clamp(min=0)
        coarse = (missing + (256 >> unit) - 1) & -(256 >> unit)
        ones = 0xFFFF << (32 - shift) & 0xFFFF
        windows = torch.where(fits, ones | coarse << (23 - shift) | base >> unit, windows)
    return torch.where(highest != 0, windows, 0)


def _encode_second(bits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    shift, base, coarse = _grid(windows.to(torch.int64))
    edge = (base + 2 * coarse) << shift
    dither = _HALF >> (32 - shift)
    kept = (bits + 2 * dither).minimum((bits + dither).maximum(edge))
    steps = ((kept >> shift) - base).clamp(min=2)
    return torch.where(bits != 0, (steps >> 1).maximum(steps - coarse), 0)
