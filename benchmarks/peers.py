"""How other libraries keep Adam's moments, written anew from their released code and papers.

Each codec gets the moments of all tensors after a step, as one float32 vector in which every tensor
begins at a multiple of 256 (zeros fill the gaps), and returns what its library would find at the
next step. Names and sizes of the groups are those of the libraries named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

Codec = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
GROUP = 256


class Flat:
    """Tensors as one vector, each from a multiple of 256 on."""

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = list(shapes)
        self._starts, end = [], 0
        for shape in shapes:
            self._starts.append(end)
            end += -(-shape.numel() // GROUP) * GROUP
        self.size = end
        self.filled = self.join([torch.ones(shape) for shape in shapes]) > 0

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the vector of the tensors, zeros in its gaps."""
        vector = torch.zeros(self.size, dtype=tensors[0].dtype)
        for start, tensor in zip(self._starts, tensors, strict=True):
            vector[start : start + tensor.numel()] = tensor.flatten()
        return vector

    def split(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of a vector, as views."""
        pieces = zip(self._starts, self.shapes, strict=True)
        return [vector[start : start + s.numel()].view(s) for start, s in pieces]


def flashoptim(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashOptim 0.1.4 (arXiv 2602.23349): groups of 32, a float16 scale each.

    m: q = ⌊127·2x/(1+|x|) + ½⌋ with x = m/max|m|. v: q = ⌊255·√v/max√v + ½⌋. Encoded with the exact
    maximum, decoded with the rounded one.
    """
    first, root = m.view(-1, 32), v.sqrt().view(-1, 32)
    largest = first.abs().amax(1, keepdim=True).clamp(min=1e-12)
    x = first / largest
    y = torch.floor(127 * (2 * x / (1 + x.abs())) + 0.5) / 127
    first = largest.half().float() * y / (2 - y.abs())
    largest = root.amax(1, keepdim=True).clamp(min=1e-12)
    root = largest.half().float() * torch.floor(255 * root / largest + 0.5) / 255
    return first.view_as(m), root.square().view_as(v)


def bitsandbytes(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' blockwise 8 bits (arXiv 2110.02861): blocks of 256, nearest of a table."""
    return _nearest(m, 256, _table(7, signed=True)), _nearest(v, 256, _table(7, signed=False))


def torchao4(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torchao's 4 bits (after arXiv 2309.01507): blocks of 128; v on k/16 without a zero."""
    blocks = v.view(-1, 128)
    largest = blocks.amax(1, keepdim=True).clamp(min=1e-12)
    second = torch.floor(blocks / largest * 16 + 0.5).clamp(1, 16) / 16 * largest
    return _nearest(m, 128, _table(3, signed=True)), second.view_as(v)


def naive_int8(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments in equal steps of the largest of 128, to nearest."""
    return _linear(m, 127), _linear(v, 255)


def naive_int8_second(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second moment alone in equal steps of the largest of 128, to nearest."""
    return m, _linear(v, 255)


def bfloat16_nearest(m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments in bfloat16, to nearest: what torch does for bfloat16 parameters."""
    return m.bfloat16().float(), v.bfloat16().float()


CODECS: dict[str, Codec] = {
    "flashoptim's": flashoptim,
    "bitsandbytes'": bitsandbytes,
    "torchao's 4 bits": torchao4,
    "naive int8": naive_int8,
    "bfloat16 nearest": bfloat16_nearest,
}


class EmulatedAdam:
    """Adam in float32 whose moments pass through a codec after every step."""

    def __init__(
        self, shapes: Sequence[torch.Size], betas: tuple[float, float], eps: float, codec: Codec
    ) -> None:
        self._flat, self._betas, self._eps, self._codec = Flat(shapes), betas, eps, codec
        self._moments = torch.zeros(self._flat.size), torch.zeros(self._flat.size)
        self._step = 0

    def step(self, grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the updates, to be multiplied by lr and subtracted."""
        self._step += 1
        beta1, beta2 = self._betas
        grad, (m, v) = self._flat.join(grads), self._moments
        m = m.lerp(grad, 1 - beta1)
        v = (v * beta2).addcmul_(grad, grad, value=1 - beta2)
        root = v.sqrt().div_((1 - beta2**self._step) ** 0.5).add_(self._eps)
        updates = self._flat.split((m / (1 - beta1**self._step)).div_(root))
        self._moments = self._codec(m, v)
        return updates

    def second_moments(self) -> list[torch.Tensor]:
        """Return what is kept of the second moments."""
        return self._flat.split(self._moments[1])


def _linear(x: torch.Tensor, levels: int) -> torch.Tensor:
    blocks = x.view(-1, 128)
    scale = (blocks.abs().amax(1, keepdim=True) / levels).clamp(min=1e-38)
    return (torch.round(blocks / scale) * scale).view_as(x)


def _nearest(x: torch.Tensor, group: int, table: torch.Tensor) -> torch.Tensor:
    """Return the entry of the table nearest to each x relative to its group's largest."""
    blocks = x.view(-1, group)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
    between = (table[1:] + table[:-1]) / 2
    return (table[torch.bucketize(blocks / largest, between)] * largest).view_as(x)


@cache
def _table(exponents: int, *, signed: bool) -> torch.Tensor:
    """Return the "dynamic" map: 2ⁱ numbers in the decade 10^(i - exponents + 1), 0 and 1.

    Each is the middle of one of 2ⁱ (unsigned 2ⁱ⁺¹) equal parts of [0.1, 1] of its decade.
    """
    numbers = [0.0, 1.0]
    for i in range(exponents):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - exponents + 1)).tolist()
        numbers += middles + ([-each for each in middles] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)
