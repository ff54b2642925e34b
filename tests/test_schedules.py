"""The schedules against their formulas, and the warm restarts at every boundary."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbtide.schedules import (
    WSD,
    Constant,
    Cosine,
    CosineRestarts,
    CycleNormalized,
    InverseSqrt,
    Join,
    Linear,
    Polynomial,
    Reciprocal,
    Schedule,
    Warmup,
    parse_schedule,
)

FIRST_CYCLES = range(1, 21)
CYCLE_FACTORS = range(1, 11)

EVERY_SCHEDULE: list[Schedule] = [
    Constant(0.5),
    Linear(100),
    Cosine(100, end=0.1),
    Polynomial(100, power=2.5),
    InverseSqrt(10),
    Warmup(10, Cosine(90)),
    WSD(10, 60, 30),
    WSD(10, 60, 30, end=0.1, shape="sqrt"),
    CosineRestarts(7, 3, end=0.05, peak_decay=0.8),
    CycleNormalized(CosineRestarts(7, 3)),
    Reciprocal(Linear(100), most=5.0),
    Join((Constant(), Linear(50)), (50,)),
]


def boundaries(first: int, factor: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield (step at which a cycle begins, its length), in whole numbers."""
    start, length = 0, first
    for _ in range(count):
        yield start, length
        start, length = start + length, length * factor


@pytest.mark.parametrize("factor", CYCLE_FACTORS)
@pytest.mark.parametrize("first", FIRST_CYCLES)
def test_restarts_are_exact_at_every_boundary(first: int, factor: int) -> None:
    schedule = CosineRestarts(first, factor)
    for number, (start, length) in enumerate(boundaries(first, factor, 12)):
        assert schedule(start) == 1.0
        assert schedule.cycle(start) == (number, start, length)
        assert schedule.cycle(start + length - 1) == (number, start, length)
        assert schedule(start + length - 1) == pytest.approx(
            0.5 * (1 + math.cos(math.pi * (length - 1) / length)), abs=1e-15
        )


@pytest.mark.parametrize("factor", CYCLE_FACTORS)
@pytest.mark.parametrize("first", FIRST_CYCLES)
def test_restarts_are_exact_just_before_a_boundary(first: int, factor: int) -> None:
    schedule = CosineRestarts(first, factor)
    for start, length in boundaries(first, factor, 12):
        just_before = math.nextafter(start + length, 0)
        assert schedule.cycle(just_before).start == start
        assert schedule(just_before) < 1e-15
        assert schedule(start + length / 2) == pytest.approx(0.5, abs=1e-12)


def test_restarts_with_fractional_first_cycle_follow_its_exact_value() -> None:
    schedule = CosineRestarts(0.1, 3)
    end_of_third = Fraction(0.1) * (1 + 3 + 9)
    just_below, just_above = math.nextafter(float(end_of_third), 0), float(end_of_third)
    if Fraction(just_above) < end_of_third:
        just_below, just_above = just_above, math.nextafter(just_above, 2)
    assert schedule.cycle(just_below).number == 2
    assert schedule.cycle(just_above).number == 3


def test_restart_peaks_decay_towards_the_end_value() -> None:
    schedule = CosineRestarts(10, 2, end=0.1, peak_decay=0.5)
    peaks = [schedule(start) for start, _ in boundaries(10, 2, 4)]
    assert peaks == pytest.approx([0.1 + 0.9 * 0.5**i for i in range(4)], abs=1e-15)


def test_restarts_of_the_paper_end_where_it_says() -> None:
    # Loshchilov & Hutter 2019: T_0 = 100, T_mult = 2 has its good snapshots at these epochs.
    schedule = CosineRestarts(100, 2)
    starts = {schedule.cycle(t).start for t in range(1, 1501)}
    assert starts == {0, 100, 300, 700, 1500}


@pytest.mark.parametrize("factor", [1, 2, 3, 10])
def test_normalised_decay_jumps_with_the_root_of_the_cycle_lengths(factor: int) -> None:
    normalized = CycleNormalized(CosineRestarts(100, factor))
    for start, length in boundaries(100, factor, 4):
        jump = normalized(start + length) / normalized(start + length - 1)
        assert jump == pytest.approx(math.sqrt(length / (length * factor)), rel=1e-15)


