"""What a GPU decides of a step without the host: dropping, unscaling, clipping, reporting."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ebbtide.torch.rows
from ebbtide.backends.triton.device import Device
from ebbtide.schedules import Cosine
from ebbtide.torch import AdamW, DecayMonitor, Scheduler, step_in_backward
from tests.devices import DEVICES, INTERPRETER, HostReads, Run, assert_same_bits, by_the_core, on
from tests.tolerances import GRAD_NORM, TRITON_CLIPPED

SHAPES: list[tuple[int, ...]] = [(40, 30), (3,), ()]
WORDS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


def run_on(device: str, **words: Any) -> Run:
    return Run("AdamW", SHAPES, device, **{**WORDS, **words})


def spoil(run: Run, index: int, elements: int, value: float = float("nan")) -> None:
    grad = run.params[index].grad
    assert grad is not None
    grad.view(-1)[:elements] = value


def spoilt_step(run: Run, index: int = 0, elements: int = 2, value: float = float("nan")) -> None:
    run.grads()
    spoil(run, index, elements, value)
    run.optimizer.step()


def wait(device: str) -> None:
    if device != INTERPRETER:
        torch.cuda.synchronize()


def test_non_finite_elements_are_left_untouched_and_raised_at_the_next_step(device: str) -> None:
    ours = run_on(device).step()
    spoilt_step(ours, 0, 2)
    wait(device)
    ours.grads()
    with pytest.raises(FloatingPointError, match=r"step 2 in 'w0' \(2 of 1200\); those elements"):
        ours.optimizer.step()
    ours.step()  # reported once
    with by_the_core():
        theirs = run_on(INTERPRETER).step()
        with pytest.raises(FloatingPointError, match=r"step 2 in 'w0' \(2 of 1200\)"):
            spoilt_step(theirs, 0, 2)
        theirs.step(2)
    assert_same_bits(ours.numbers(), theirs.numbers())


def test_reading_whether_a_step_was_skipped_raises_what_it_left_untouched(device: str) -> None:
    run = run_on(device)
    spoilt_step(run, 1, 3, float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 1 in 'w1' \(3 of 3\)"):
        _ = run.optimizer.last_step_skipped
    assert run.optimizer.last_step_skipped is False


def test_of_several_spoilt_steps_the_first_is_named(device: str) -> None:
    run = run_on(device).step()
    spoilt_step(run, 0, 2)
    wait(device)
    with pytest.raises(FloatingPointError, match=r"step 2 in 'w0' \(2 of 1200\); those"):
        spoilt_step(run, 0, 5)
    assert run.optimizer.last_step_skipped is False  # the report was of both


def test_propagate_lets_them_through(device: str) -> None:
    ours = run_on(device, nonfinite="propagate")
    spoilt_step(ours)
    assert ours.params[0].isnan().sum() == 2
    assert ours.optimizer.last_step_skipped is False


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_skip_drops_the_whole_step_and_does_not_count_it(kind: str, device: str) -> None:
    words = {**WORDS, "nonfinite": "skip"}
    words |= {"momentum": 0.9, "dampening": 0.5} if kind == "SGD" else {}

    def run(where: str) -> Run:
        run = Run(kind, SHAPES, where, **words)
        spoilt_step(run, 2, 1)  # the first step of all
        run.step()
        before = run.numbers()
        spoilt_step(run, 0, 1, float("inf"))
        assert run.optimizer.last_step_skipped is True
        assert_same_bits(run.numbers(), before)
        run.step()
        assert run.optimizer.last_step_skipped is False
        assert run.optimizer.skipped_steps == 2
        assert copy.deepcopy(run.optimizer).skipped_steps == 2
        return run

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    mine = ours.numbers()
    for key, value in theirs.numbers().items():
        torch.testing.assert_close(mine[key], value, **TRITON_CLIPPED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_takes_two_more_launches(max_norm: float, dtype: torch.dtype, device: str) -> None:
    words = {**WORDS, "clip_grad_norm": max_norm, "dtype": dtype}
    ours = Run("AdamW", SHAPES, device, **words).step(3)
    with by_the_core():
        theirs = Run("AdamW", SHAPES, INTERPRETER, **words).step(3)
    assert ours.optimizer.last_grad_norm == pytest.approx(
        theirs.optimizer.last_grad_norm, **GRAD_NORM
    )
    assert ours.backend.launches == 9
    mine = ours.numbers()
    for key, value in theirs.numbers().items():
        if dtype == torch.bfloat16 and max_norm == 0.5:
            continue  # a scale one ulp off can round another way
        torch.testing.assert_close(mine[key], value, **TRITON_CLIPPED)


@pytest.mark.parametrize(
    "words",
    [{}, {"clip_grad_norm": 0.5}, {"nonfinite": "skip"}, {"lr": torch.tensor(0.02), "fused": True}],
    ids=str,
)
def test_the_host_reads_no_number_of_a_step(words: dict[str, Any]) -> None:
    with on(INTERPRETER):
        run = run_on(INTERPRETER, **words)
        for _ in range(3):
            run.grads()
            with HostReads() as reads:
                run.optimizer.step()
    assert reads.count == 0


@pytest.mark.parametrize("words", [{}, {"clip_grad_norm": 0.5}], ids=str)
def test_a_schedule_waits_for_nothing_and_a_monitor_for_its_samples_alone(
    words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[Device] = []
    spoilt = Device.spoilt
    monkeypatch.setattr(Device, "spoilt", lambda each: waits.append(each) or spoilt(each))
    with on(INTERPRETER):
        run = run_on(INTERPRETER, **words)
        Scheduler(run.optimizer, lr=Cosine(10))
        monitor = DecayMonitor(run.optimizer, every=3)
        run.step()
        first = monitor.last
        with HostReads() as reads:
            run.step(2)
        assert monitor.last is first
        assert reads.count == len(waits) == 0
        run.step()
        assert monitor.last is not first
    if words:
        assert monitor.last["decay/clip_rate"] == 1


def test_the_norm_over_every_dtype_takes_one_launch(device: str) -> None:
    """Gradients of four dtypes, one of them misaligned, one not a whole tile."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

    def run(where: str) -> Run:
        generator = torch.Generator().manual_seed(0)
        run = Run("SGD", [(3,)], where, clip_grad_norm=0.5, lr=0.1)
        run.grads()
        params = []
        for index, (dtype, size) in enumerate(zip(dtypes, (2060, 1024, 1030, 5), strict=True)):
            memory = torch.randn(size + 1, generator=generator).to(where, dtype)
            params.append(torch.zeros(size, device=where, dtype=dtype).requires_grad_())
            params[-1].grad = memory[index % 2 : size + index % 2]
        run.optimizer.add_param_group({"params": [(f"p{i}", p) for i, p in enumerate(params)]})
        run.optimizer.step()
        return run

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    assert ours.optimizer.last_grad_norm == pytest.approx(
        theirs.optimizer.last_grad_norm, **GRAD_NORM
    )
    assert ours.backend.launches == len(dtypes) + 2


