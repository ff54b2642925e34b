"""Whole tensors of moments between float32 and eight bits, against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from ebbtide import codecs
from ebbtide.torch.eight_bits import decode, encode
from ebbtide.torch.storage import joined

NEAREST = 0x8000_8000


def moments_of(kind: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    m, v = torch.randn(shape), torch.rand(shape)
    if kind == "gradients":
        return [1e-3 * m, (1e-3 * torch.randn(shape)) ** 2]
    if kind == "any magnitude":
        return [m * torch.exp(8 * torch.randn(shape)), torch.exp(20 * torch.randn(shape))]
    if kind == "dead units":
        alive = torch.rand(shape) < 0.3
        return [m * alive, v * (torch.rand(shape) < 0.5), v]
    if kind == "at rest":
        v = 2.0 ** (-60 * v)
        return [m * (v > 2.0**-20), v]
    for array, every, value in ((m, 17, math.nan), (v, 19, math.inf), (v, 23, -1.0), (m, 29, 1e30)):
        array.view(-1)[::every] = value
    return [m, v, v.nan_to_num(posinf=math.inf)]


@pytest.mark.parametrize("shape", [(3, 128), (2, 300), (5, 17), (2, 2, 65), (0, 4)], ids=str)
@pytest.mark.parametrize(
    "kind", ["gradients", "any magnitude", "dead units", "at rest", "unholdable"]
)
def test_whole_tensors_are_encoded_as_the_definition_says(
    kind: str, shape: tuple[int, ...]
) -> None:
    moments = moments_of(kind, shape)
    codes, scales = encode(moments)
    decoded = decode(codes, scales)
    run = math.prod(shape[1:])
    for row in range(shape[0]):
        for block, start in enumerate(range(0, run, 128)):
            part = [each.reshape(shape[0], run)[row, start : start + 128] for each in moments]
            expected = codecs.encode_moments([p.tolist() for p in part], [NEAREST] * len(part[0]))
            found = [each.reshape(shape[0], run)[row, start : start + 128] for each in codes]
            assert found[0].tolist() == expected.first
            assert scales[0][row, block].item() == expected.scale
            windows = [int(joined(each)[row, block]) & 0xFFFF for each in scales[1:]]
            assert windows == expected.windows
            assert [each.tolist() for each in found[1:]] == expected.seconds
            values = [d.reshape(shape[0], run)[row, start : start + 128].tolist() for d in decoded]
            seconds = [codecs.decode_second(c, windows[0]) for c in expected.seconds[0]]
            assert values[1] == seconds
            assert values[0] == [
                codecs.decode_first(code, expected.scale, v)
                for code, v in zip(expected.first, seconds, strict=True)
            ]