def test_normalised_decay_counts_batches_where_cycles_are_in_epochs() -> None:
    in_epochs = CycleNormalized(CosineRestarts(10, 2), batches=50)
    in_steps = CycleNormalized(CosineRestarts(500, 2))
    assert [in_epochs(t / 50) for t in (0, 499, 500, 1499, 1500)] == pytest.approx(
        [in_steps(t) for t in (0, 499, 500, 1499, 1500)], rel=1e-15
    )


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        (Linear(8), 2.5, 1 - 2.5 / 8),
        (Linear(8, start=0.2, end=0.6), 8, 0.6),
        (Cosine(10), 2.5, 0.5 * (1 + math.cos(math.pi / 4))),
        (Cosine(10, end=0.1), 10, 0.1),
        (Cosine(10, end=0.1), 1e9, 0.1),
        (Polynomial(10, power=3), 2.5, 0.75**3),
        (Polynomial(10, power=3, end=0.5), 10, 0.5),
        (InverseSqrt(4), 0, 1.0),
        (InverseSqrt(4), 5, 2 / 3),
        (Warmup(5, Constant()), 0, 0.2),
        (Warmup(5, Constant()), 1.5, 0.5),
        (Warmup(5, Linear(10, start=2.0)), 4.5, 2.0),
        (Warmup(5, Linear(10)), 7.5, 0.75),
        (Warmup(0, Linear(10)), 0, 1.0),
        (Warmup(4, Constant(), start=0.5), 1, 0.75),
        (WSD(5, 10, 4), 3.5, 0.9),
        (WSD(5, 10, 4), 14.9, 1.0),
        (WSD(5, 10, 4), 16, 0.75),
        (WSD(0, 0, 4), 0, 1.0),
        (WSD(5, 10, 4, shape="sqrt"), 16, 0.5),
        (WSD(5, 10, 4, end=0.2), 99, 0.2),
        (Join((Linear(4), Linear(4)), (4,)), 3.5, 0.125),
        (Join((Linear(4), Linear(4)), (4,)), 4, 1.0),
    ],
    ids=repr,
)
def test_schedule_has_the_value_of_its_formula(
    schedule: Schedule, step: float, value: float
) -> None:
    assert schedule(step) == pytest.approx(value, rel=1e-15, abs=1e-15)


def test_transformer_schedule_is_warmup_and_inverse_sqrt() -> None:
    schedule, warmup = Warmup(4000, InverseSqrt(4000)), 4000
    for step in (0, 17, 3998, 4001, 5000, 100_000):
        paper = min((step + 1) ** -0.5, (step + 1) * warmup**-1.5) * math.sqrt(warmup)
        assert schedule(step) == pytest.approx(paper, rel=1.3e-4)


def test_reciprocal_makes_the_product_constant_until_its_limit() -> None:
    lr = Cosine(100)
    decay = Reciprocal(lr, most=50.0)
    assert [lr(t) * decay(t) for t in range(90)] == pytest.approx([1.0] * 90, rel=1e-14)
    assert decay(100) == 50.0


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=repr)
def test_schedule_has_no_hidden_state(schedule: Schedule) -> None:
    steps = [0, 1, 2.5, 9, 10, 49.75, 50, 69, 70, 99, 100, 1000]
    forward = [schedule(t) for t in steps]
    assert [schedule(t) for t in reversed(steps)] == forward[::-1]
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert [copy(t) for t in steps] == forward


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=repr)
@pytest.mark.parametrize("step", [-1, -1e-9, math.nan, math.inf])
def test_schedule_refuses_a_step_that_is_none(schedule: Schedule, step: float) -> None:
    with pytest.raises(ValueError, match="step must be"):
        schedule(step)


@settings(max_examples=200, deadline=None)
@given(
    step=st.floats(0, 1e6, allow_nan=False),
    schedule=st.sampled_from([s for s in EVERY_SCHEDULE if not isinstance(s, Reciprocal)]),
)
def test_multiplier_stays_between_zero_and_one(step: float, schedule: Schedule) -> None:
    assert 0.0 <= schedule(step) <= 1.0


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: Linear(0), "steps"),
        (lambda: Cosine(math.inf), "steps"),
        (lambda: Polynomial(10, power=0), "power"),
        (lambda: InverseSqrt(-1), "steps"),
        (lambda: Warmup(-1, Constant()), "steps"),
        (lambda: WSD(1, 1, 0), "decay_steps"),
        (lambda: WSD(1, 1, 1, shape="exp"), "shape"),
        (lambda: CosineRestarts(0), "first_cycle"),
        (lambda: CosineRestarts(10, 0), "cycle_factor"),
        (lambda: CosineRestarts(10, 1.5), "cycle_factor"),  # type: ignore[arg-type]
        (lambda: CosineRestarts(10, peak_decay=0), "peak_decay"),
        (lambda: CycleNormalized(CosineRestarts(10), batches=0), "batches"),
        (lambda: Reciprocal(Constant(), most=0), "most"),
        (lambda: Join((Constant(), Constant()), ()), "boundaries"),
        (lambda: Join((Constant(), Constant(), Constant()), (5, 5)), "boundaries"),
    ],
)
def test_bad_argument_is_refused_by_name(build: object, names: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=names):
        build()


