"""Random bits for stochastic rounding, from a counter: no state, the same whatever the threads.

Two things make the rounding errors of one element cancel over its steps and over its block, where
independent bits would let them add up like a random walk:

- In a block of 128 elements the bits differ by a constant of the lane, whose upper and lower halves
  each run evenly through their range.
- From one step to the next the bits advance by the golden ratio (Weyl's sequence), so that the
  roundings of an element within 128 steps are spread evenly over [0, 1) too. Every 128 steps the
  block starts from a fresh hash: a gradient that recurs with a period of the sequence cannot keep
  meeting the same bits.

Seen alone, the bits of an element are uniform, so each rounding is unbiased.
"""

from __future__ import annotations

from functools import cache

__all__ = ["block_word", "dither_bits", "lane_constant", "mix", "row_key"]

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1
_ADVANCE = 0x9E376A09  # upper half: the golden ratio; lower half, for the moments: √2 − 1
_WINDOW_BITS = 7  # steps between fresh hashes, as a power of two


def mix(x: int) -> int:
    """Mix 64 bits (the finaliser of splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


@cache
def lane_constant(lane: int) -> int:
    """Return the 32 bits by which one of the 128 elements of a block varies the block's word.

    The top seven bits, and the top seven of the lower half, are permutations of 0..127.
    """
    reversed_lane = int(f"{lane:07b}"[::-1], 2)
    filling = mix(lane)
    upper = (reversed_lane << 9) | (filling >> 55)
    lower = ((lane * 85 & 127) << 9) | (filling & 511)
    return (upper << 16) | lower


def row_key(seed: int, step: int, salt: int) -> int:
    """Return the key of one parameter, the same for 128 steps.

    Args:
        seed: Of the optimizer's group.
        step: 1-based count of the step.
        salt: 64 bits of the parameter's name.
    """
    return mix(mix(seed) ^ mix(((step >> _WINDOW_BITS) * 0xD1342543DE82EF95) & _MASK64) ^ salt)


def block_word(key: int, step: int, block: int, *, state: bool) -> int:
    """Return the 32 bits of one block at one step; its elements vary them by `lane_constant`.

    Args:
        key: From `row_key`.
        step: 1-based count of the step.
        block: Index in the whole parameter.
        state: Bits for the state, or for the parameter.
    """
    hashed = mix(key ^ (block << 1))
    half = hashed >> 32 if state else hashed & _MASK32
    return (half + step * _ADVANCE) & _MASK32


def dither_bits(key: int, step: int, element: int, *, state: bool) -> int:
    """Return the 32 random bits of one element at one step.

    Args:
        key: From `row_key`.
        step: 1-based count of the step.
        element: Index in the whole parameter; blocks of 128 elements share a hash.
        state: Bits for the state, or for the parameter.

    Example:
        The 128 elements of a block are spread evenly at any step:

        >>> tops = [dither_bits(12345, 7, e, state=False) >> 25 for e in range(128)]
        >>> sorted(tops) == list(range(128))
        True

        Of 89 steps of one element, the number below a half is 44 or 45:

        >>> sum(dither_bits(12345, t, 3, state=True) < 2**31 for t in range(89)) in (44, 45)
        True
    """
    return lane_constant(element & 127) ^ block_word(key, step, element >> 7, state=state)
