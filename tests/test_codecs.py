"""The coded kernels against their definition in Python, bit for bit, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ebbtide import _core, codecs
from ebbtide.backends.cpu import CompiledBackend
from ebbtide.backends.pure import PureBackend
from ebbtide.plan import Bucket, Field, Format, Plan, Row
from ebbtide.rules import ADAM, SGD, Scalars

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


def moments_row(
    run: int, rows: int, rng: np.random.Generator, zeros: float = 0.2
) -> tuple[Row, list[Array]]:
    """Return a row with state in eight bits, starting at zero, and its arrays.

    `zeros` is the share of gradients that are zero.
    """
    blocks = -(-run // 128)
    param = rng.normal(size=(rows, run)).astype(np.float32)
    grad = (rng.normal(size=(rows, run)) * 10.0 ** rng.uniform(-4, 1, (rows, run))).astype(
        np.float32
    )
    grad[rng.random(grad.shape) < zeros] = 0.0
    first, scale = np.zeros((rows, run), np.int8), np.zeros((rows, blocks), np.float32)
    second, window = np.zeros((rows, run), np.uint8), np.zeros((rows, blocks), np.uint16)
    arrays: list[Array] = [param, grad, first, scale, second, window]
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


def split_row(
    bits: int, rng: np.random.Generator, form: Format = Format.BFLOAT16
) -> tuple[Row, list[Array]]:
    """Return a row of 16 bits with a residual and float32 moments, and its arrays."""
    numel = 301
    normal = rng.normal(size=numel)
    high = (normal.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if form is Format.FLOAT16:
        high = normal.astype(np.float16).view(np.uint16)
    low = np.zeros(numel, np.int8 if bits == 8 else np.int16)
    grad = (rng.normal(size=numel).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    moments = [np.zeros(numel, np.float32) for _ in range(2)]
    row = Row(
        name="w",
        numel=numel,
        param=Field(address(high), 0, form),
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


@pytest.mark.parametrize("zeros", [0.0, 0.2])
@pytest.mark.parametrize("run", [1, 100, 128, 300])
@pytest.mark.usefixtures("instruction_set")
def test_eight_bit_moments_are_encoded_as_defined(run: int, zeros: float) -> None:
    """Encoded again from what the kernel's first step computes: m = (1 − β1)·g, v = (1 − β2)·g²."""
    rng = np.random.default_rng(run)
    row, (_, grad, first, scale, second, window) = moments_row(run, 3, rng, zeros)
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