@pytest.mark.parametrize(
    ("text", "warmup", "schedule"),
    [
        ("constant", 0, Constant()),
        ("constant", 100, Warmup(100, Constant())),
        ("linear", 0, Linear(1000)),
        ("linear:end=0.1", 100, Warmup(100, Linear(900, end=0.1))),
        ("cosine: end=0.1, start=0.5", 0, Cosine(1000, 0.5, 0.1)),
        ("polynomial:power=2", 0, Polynomial(1000, 2)),
        ("inverse-sqrt", 100, Warmup(100, InverseSqrt(100))),
        ("inverse-sqrt:scale=50", 0, InverseSqrt(50)),
        ("wsd:decay=200", 100, WSD(100, 700, 200)),
        ("wsd:decay=20%,shape=sqrt,end=0.1", 0, WSD(0, 800, 200, 0.1, "sqrt")),
        ("restarts:first=10%,factor=2", 0, CosineRestarts(100, 2)),
        ("restarts:first=100,peak=0.5,end=0.01", 0, CosineRestarts(100, 1, 0.01, 0.5)),
    ],
)
def test_schedule_is_read_from_text(text: str, warmup: int, schedule: Schedule) -> None:
    assert parse_schedule(text, total_steps=1000, warmup_steps=warmup) == schedule


@pytest.mark.parametrize(
    ("text", "warmup", "names"),
    [
        ("cosin", 0, "choose from constant, linear, cosine"),
        ("cosine:T=5", 0, "no setting 'T=5'; it has start, end"),
        ("cosine:end", 0, "no setting 'end'"),
        ("cosine:end=low", 0, "end must be a number, got 'low'"),
        ("wsd", 0, "needs decay"),
        ("wsd:decay=2000", 0, "2000 steps does not fit into the run's 1000"),
        ("wsd:decay=100%", 100, "1000 steps does not fit into the 900 steps after the warmup"),
        ("polynomial", 0, "needs power"),
        ("restarts", 0, "needs first"),
        ("inverse-sqrt", 0, "needs a warmup"),
        ("cosine", 1000, "shorter than the run"),
        ("wsd:decay=10%,shape=round", 0, "shape"),
    ],
)
def test_text_that_is_no_schedule_is_refused(text: str, warmup: int, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        parse_schedule(text, total_steps=1000, warmup_steps=warmup)


@pytest.mark.parametrize(
    ("percent", "plain"),
    [
        ("cosine:end=10%", "cosine:end=0.1"),
        ("linear:start=50%,end=1%", "linear:start=0.5,end=0.01"),
        ("polynomial:power=50%", "polynomial:power=0.5"),
        ("wsd:decay=20%,end=5%", "wsd:decay=200,end=0.05"),
        ("restarts:first=10%,factor=2,peak=50%", "restarts:first=100,factor=2,peak=0.5"),
        ("inverse-sqrt:scale=1%", "inverse-sqrt:scale=10"),
    ],
)
def test_a_percent_sign_is_a_share_of_the_run_only_for_a_length(percent: str, plain: str) -> None:
    assert parse_schedule(percent, total_steps=1000) == parse_schedule(plain, total_steps=1000)


@pytest.mark.parametrize("percent", range(1, 100))
def test_a_percentage_of_the_run_is_exactly_that_many_steps(percent: int) -> None:
    restarts = parse_schedule(f"restarts:first={percent}%", total_steps=100)
    assert restarts(percent) == 1.0
    rest = 100 - percent
    decays = parse_schedule(f"wsd:decay={percent}%", total_steps=100, warmup_steps=rest)
    assert decays == WSD(rest, 0, percent)


def test_what_is_no_schedule_is_refused_where_it_is_given() -> None:
    with pytest.raises(TypeError, match=r"then must be a schedule, .* got 0\.5"):
        Warmup(10, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="cycles must be CosineRestarts, got Cosine"):
        CycleNormalized(Cosine(10))  # type: ignore[arg-type]