def test_clipping_leaves_out_elements_that_are_not_finite(device: str) -> None:
    ours = run_on(device, clip_grad_norm=0.5)
    spoilt_step(ours, 0, 2)
    with by_the_core():
        theirs = run_on(INTERPRETER, clip_grad_norm=0.5)
        with pytest.raises(FloatingPointError):
            spoilt_step(theirs, 0, 2)
    assert ours.optimizer.last_grad_norm == pytest.approx(
        theirs.optimizer.last_grad_norm, **GRAD_NORM
    )
    mine = ours.numbers()
    for key, value in theirs.numbers().items():
        torch.testing.assert_close(mine[key], value, **TRITON_CLIPPED)
    with pytest.raises(FloatingPointError):
        _ = ours.optimizer.last_step_skipped


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_a_grad_scaler_unscales_and_drops_on_the_device(
    kind: str, clip: float | None, device: str
) -> None:
    """What `torch.amp.GradScaler` leaves on an optimizer with `fused=True`."""

    def run(where: str) -> Run:
        run = Run(kind, SHAPES, where, fused=True, clip_grad_norm=clip, **WORDS)
        for found in (0.0, 1.0, 0.0):
            run.grads()
            for param in run.params:
                param.grad = param.grad * 1024.0
            if found:
                spoil(run, 0, 1)
            run.optimizer.found_inf = torch.tensor(found, device=where)
            run.optimizer.grad_scale = torch.tensor(1024.0, device=where)
            run.optimizer.step()
            assert run.optimizer.last_step_skipped is bool(found)
            del run.optimizer.found_inf, run.optimizer.grad_scale
        return run

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    mine = ours.numbers()
    for key, value in theirs.numbers().items():
        torch.testing.assert_close(mine[key], value, **TRITON_CLIPPED)
    assert ours.backend.launches == (9 if clip else 6)


