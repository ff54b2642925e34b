"""Eight-bit moments: every code, any scale of the gradient, any sharding, any number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide import _core, codecs
from ebbtide.backends.cpu import CompiledBackend
from ebbtide.plan import BLOCK, Bucket, Field, Format, Plan, Row
from ebbtide.rules import ADAM, Scalars

Array = np.ndarray[Any, Any]
BETAS = (0.9, 0.99)
GROUP = {"betas": BETAS, "bias_correction": True}
NEAREST = 0x8000_8000
LARGEST = 0x7E800000  # bits of the largest second moment that is kept
every_code = np.arange(256, dtype=np.uint32)


@pytest.fixture(params=_core.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run under each instruction set that this machine has."""
    before = _core.instruction_set()
    _core.set_instruction_set(request.param)
    yield request.param
    _core.set_instruction_set(before)


@dataclass
class Moments:
    """A float32 matrix with its state in eight bits; `rows` of a matrix from `first_row` on."""

    rows: int
    run: int
    first_row: int = 0
    salt: int = 5
    param: Array = field(init=False)
    grad: Array = field(init=False)
    codes: list[Array] = field(init=False)
    scales: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        shape, blocks = (self.rows, self.run), (self.rows, -(-self.run // BLOCK))
        self.param, self.grad = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.codes = [np.zeros(shape, kind) for kind in (np.int8, np.uint8)]
        self.scales = [np.zeros(blocks, kind) for kind in (np.float32, np.uint16)]

    def row(self, count: int) -> Row:
        formats = Format.SIGNED8, Format.WINDOW8
        states = zip(self.codes, self.scales, formats, strict=True)
        return Row(
            name="w",
            numel=self.param.size,
            param=Field(self.param.ctypes.data, 0, Format.FLOAT32),
            grad=Field(self.grad.ctypes.data, 0, Format.FLOAT32),
            state=tuple(Field(c.ctypes.data, s.ctypes.data, form) for c, s, form in states),
            run_length=self.run,
            first_block=self.first_row * self.scales[0].shape[1],
            salt=self.salt,
            count=count,
            keep=(self,),
        )

    def second(self) -> Array:
        """Return the second moments that are kept, (rows, run), in float64."""
        windows = np.repeat(self.scales[1], BLOCK, axis=1)[:, : self.run]
        return decoded(self.codes[1], windows).astype(np.float64)

    def everything(self) -> list[Array]:
        return [self.param, *self.codes, *self.scales]


def scalars(step: int, *, lr: float = 1e-2, eps: float = 1e-8, decay: float = 1e-3) -> Scalars:
    """Return the numbers of one step of AdamW."""
    beta1, beta2 = BETAS
    return Scalars(
        lr, decay, 0.0, 0.0, 1.0, 1 - beta1, beta2, 1 - beta2, eps,
        lr / (1 - beta1**step), math.sqrt(1 - beta2**step), step=float(step), seed=4.0,
    )  # fmt: skip


def take(parts: list[Moments], numbers: Scalars) -> None:
    """Take one step of several parameters in one plan."""
    backend = CompiledBackend(None)
    count = int(numbers.step) - 1
    plan = Plan(ADAM, [(object(), 0, part.row(count), {}) for part in parts], cacheable=False)
    backend.load(plan)
    backend.run(plan, [Bucket(0, numbers, GROUP)], grad_scale=1.0, guard=True)


def gradients(shape: tuple[int, int], step: int) -> Array:
    """Return gradients over five powers of ten, a fifth of them zero, one column much larger."""
    rng = np.random.default_rng([7, step])
    grad = rng.normal(size=shape) * 10.0 ** rng.uniform(-4, 1, shape)
    grad[rng.random(shape) < 0.2] = 0.0
    grad[:, shape[1] // 2] *= 1000.0
    return grad.astype(np.float32)


def bits_of(codes: Array, windows: Array) -> Array:
    """Return the bits that the definition says of codes and windows that broadcast, in int64."""
    windows = windows.astype(np.int64)
    shift = np.full(windows.shape, 16)
    for leading in range(1, 8):
        shift[windows >> (16 - leading) == (1 << leading) - 1] = 16 + leading
    unit = np.minimum(24 - shift, 4)
    base = (windows % (1 << (31 - shift - unit))) << unit
    coarse = (windows >> (31 - shift - unit)) % (1 << unit) << (8 - unit)
    steps = base + codes + np.minimum(codes, coarse)
    return np.where(codes == 0, 0, steps << shift)


def decoded(codes: Array, windows: Array) -> Array:
    """Return what the definition says of codes and windows that broadcast, in float32."""
    return bits_of(codes, windows).astype(np.uint32).view(np.float32)


def occurring() -> Array:
    """Return the windows all of whose codes stand for numbers that are kept."""
    windows = np.arange(1, 1 << 16, dtype=np.uint16)
    lowest, highest = bits_of(np.array([1, 255]), windows[:, None]).T
    kept: Array = windows[(lowest >= 1 << 24) & (highest <= LARGEST)]
    return kept


def test_every_window_decodes_as_defined() -> None:
    codes = [0, 1, 2, 128, 254, 255]
    windows = occurring()
    found = decoded(np.array(codes, np.uint8), windows[:, None])
    assert len(windows) > 50000
    for window, row in zip(windows.tolist(), found.tolist(), strict=True):
        assert [codecs.decode_second(code, window) for code in codes] == row


@pytest.mark.usefixtures("instruction_set")
def test_every_code_in_every_window_survives_a_step_that_changes_nothing() -> None:
    """All that can be told apart is read and written by the kernel: m/√v through the parameter."""
    windows = occurring()
    for part in np.array_split(windows, 4):
        kept = Moments(2 * len(part), BLOCK)
        kept.codes[1][:] = np.tile(every_code.astype(np.uint8).reshape(2, BLOCK), (len(part), 1))
        kept.scales[1][:, 0] = np.repeat(part, 2)
        kept.codes[0][:] = np.where(kept.codes[1] > 0, 64, 0)  # all move, m = 64²·scale·S
        kept.scales[0][:] = 2.0**-12
        before = kept.second()
        rest = Scalars(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, step=1.0)
        take([kept], rest)
        assert np.array_equal(kept.second(), before)
        assert (np.abs(kept.codes[0] - np.where(before > 0, 127, 0)) <= 1).all()
        alive = before > 0  # where both are zero the quotient is the guard's to refuse
        unit = 2.0 ** (np.frexp(before[alive])[1] // 2)  # the power of two nearest the root
        np.testing.assert_allclose(kept.param[alive], -unit / np.sqrt(before[alive]), rtol=3e-7)


def test_what_rests_keeps_its_second_moment_down_to_a_bound() -> None:
    """Beside one of 16,000 times its gradients; what lies lower is lifted to that."""
    block = codecs.encode_moments([[0.5, 0.0, 0.0], [1.0, 2.0**-28, 2.0**-60]], [NEAREST] * 3)
    one, bound, lower = (codecs.decode_second(c, block.windows[0]) for c in block.seconds[0])
    assert (one, bound) == (1.0, 2.0**-28)
    assert 2.0**-30 < lower <= bound


@pytest.mark.parametrize("scale_exponent", [-50, -20, 0, 13, 40])
@pytest.mark.parametrize("v", [2.0**-100, 1.61 * 2.0**-31, 1.0, 1.99, 2.0, 3.99, 1.61 * 2.0**100])
def test_every_first_code_comes_back(scale_exponent: int, v: float) -> None:
    """Where v has not moved and rounding is to nearest, at any size of the block's scale."""
    scale = float(np.float32(1.37 * 2.0**scale_exponent))
    v = float(np.float32(v))
    first = list(range(-127, 128))
    m = [codecs.decode_first(code, scale, v) for code in first]
    for part in (slice(0, 128), slice(127, 255)):  # each holds a largest code
        block = codecs.encode_moments([m[part], [v] * 128], [NEAREST] * 128)
        assert block.first == first[part]


@pytest.mark.usefixtures("instruction_set")
def test_codes_do_not_depend_on_the_scale_of_the_gradients() -> None:
    """Gradients and eps times 2ᵏ: the same codes, scales and parameters, bit for bit."""
    exponents = range(-30, 41)
    parts = {k: Moments(3, 300) for k in exponents}
    for step in range(1, 9):
        grad = gradients((3, 300), step)
        for k, part in parts.items():
            part.grad[:] = grad * np.float32(2.0**k)
            take([part], scalars(step, eps=1e-8 * 2.0**k))
        for k, part in parts.items():
            pairs = zip(part.everything()[:4], parts[0].everything()[:4], strict=True)
            assert all(np.array_equal(mine, unscaled) for mine, unscaled in pairs), (k, step)
            assert np.array_equal(part.second(), parts[0].second() * 4.0**k), (k, step)


@pytest.mark.parametrize("run", [100, 128, 300])
@pytest.mark.usefixtures("instruction_set")
def test_shards_by_rows_encode_as_the_whole(run: int) -> None:
    rows, cuts = 13, (0, 5, 6, 13)
    whole = Moments(rows, run)
    shards = [Moments(b - a, run, first_row=a) for a, b in pairwise(cuts)]
    for step in range(1, 6):
        grad = gradients((rows, run), step)
        whole.grad[:] = grad
        for shard in shards:
            shard.grad[:] = grad[shard.first_row : shard.first_row + shard.rows]
        take([whole], scalars(step))
        take(shards[:: -1 if step % 2 else 1], scalars(step))
        for k, array in enumerate(whole.everything()):
            assert np.array_equal(array, np.concatenate([s.everything()[k] for s in shards]))


def test_threads_and_the_order_of_parameters_change_nothing() -> None:
    found = []
    for threads, order in ((1, 1), (2, 1), (3, -1), (5, -1)):
        parts = [Moments(rows, run, salt=rows) for rows, run in ((64, 300), (1, 1), (200, 128))]
        _core.set_threads(threads)
        try:
            for step in range(1, 4):
                for part in parts:
                    part.grad[:] = gradients(part.grad.shape, step)
                take(parts[::order], scalars(step))
        finally:
            _core.set_threads(0)
        found.append([array for part in parts for array in part.everything()])
    for other in found[1:]:
        for mine, one_thread in zip(other, found[0], strict=True):
            assert np.array_equal(mine, one_thread)


@pytest.mark.usefixtures("instruction_set")
def test_zero_stays_zero_and_nothing_else_becomes_zero() -> None:
    """400 steps: elements never touched, touched once, tiny beside an outlier, always."""
    kept = Moments(2, 300)
    never, once, tiny = kept.grad[:, 3::7], kept.grad[:, 4::7], kept.grad[:, 5::7]
    kept.param[:] = 1.0
    for step in range(1, 401):
        kept.grad[:] = gradients((2, 300), step) + np.float32(1e-3)
        never[:], tiny[:] = 0.0, 1e-9
        once[:] = 1.0 if step == 1 else 0.0
        take([kept], scalars(step, decay=0.0))
        second = kept.second()
        assert not kept.codes[0][:, 3::7].any()
        assert not second[:, 3::7].any()
        assert (kept.param[:, 3::7] == 1.0).all()
        assert (np.delete(second, np.s_[3::7], axis=1) > 0).all(), step
    assert not kept.codes[0][:, 4::7].any()  # momentum of 0.9⁴⁰⁰ has died out, and exactly


kept_numbers = st.floats(2.0**-125, 2.0**125, width=32) | st.just(0.0)
signed_numbers = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


@given(
    st.lists(st.tuples(signed_numbers, kept_numbers), min_size=1, max_size=16),
    st.integers(0, 2**32 - 1),
)
def test_any_block_keeps_its_zeros_its_signs_and_its_size(
    pairs: list[tuple[float, float]], word: int
) -> None:
    m, v = [each[0] for each in pairs], [each[1] for each in pairs]
    block = codecs.encode_moments([m, v], [word] * len(m))
    highest = max(v)
    for mi, vi, first, second in zip(m, v, block.first, block.seconds[0], strict=True):
        back = codecs.decode_second(second, block.windows[0])
        if abs(mi) < 2.0**63 * math.sqrt(vi):
            assert (back == 0) == (vi == 0)
        assert first * mi >= 0
        assert first == 0 or vi > 0
        assert back <= highest * 2.0
        # Dormant elements may be lifted to the window; what moves keeps its binade or the next.
        if back and mi / math.sqrt(vi) > 2.0**-100:
            assert vi / 2 <= back <= 2 * vi


@pytest.mark.parametrize("octaves", [1, 3, 12, 40, 100, 240])
def test_rounding_is_unbiased(octaves: int) -> None:
    """Over all 65,536 patterns of the bits that round, from the lowest number to the largest."""
    words = [upper << 16 | 0x8000 for upper in range(1 << 16)]
    low = 5 << 23 | 0x123456
    high = low + (octaves << 23)
    window = codecs.window_of([low, high], [True, True])
    grid = bits_of(every_code[1:], np.array([window]))
    steps = np.diff(grid)
    edge = int(grid[np.argmin(steps == steps[0])]) if np.ptp(steps) else high
    for bits in (low, low + (octaves << 21) + 77, edge - 5, edge, edge + 12345, high):
        below, above = int(grid[grid <= bits][-1]), int(grid[grid > bits][0])
        codes = codecs.encode_second([bits] * len(words), window, words)
        found = [below, above] if bits > below else [below]
        assert set(bits_of(np.array(codes), np.array([window])).tolist()) <= set(found)
        share = sum(int(grid[code - 1]) == above for code in codes) / len(words)
        assert share == pytest.approx((bits - below) / (above - below), abs=2.0**-15)
