"""What only a GPU can show: graphs, streams, steps that the host does not wait for, memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import ebbtide.groups.state_format
from ebbtide.torch import AdamW
from tests.devices import GPU, Run, assert_same_bits, on

pytestmark = pytest.mark.gpu

SHAPES: list[tuple[int, ...]] = [(40, 30), (3,), ()]
WORDS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
LOW_BIT: dict[str, Any] = {
    "dtype": torch.bfloat16, "state_format": "8bit", "master_format": "24bit",
}  # fmt: skip


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ebbtide.groups.state_format, "SMALL_NUMEL", 1024)
    with on(GPU):
        yield


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "words",
    [{}, {"clip_grad_norm": 1.0}, {"nonfinite": "skip"}, {"fused": True}, LOW_BIT],
    ids=str,
)
def test_a_step_never_waits_for_the_device(words: dict[str, Any]) -> None:
    run = Run("AdamW", SHAPES, GPU, **WORDS, **words).step(3)
    run.grads()
    if "clip_grad_norm" in words:
        run.optimizer.clip_grad_norm = 0.5  # which the device has not been told yet
    with refusing_to_wait():
        run.optimizer.step()


@pytest.mark.parametrize("more", [{}, {"clip_grad_norm": 1.0}, LOW_BIT], ids=str)
def test_a_captured_step_is_replayed_with_its_own_count_and_learning_rate(
    more: dict[str, Any],
) -> None:
    def run_of() -> tuple[Run, torch.Tensor]:
        lr = torch.tensor(0.02, device=GPU)
        words = {"lr": lr, "weight_decay": 0.1, "capturable": True, **more}
        run = Run("AdamW", SHAPES, GPU, **words)
        run.grads()
        return run, lr

    captured, lr = run_of()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.optimizer.step()
    for rate in (0.02, 0.01, 0.005):
        lr.fill_(rate)
        graph.replay()
    plain, lr = run_of()
    for rate in (0.02, 0.02, 0.02, 0.02, 0.01, 0.005):
        lr.fill_(rate)
        plain.optimizer.step()
    assert_same_bits(captured.numbers(), plain.numbers())


def test_a_step_runs_on_the_current_stream() -> None:
    run = Run("AdamW", SHAPES, GPU, **WORDS).step()
    stream = torch.cuda.Stream()
    run.grads()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        run.optimizer.step()
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the step did not wait for the work before it on its stream"
    torch.cuda.synchronize()
    assert float(run.optimizer.state[run.params[0]]["step"]) == 2


def test_a_step_allocates_nothing_that_grows_with_the_model() -> None:
    param = torch.zeros(1 << 24, device=GPU, requires_grad=True)
    optimizer = AdamW([param], clip_grad_norm=1.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("state_format", [None, "8bit"])
def test_parameters_beyond_two_to_the_thirty_one_elements(state_format: str | None) -> None:
    shape = ((1 << 16) + 1, 1 << 15)
    param = torch.zeros(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    param.grad = torch.zeros_like(param)
    param.grad[-1, -1] = 1.0
    words: dict[str, Any] = {"state_format": state_format, "clip_grad_norm": 2.0}
    optimizer = AdamW([("w", param)], lr=0.5, weight_decay=0.0, **words)
    optimizer.step()
    assert optimizer.last_grad_norm == 1.0
    assert float(param.detach()[-1, -1]) == pytest.approx(-0.5, rel=2**-7)  # rounded
    assert float(param.detach()[0, 0]) == 0.0


def test_parameters_on_the_cpu_and_the_gpu_in_one_optimizer() -> None:
    both = [torch.ones(300, device=where, requires_grad=True) for where in ("cpu", GPU)]
    optimizer = AdamW(both, clip_grad_norm=1.0, **WORDS)
    for _ in range(3):
        for param in both:
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
    torch.testing.assert_close(both[0], both[1].cpu(), rtol=1e-6, atol=1e-7)