@pytest.mark.parametrize(
    "words",
    [{}, {"clip_grad_norm": 0.5}, {"nonfinite": "skip"}, {"nonfinite": "skip", "fused": True}],
    ids=str,
)
def test_a_gpu_and_the_cpu_step_one_optimizer_together(
    words: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter is left the matrix alone: the rest is the compiled core's, as on the CPU.

    The host reads one number of a step where a norm over both is asked for, and else none.
    """
    with on(INTERPRETER):
        ours = run_on(INTERPRETER, **words)
        matrix = ours.params[0]
        monkeypatch.setattr(
            ebbtide.torch.rows, "launches", lambda param, grad, group: param is matrix
        )
        skipped, reads = [], HostReads()
        for step in range(4):
            ours.grads()
            if step in (1, 2) and "nonfinite" in words:
                spoil(ours, 2 * (step - 1), 1)  # on the one, then on the other
            with reads:
                ours.optimizer.step()
            skipped.append(ours.optimizer.last_step_skipped)
        with by_the_core():
            theirs = run_on(INTERPRETER, **words)
            for step in range(4):
                theirs.grads()
                if step in (1, 2) and "nonfinite" in words:
                    spoil(theirs, 2 * (step - 1), 1)
                theirs.optimizer.step()
    assert ours.backend.launches >= 2
    assert reads.count == (4 if words else 0)
    assert skipped == [False, "nonfinite" in words, "nonfinite" in words, False]
    assert ours.optimizer.skipped_steps == theirs.optimizer.skipped_steps
    if "clip_grad_norm" in words:
        norms = ours.optimizer.last_grad_norm, theirs.optimizer.last_grad_norm
        assert norms[0] == pytest.approx(norms[1], **GRAD_NORM)
    mine = ours.numbers()
    for key, value in theirs.numbers().items():
        torch.testing.assert_close(mine[key], value, **TRITON_CLIPPED)


def test_each_of_a_gpu_and_the_cpu_raises_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    with on(INTERPRETER):
        run = run_on(INTERPRETER)
        matrix = run.params[0]
        monkeypatch.setattr(
            ebbtide.torch.rows, "launches", lambda param, grad, group: param is matrix
        )
        with pytest.raises(FloatingPointError, match=r"step 1 in 'w1' \(1 of 3\)"):
            spoilt_step(run, 1, 1)
        spoilt_step(run, 0, 2)
        with pytest.raises(FloatingPointError, match=r"step 2 in 'w0' \(2 of 1200\)"):
            run.step()
        run.step()


def test_stepping_inside_backward_takes_the_same_steps(device: str) -> None:
    def run(where: str, inside: bool) -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Linear(30, 5).to(where)
        optimizer = AdamW(model.named_parameters(), **WORDS)
        if inside:
            step_in_backward(model, optimizer)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            x = torch.randn(7, 30, generator=generator).to(where)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.cpu()

    ours, theirs = run(device, True), run(device, False)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
