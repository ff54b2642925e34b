"""Threads, forked children, and `torch.compile` around a training step."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

from ebbtide.torch import SGD, AdamW


def trained(step: Any = None) -> torch.Tensor:
    """Train a little; `step(optimizer)` takes the steps."""
    params = [nn.Parameter(torch.ones(shape)) for shape in ((64, 1024), (1024,))]
    optimizer = AdamW(params, lr=0.1)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)  # the global one belongs to all threads
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        (step or type(optimizer).step)(optimizer)
    return params[0].detach()


def test_a_step_from_another_thread() -> None:
    def step(optimizer: AdamW) -> None:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join()

    assert torch.equal(trained(step), trained())


def test_several_optimizers_in_several_threads() -> None:
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(trained())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = trained()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_one_optimizer_in_two_threads_is_stepped_whole_or_refused() -> None:
    """Never half: each call either takes its step or raises."""
    param = nn.Parameter(torch.zeros(500_000))
    param.grad = torch.ones(500_000)
    optimizer = SGD([param], lr=1.0)
    optimizer.step()
    refused: list[str] = []

    def step() -> None:
        for _ in range(20):
            try:
                optimizer.step()
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=step) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(refused) <= {"this optimizer is already stepping in another thread"}
    assert torch.equal(param.detach(), torch.full((500_000,), len(refused) - 61.0))


FORK = """
import os, sys, torch
from torch import nn
from ebbtide.torch import AdamW

def trained():
    torch.manual_seed(0)
    param = nn.Parameter(torch.ones(300_000))
    optimizer = AdamW([param], lr=0.1)
    for step in range(3):
        param.grad = torch.full_like(param, 1.0 + step)
        optimizer.step()
    return param, optimizer

torch.set_num_threads(2)
param, optimizer = trained()   # the parent has used threads
expected = param.detach().numpy().tobytes()
child = os.fork()
if child == 0:
    # No torch operation on large tensors here: torch's own would wait for threads that are gone.
    before = param.detach().numpy().copy()
    optimizer.step()
    moved = bool((param.detach().numpy() != before).all())
    os._exit(0 if moved else 3)
_, status = os.waitpid(child, 0)
optimizer.step()
assert param.detach().numpy().tobytes() != expected
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_steps_after_the_parent_has_used_threads() -> None:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=60, check=False)
    assert run.returncode == 0


@pytest.fixture
def dynamo() -> Any:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")  # of the compiler's own modules
def test_torch_compile_around_a_training_step_breaks_its_graph_once_at_ours(dynamo: Any) -> None:
    def train(compiled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        optimizer = AdamW(model.parameters(), lr=0.1)

        def update() -> None:
            optimizer.step()

        if compiled:
            update = torch.compile(update, backend="eager")
        for seed in range(4):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            update()
        return model[0].weight.detach()

    expected = train(compiled=False)
    assert torch.equal(train(compiled=True), expected)
    assert sum(dynamo["graph_break"].values()) == 1
    assert "Optimizer.step" in next(iter(dynamo["graph_break"]))


@pytest.mark.filterwarnings("default")
def test_torch_compile_around_everything(dynamo: Any) -> None:
    def train(compiled: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(inputs: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        call = torch.compile(step, backend="eager") if compiled else step
        return [call(torch.ones(2, 4) * (1 + seed)).item() for seed in range(4)]

    assert train(compiled=True) == pytest.approx(train(compiled=False), rel=1e-6)
    # zero_grad and backward break the graph too, as with torch's own optimizers.
    assert sum("Optimizer.step" in reason for reason in dynamo["graph_break"]) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_compiled_step_method(dynamo: Any) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = AdamW([param])
    step = torch.compile(optimizer.step)
    param.grad = torch.ones(3)
    step()
    step()
    assert optimizer.state[param]["step"] == 2
