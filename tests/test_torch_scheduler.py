"""The scheduler counts what the optimizer applied, and resumes from that number alone."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import ebbtide.torch
from ebbtide.schedules import WSD, Constant, Cosine, CosineRestarts, CycleNormalized, Linear, Warmup
from ebbtide.torch.scheduler import Scheduler

OPTIMIZERS = [
    torch.optim.AdamW,
    torch.optim.SGD,
    ebbtide.torch.AdamW,
    ebbtide.torch.Adam,
    ebbtide.torch.SGD,
]
each_optimizer = pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda c: c.__module__)


def parameter(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((3,), value))


def take_step(optimizer: torch.optim.Optimizer, grad: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, grad)
    optimizer.step()


def lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


@each_optimizer
def test_every_group_follows_the_schedule_from_its_own_value(optimizer_class: Any) -> None:
    optimizer = optimizer_class(
        [{"params": [parameter()]}, {"params": [parameter()], "lr": 1e-2, "weight_decay": 0.5}],
        lr=1e-3,
        weight_decay=0.25,
    )
    lr, weight_decay = Warmup(3, Cosine(7)), Linear(10)
    Scheduler(optimizer, lr=lr, weight_decay=weight_decay)
    for t in range(12):
        assert lrs(optimizer) == pytest.approx([1e-3 * lr(t), 1e-2 * lr(t)], rel=1e-15)
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == pytest.approx([0.25 * weight_decay(t), 0.5 * weight_decay(t)], rel=1e-15)
        take_step(optimizer)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, ebbtide.torch.AdamW])
def test_betas_follow_values(optimizer_class: Any) -> None:
    optimizer = optimizer_class([parameter()], betas=(0.9, 0.999))
    Scheduler(optimizer, betas=(Linear(10, start=0.85, end=0.95), None))
    take_step(optimizer)
    take_step(optimizer)
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.87, 0.999), rel=1e-15)
    assert lrs(optimizer) == [1e-3]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[list[float]]:
    seen = []
    for t in steps:
        seen.append(lrs(optimizer))
        take_step(optimizer, grad=math.sin(t))
    return seen


def saved(optimizer: torch.optim.Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_optimizer
@pytest.mark.parametrize("when", ["optimizer, then scheduler", "scheduler, then optimizer"])
def test_resume_is_the_step_number(optimizer_class: Any, when: str) -> None:
    schedule = Warmup(5, CosineRestarts(4, 2))
    whole_param, param = parameter(), parameter()
    whole = optimizer_class([whole_param], lr=1e-2)
    Scheduler(whole, lr=schedule)
    wanted = train(whole, range(20))

    optimizer = optimizer_class([param], lr=1e-2)
    scheduler = Scheduler(optimizer, lr=schedule)
    seen = train(optimizer, range(7))
    optimizer_state, scheduler_state = saved(optimizer), scheduler.state_dict()
    assert scheduler_state == {"step": 7}

    # Another value at construction, to see that the file's is taken.
    optimizer = optimizer_class([param], lr=5e-2)
    if when.startswith("optimizer"):
        optimizer.load_state_dict(optimizer_state)
        Scheduler(optimizer, lr=schedule, step=scheduler_state["step"])
    else:
        scheduler = Scheduler(optimizer, lr=schedule)
        optimizer.load_state_dict(optimizer_state)
        scheduler.load_state_dict(scheduler_state)
    assert seen + train(optimizer, range(7, 20)) == wanted
    assert torch.equal(param, whole_param)


@each_optimizer
def test_calling_step_as_well_changes_nothing(optimizer_class: Any) -> None:
    optimizer = optimizer_class([parameter()], lr=1.0)
    scheduler = Scheduler(optimizer, lr=Linear(10))
    for t in range(5):
        assert lrs(optimizer) == [pytest.approx(1 - t / 10)]
        take_step(optimizer)
        for _ in range(3):
            scheduler.step()
    assert scheduler.applied_steps == 5
    assert scheduler.get_last_lr() == [pytest.approx(0.5)]


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.AdamW([p]),
        lambda p: torch.optim.AdamW([p], fused=True),
        lambda p: ebbtide.torch.AdamW([p]),
    ],
    ids=["unscaled by the scaler", "unscaled by torch's step", "unscaled by our step"],
)
def test_a_step_that_the_loss_scaler_skips_does_not_count(build: Any) -> None:
    param = parameter()
    optimizer = build(param)
    scheduler = Scheduler(optimizer, lr=Linear(10))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for grad in (1.0, math.inf, 1.0, math.inf, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale((param * grad).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scheduler.applied_steps == 3
    assert lrs(optimizer) == [pytest.approx(1e-3 * 0.7)]


def test_a_step_skipped_for_non_finite_gradients_does_not_count() -> None:
    optimizer = ebbtide.torch.AdamW([parameter()], nonfinite="skip")
    scheduler = Scheduler(optimizer, lr=Linear(10))
    for grad in (1.0, math.nan, 1.0):
        take_step(optimizer, grad)
    assert scheduler.applied_steps == 2


@pytest.mark.parametrize("make_lr", [float, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, ebbtide.torch.AdamW])
def test_the_step_that_creates_state_for_a_checkpoint_does_not_count(
    optimizer_class: Any, make_lr: Any
) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = optimizer_class(model.parameters(), lr=make_lr(1e-3))
    scheduler = Scheduler(optimizer, lr=Warmup(4, Cosine(8)))
    before = [param.detach().clone() for param in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert scheduler.applied_steps == 0
    assert lrs(optimizer) == [pytest.approx(1e-3 / 4)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_schedule_that_asks_for_lr_zero_goes_on() -> None:
    optimizer = torch.optim.AdamW([parameter()])
    scheduler = Scheduler(optimizer, lr=Linear(4, start=0.0, end=1.0))
    take_step(optimizer)
    assert scheduler.applied_steps == 1
    assert lrs(optimizer) == [pytest.approx(1e-3 / 4)]


@each_optimizer
def test_a_group_added_late_is_driven_from_its_first_step(optimizer_class: Any) -> None:
    optimizer = optimizer_class([parameter()], lr=1e-3)
    Scheduler(optimizer, lr=Linear(10))
    for _ in range(4):
        take_step(optimizer)
    late = parameter()
    optimizer.add_param_group({"params": [late], "lr": 1e-2})
    during_the_step: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda opt, *_: during_the_step.append(lrs(opt)))
    take_step(optimizer)
    assert during_the_step == [pytest.approx([1e-3 * 0.6, 1e-2 * 0.6])]
    assert lrs(optimizer) == pytest.approx([1e-3 * 0.5, 1e-2 * 0.5])


def test_the_horizon_is_extended_on_the_plateau() -> None:
    optimizer = torch.optim.AdamW([parameter()], lr=1.0)
    scheduler = Scheduler(optimizer, lr=WSD(2, 6, 4))
    for _ in range(5):
        take_step(optimizer)
    scheduler.extend(lr=WSD(2, 16, 4))
    seen = []
    for _ in range(17):
        seen.append(lrs(optimizer)[0])
        take_step(optimizer)
    assert seen == pytest.approx([1.0] * 14 + [0.75, 0.5, 0.25])


def test_tensor_hyperparameters_are_written_in_place() -> None:
    lr, decay = torch.tensor(1e-2), torch.tensor(0.5)
    optimizer = torch.optim.SGD([parameter()], lr=lr, weight_decay=decay)
    Scheduler(optimizer, lr=Linear(10), weight_decay=Linear(5))
    take_step(optimizer)
    group = optimizer.param_groups[0]
    assert group["lr"] is lr
    assert group["weight_decay"] is decay
    assert lr.item() == pytest.approx(9e-3)
    assert decay.item() == pytest.approx(0.4)

    betas = (torch.tensor(0.9), torch.tensor(0.999))
    adamw = torch.optim.AdamW([parameter()], betas=betas, foreach=False)
    beta1, beta2 = adamw.param_groups[0]["betas"]
    Scheduler(adamw, betas=(None, Linear(10, start=0.8, end=0.9)))
    assert all(a is b for a, b in zip(adamw.param_groups[0]["betas"], (beta1, beta2), strict=True))
    assert (beta1.item(), beta2.item()) == pytest.approx((0.9, 0.8))


def test_adamwr_with_zero_gradients_is_the_product_of_the_paper() -> None:
    param = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = ebbtide.torch.AdamW([param], lr=1e-3, weight_decay=0.05, decay_policy="independent")
    restarts = CosineRestarts(20, 2)
    Scheduler(optimizer, lr=restarts, weight_decay=CycleNormalized(restarts))
    kept = 1.0
    for length in (20, 40, 80):
        for t in range(length):
            eta = 0.5 + 0.5 * math.cos(math.pi * t / length)
            kept *= 1 - eta * 0.05 * math.sqrt(1 / length)
            take_step(optimizer, grad=0.0)
    assert param.detach().tolist() == pytest.approx([kept] * 5, rel=1e-12)


def test_base_lr_of_a_group_stays_when_its_lr_is_driven() -> None:
    optimizer = ebbtide.torch.AdamW([parameter()], lr=1e-2, decay_policy="independent")
    Scheduler(optimizer, lr=Warmup(4, Constant()))
    for _ in range(3):
        take_step(optimizer)
    assert optimizer.param_groups[0]["base_lr"] == 1e-2


def test_plot_shows_what_was_applied_and_what_will_be(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(
        [{"params": [parameter()], "name": "decay"}, {"params": [parameter()], "lr": 1e-2}]
    )
    scheduler = Scheduler(optimizer, lr=Linear(20), weight_decay=Cosine(20))
    for t in range(8):
        if t == 5:
            # Not what the schedule says: the picture must show what was really applied.
            optimizer.param_groups[0]["lr"] = 5e-4
            with pytest.warns(UserWarning, match="lr=0.0005, not the 0.00075 of the Scheduler"):
                take_step(optimizer)
        else:
            take_step(optimizer)
    picture = tmp_path / "schedule.png"
    figure = scheduler.plot(20, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    applied, planned = figure.axes[0].lines[0], figure.axes[0].lines[1]
    assert list(applied.get_xdata()) == list(range(8))
    wanted = [1e-3 * (1 - t / 20) for t in range(20)]
    assert applied.get_ydata()[5] == 5e-4
    assert [y for t, y in enumerate(applied.get_ydata()) if t != 5] == pytest.approx(
        wanted[:5] + wanted[6:8]
    )
    assert list(planned.get_xdata()) == list(range(7, 20))
    assert list(planned.get_ydata()) == pytest.approx(wanted[7:])


def test_the_record_for_the_picture_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebbtide.torch.scheduler._MOST_RECORDS", 16)
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = Scheduler(optimizer, lr=Linear(200))
    for _ in range(100):
        take_step(optimizer)
    applied = scheduler.plot(200).axes[0].lines[0]
    steps = list(applied.get_xdata())
    assert len(steps) < 16
    assert steps[0] == 0
    assert steps[-1] >= 80
    assert list(applied.get_ydata()) == pytest.approx([1 - t / 200 for t in steps])


def test_misuse_is_refused_by_name() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1e-3)
    with pytest.raises(ValueError, match="pass a schedule"):
        Scheduler(optimizer)
    with pytest.raises(TypeError, match="not a torch"):
        Scheduler("optimizer", lr=Constant())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no 'betas'"):
        Scheduler(optimizer, betas=(Constant(0.9), None))
    with pytest.raises(ValueError, match="returned -1"):
        Scheduler(optimizer, lr=Constant(-1.0))
    with pytest.raises(ValueError, match="beta1 returned 1"):
        Scheduler(torch.optim.AdamW([parameter()]), betas=(Constant(1.0), None))
    with pytest.raises(TypeError, match=r"lr must be a schedule, .* got 'cosine'; parse_schedule"):
        Scheduler(optimizer, lr="cosine")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"beta1 must be a schedule, .* got 0\.9"):
        Scheduler(optimizer, betas=(0.9, 0.95))  # type: ignore[arg-type]
    for betas in (Cosine(10), (Cosine(10),), (), {Cosine(10), None}):
        with pytest.raises(TypeError, match=r"betas must be two schedules, of β1 and of β2, got"):
            Scheduler(optimizer, betas=betas)  # type: ignore[arg-type]
    for step in (-1, 1.5, True, math.nan, math.inf, "5"):
        with pytest.raises(ValueError, match="whole number"):
            Scheduler(optimizer, lr=Constant(), step=step)  # type: ignore[arg-type]


def test_what_cannot_be_driven_or_loaded_leaves_the_scheduler_as_it_was() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    scheduler = Scheduler(optimizer, lr=Linear(10), step=2)
    with pytest.raises(TypeError, match=r"lr must be a schedule, .* got 0\.1"):
        scheduler.extend(lr=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Scheduler's state is its 'step'; this one has"):
        scheduler.load_state_dict({"last_epoch": 4, "base_lrs": [1.0]})
    for what in ("ckpt.pt", "step.pt", None, ["step"], 4):
        with pytest.raises(ValueError, match=r"no Scheduler's state but a \w+; a file"):
            scheduler.load_state_dict(what)  # type: ignore[arg-type]
    take_step(optimizer)
    assert (scheduler.applied_steps, lrs(optimizer)) == (3, [pytest.approx(0.7)])


@each_optimizer
def test_another_scheduler_on_the_same_optimizer_is_warned_about_once(optimizer_class: Any) -> None:
    optimizer = optimizer_class([parameter()], lr=1.0)
    Scheduler(optimizer, lr=Linear(10))
    theirs = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    take_step(optimizer)
    theirs.step()
    with pytest.warns(UserWarning, match="something else sets it too"):
        take_step(optimizer)
    theirs.step()
    take_step(optimizer)


@each_optimizer
@pytest.mark.parametrize("lr", ["1e-3", None])
def test_what_is_no_learning_rate_is_left_to_the_optimizer(optimizer_class: Any, lr: Any) -> None:
    optimizer = optimizer_class([parameter()])
    Scheduler(optimizer, lr=Cosine(10))
    optimizer.param_groups[0]["lr"] = lr
    with pytest.raises((TypeError, ValueError, RuntimeError)) as refusal:
        take_step(optimizer)
    assert "scheduler.py" not in str(refusal.traceback[-1].path)


class Unread(torch.Tensor):
    """On a device whose numbers take long to come."""

    def __bool__(self) -> bool:
        raise AssertionError("the host waits")


@each_optimizer
def test_a_step_does_not_wait_for_a_tensor_to_be_compared(optimizer_class: Any) -> None:
    optimizer = optimizer_class([parameter()], lr=torch.tensor(0.1))
    Scheduler(optimizer, lr=Cosine(10))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(Unread)
    take_step(optimizer)


def test_the_first_that_is_set_by_others_is_named() -> None:
    """Not one that changes from process to process."""
    optimizer = torch.optim.AdamW([parameter()])
    Scheduler(optimizer, weight_decay=Linear(5), lr=Linear(10))
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.5)
    with pytest.warns(UserWarning, match="takes this step with lr="):
        take_step(optimizer)


def test_schedulers_of_different_things_get_along() -> None:
    optimizer = torch.optim.AdamW([parameter()], lr=1.0)
    Scheduler(optimizer, lr=Linear(10))
    Scheduler(optimizer, weight_decay=Linear(5))
    for _ in range(3):
        take_step(optimizer)
    assert lrs(optimizer) == [pytest.approx(0.7)]
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.01 * 0.4)
