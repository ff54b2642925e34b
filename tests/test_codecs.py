"""The coded kernels against their definition in Python, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ebbtide import _core, codecs
from ebbtide.backends.cpu import CompiledBackend
from ebbtide.backends.pure import PureBackend
from ebbtide.plan import Bucket, Field, Format, Plan, Row
from ebbtide.rules import ADAM, Scalars

Array = np.ndarray[Any, Any]
GROUP = {"betas": (0.9, 0.99), "bias_correction": True}


@pytest.fixture(params=_core.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run under each instruction set that this machine has."""
    before = _core.instruction_set()
    _core.set_instruction_set(request.param)
    yield request.param
    _core.set_instruction_set(before)


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def moments_row(run: int, rows: int, rng: np.random.Generator) -> tuple[Row, list[Array]]:
    """Return a row with state in eight bits, starting at zero, and its arrays."""
    blocks = -(-run // 128)
    param = rng.normal(size=(rows, run)).astype(np.float32)
    grad = (rng.normal(size=(rows, run)) * 10.0 ** rng.uniform(-4, 1, (rows, run))).astype(
        np.float32
    )
    grad[rng.random(grad.shape) < 0.2] = 0.0
    first, scale = np.zeros((rows, run), np.int8), np.zeros((rows, blocks), np.float32)
    second, window = np.zeros((rows, run), np.uint8), np.zeros((rows, blocks), np.uint16)
    arrays = [param, grad, first, scale, second, window]
    row = Row(
        name="w",
        numel=param.size,
        param=Field(address(param), 0, Format.FLOAT32),
        grad=Field(address(grad), 0, Format.FLOAT32),
        state=(
            Field(address(first), address(scale), Format.SIGNED8),
            Field(address(second), address(window), Format.WINDOW8),
        ),
        run_length=run,
        first_block=3,
        salt=5,
        keep=(arrays,),
    )
    return row, arrays


def split_row(bits: int, rng: np.random.Generator) -> tuple[Row, list[Array]]:
    """Return a bfloat16 row with a residual and float32 moments, and its arrays."""
    numel = 301
    high = (rng.normal(size=numel).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    low = np.zeros(numel, np.int8 if bits == 8 else np.int16)
    grad = (rng.normal(size=numel).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    moments = [np.zeros(numel, np.float32) for _ in range(2)]
    row = Row(
        name="w",
        numel=numel,
        param=Field(address(high), 0, Format.BFLOAT16),
        grad=Field(address(grad), 0, Format.BFLOAT16),
        state=tuple(Field(address(each), 0, Format.FLOAT32) for each in moments),
        residual=address(low),
        residual_bits=bits,
        run_length=numel,
        salt=9,
        keep=([high, low, grad, *moments],),
    )
    return row, [high, low, grad, *moments]


def step(backend: Any, row: Row, count: int) -> None:
    """Take steps 1 to `count` of AdamW on one row."""
    for t in range(1, count + 1):
        row.count = t - 1
        plan = Plan(ADAM, [(object(), 0, row, {})], cacheable=False)
        backend.load(plan)
        scalars = Scalars(
            1e-2, 1e-3, 0.0, 0.0, 1.0, 1 - 0.9, 0.99, 1 - 0.99, 1e-8,
            1e-2 / (1 - 0.9**t), (1 - 0.99**t) ** 0.5, step=float(t), seed=4.0,
        )  # fmt: skip
        backend.run(plan, [Bucket(0, scalars, GROUP)], grad_scale=1.0, guard=True)


@pytest.mark.parametrize("run", [1, 100, 128, 300])
@pytest.mark.usefixtures("instruction_set")
def test_eight_bit_moments_are_encoded_as_defined(run: int) -> None:
    """Encoded again from what the kernel's first step computes: m = (1 − β1)·g, v = (1 − β2)·g²."""
    row, (_, grad, first, scale, second, window) = moments_row(run, 3, np.random.default_rng(run))
    step(CompiledBackend(None), row, 1)
    key = codecs.row_key(4, 1, row.salt)
    weight = np.float32(1 - 0.9), np.float32(1 - 0.99)
    for r in range(3):
        for block in range(-(-run // 128)):
            part = slice(128 * block, min(run, 128 * block + 128))
            index = row.first_block + r * -(-run // 128) + block
            g = grad[r, part]
            moments = [(weight[0] * g).tolist(), (weight[1] * g * g).tolist()]
            words = [
                codecs.dither_bits(key, 1, 128 * index + lane, state=True) for lane in range(len(g))
            ]
            expected = codecs.encode_moments(moments, words)
            assert first[r, part].tolist() == expected.first
            assert second[r, part].tolist() == expected.seconds[0]
            assert window[r, block] == expected.windows[0]
            assert scale[r, block] == np.float32(expected.scale)
            assert (first[r, part][g == 0] == 0).all()
            assert (second[r, part][g == 0] == 0).all()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.usefixtures("instruction_set")
def test_a_split_parameter_follows_the_reference(bits: int) -> None:
    ours, our_arrays = split_row(bits, np.random.default_rng(bits))
    theirs, their_arrays = split_row(bits, np.random.default_rng(bits))
    step(CompiledBackend(None), ours, 5)
    with pytest.warns(RuntimeWarning) if not PureBackend._warned else _nothing():
        step(PureBackend(), theirs, 5)
    joined = [
        [codecs.join(int(h), int(low), bits) for h, low in zip(arrays[0], arrays[1], strict=True)]
        for arrays in (our_arrays, their_arrays)
    ]
    # Five float32 steps of 1e-2 on parameters of size 1; the residual of 8 bits adds 2⁻¹⁶.
    np.testing.assert_allclose(joined[0], joined[1], rtol=2e-6 if bits == 16 else 4e-5, atol=1e-6)


def test_every_finite_float_survives_the_exact_split() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    values = words.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    for value in values.tolist():
        high, low = codecs.split(value, 16, 0)
        assert codecs.join(high, low, 16) == value


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