@pytest.mark.parametrize("form", [Format.BFLOAT16, Format.FLOAT16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.usefixtures("instruction_set")
def test_a_split_parameter_follows_the_reference(bits: int, form: Format) -> None:
    ours, our_arrays = split_row(bits, np.random.default_rng(bits), form)
    theirs, their_arrays = split_row(bits, np.random.default_rng(bits), form)
    step(CompiledBackend(None), ours, 5)
    with pytest.warns(RuntimeWarning) if not PureBackend._warned else _nothing():
        step(PureBackend(), theirs, 5)
    joined = [
        [
            codecs.join(int(high), int(low), bits, float16=form is Format.FLOAT16)
            for high, low in zip(arrays[0], arrays[1], strict=True)
        ]
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


def any_numbers(seed: int) -> Array:
    """Return numbers of all magnitudes, and those where float16's codes begin, change and end."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, 30000, dtype=np.uint64).astype(np.uint32)
    usual = np.ldexp(rng.uniform(-1, 1, 30000), rng.integers(-45, 20, 30000)).astype(np.float32)
    edges = np.array([2.0**-14, 2.0**-17, 2.0**-24, 2.0**-40, 1, 2, 65504, 65520, 65536, 3.3e38])
    near = edges.astype(np.float32).view(np.int32)[:, None] + np.arange(-20, 20, dtype=np.int32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    kept = words.view(np.float32)
    kept = kept[np.isfinite(kept) & (np.abs(kept) >= 2.0**-126)]  # less is flushed by the kernels
    return np.concatenate([kept, usual, near.view(np.float32).ravel(), special])


def low_type(bits: int) -> Any:
    return np.int8 if bits == 8 else np.int16


def half_row(codes: Array, low: Array, grad: Array, form: Format, **more: Any) -> Row:
    return Row(
        name="w",
        numel=codes.size,
        param=Field(address(codes), 0, form),
        grad=Field(address(grad), 0, Format.FLOAT32),
        residual=address(low),
        residual_bits=8 * low.itemsize,
        run_length=codes.size,
        salt=11,
        keep=(codes, low, grad),
        **more,
    )


def plain_sgd(row: Row, lr: float) -> None:
    """Take one step, θ ← θ − lr·g."""
    plan = Plan(SGD, [(object(), 0, row, {})], cacheable=False)
    backend = CompiledBackend(None)
    backend.load(plan)
    scalars = Scalars(lr, 0.0, 0.0, 0.0, 1.0, seed=2.0)
    backend.run(plan, [Bucket(0, scalars, {})], grad_scale=1.0, guard=False)


@pytest.mark.parametrize("form", [Format.BFLOAT16, Format.FLOAT16])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.usefixtures("instruction_set")
def test_any_number_is_split_as_defined(form: Format, bits: int) -> None:
    """Parameters of zero, stepped by −g: the kernel splits g itself."""
    numbers = any_numbers(bits)
    codes, low = np.zeros(numbers.size, np.uint16), np.zeros(numbers.size, low_type(bits))
    plain_sgd(half_row(codes, low, -numbers, form), 1.0)
    key = codecs.row_key(2, 1, 11)
    numbers += np.float32(0)  # the step makes −0 of g a 0
    for i, x in enumerate(numbers.tolist()):
        word = codecs.dither_bits(key, 1, i, state=False)
        high, residual = codecs.split(x, bits, word >> 24, float16=form is Format.FLOAT16)
        assert (high, residual) == (codes[i] & (0x7FFF if math.isnan(x) else 0xFFFF), low[i]), x


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.usefixtures("instruction_set")
def test_every_float16_with_every_residual_is_joined_as_defined(bits: int) -> None:
    """A step of nothing reads and writes again; what it reads is compared through Python too."""
    finite = np.array([c for c in range(2**16) if c & 0x7FFF < 0x7C00], np.uint16)
    residuals = np.arange(-128, 128) if bits == 8 else np.arange(-(2**15), 2**15, 8)[::37]
    grid = np.meshgrid(finite, residuals.astype(low_type(bits)))
    codes, low = grid[0].ravel(), grid[1].ravel()
    impossible = (codes & 0x7FFF == 0) & (low < 0)  # set to zero from outside: zero it stays
    before = codes.copy(), np.where(impossible, 0, low)
    plain_sgd(half_row(codes, low, np.zeros(codes.size, np.float32), Format.FLOAT16), 0.0)
    np.testing.assert_array_equal(codes, before[0])
    np.testing.assert_array_equal(low, before[1])
    some = np.random.default_rng(0).integers(0, codes.size, 20000)
    for high, residual in zip(codes[some].tolist(), low[some].tolist(), strict=True):
        x = codecs.join(high, residual, bits, float16=True)
        for dither in (0, 255):
            assert codecs.split(x, bits, dither, float16=True) == (high, residual)


def test_float16_with_sixteen_bits_keeps_what_it_promises() -> None:
    """Exact from 2⁻¹⁴ to 65,520, to the nearest 2⁻⁴⁰ below; the code is the nearest float16."""
    numbers = any_numbers(3)
    for x in numbers[np.isfinite(numbers)].tolist():
        high, low = codecs.split(x, 16, float16=True)
        back = codecs.join(high, low, 16, float16=True)
        if abs(x) >= 65520:
            assert 65519.99 < abs(back) < 65520
            assert high & 0x7FFF == 0x7BFF
            continue
        if abs(x) >= 2.0**-14:
            assert back == x
        else:
            assert abs(back - x) <= 2.0**-41
        error = abs(codecs.float16_decode(high) - x)
        nearest = abs(codecs.float16_decode(codecs.float16_encode(x)) - x)
        assert error <= nearest + 2.0**-41


def test_what_no_kernel_takes_is_refused_by_name() -> None:
    codes, low, grad = np.zeros(4, np.uint16), np.zeros(4, np.int8), np.zeros(4, np.float32)
    wide = np.zeros(4)
    residual: dict[str, Any] = {"residual": address(low), "residual_bits": 8}
    nowhere: dict[str, Any] = {"residual_bits": 8}
    plain: dict[str, Any] = {}
    eight = Field(address(low), address(grad), Format.SIGNED8)
    for param, state, more, message in (
        (Field(address(grad), 0, Format.FLOAT32), (), residual, "not float32"),
        (Field(address(wide), 0, Format.FLOAT64), (), residual, "not float64"),
        (Field(address(codes), 0, Format.BFLOAT16), (), nowhere, "an address"),
        (Field(address(wide), 0, Format.FLOAT64), (), plain, "float64 goes with"),
        (Field(address(grad), 0, Format.FLOAT32), (eight,), plain, "both moments"),
        (Field(address(grad), 0, Format.FLOAT32), (eight, eight), plain, "both moments"),
    ):
        row = Row(
            name="w", numel=4, param=param, grad=Field(address(grad), 0, Format.FLOAT32),
            state=state, run_length=4, **more,
        )  # fmt: skip
        plan = Plan(ADAM, [(object(), 0, row, {})], cacheable=False)
        with pytest.raises(ValueError, match=f"'w'.*{message}"):
            CompiledBackend(None).load(plan)


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()
