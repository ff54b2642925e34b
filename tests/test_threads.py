"""Threads: one runtime in the process, settings respected, forked children that do not hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from ebbtide import _core
from ebbtide.torch import AdamW

# A step of enough elements that it runs in parallel, on either face.
NUMPY_STEP = """
import numpy as np
from ebbtide.numpy import AdamW as NumpyAdamW
array = np.ones((512, 512), np.float32)
NumpyAdamW([array]).step([np.ones_like(array)])
"""
TORCH_STEP = """
import torch
from ebbtide.torch import AdamW
param = torch.ones(512, 512, requires_grad=True)
optimizer = AdamW([param])
param.grad = torch.ones_like(param)
optimizer.step()
"""
RUNTIMES = """
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert len(runtimes) == 1, runtimes
"""


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; a hang ends the test."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [NUMPY_STEP + TORCH_STEP, TORCH_STEP + NUMPY_STEP, "import torch\n" + NUMPY_STEP],
    ids=["numpy first", "torch first", "torch imported"],
)
def test_there_is_one_thread_runtime_whatever_is_imported_first(code: str) -> None:
    run(code + RUNTIMES)


def test_importing_starts_no_thread_runtime() -> None:
    run('import ebbtide.numpy\nassert "libgomp" not in open("/proc/self/maps").read()')


def test_torchs_number_of_threads_is_respected() -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert _core.threads() == count
    finally:
        torch.set_num_threads(before)


def test_the_environments_number_of_threads_is_respected() -> None:
    code = NUMPY_STEP + "from ebbtide import _core\nprint(_core.threads())"
    assert run(code, OMP_NUM_THREADS="1") == "1"


def test_affinity_is_respected() -> None:
    code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + NUMPY_STEP
    assert run(code + "from ebbtide import _core\nprint(_core.threads())") == "1"


FORK = """
import os, signal
pid = os.fork()
if pid == 0:
    signal.alarm(20)  # a child that hangs ends by a signal, which the parent sees
    optimizer.step()  # with the gradient it has: torch's own operations would hang here
    os._exit(0 if optimizer.state[param]["step"] == 2 else 1)
assert os.waitpid(pid, 0)[1] == 0
optimizer.step()
assert optimizer.state[param]["step"] == 2
"""


def test_a_child_forked_after_parallel_steps_can_step() -> None:
    run(TORCH_STEP + FORK)


def test_a_step_may_come_from_another_thread() -> None:
    param = torch.ones(512, 512, requires_grad=True)
    optimizer = AdamW([param], lr=0.1, weight_decay=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    torch.testing.assert_close(param.detach(), torch.full((512, 512), 0.8))


def test_many_threads_may_step_optimizers_of_their_own() -> None:
    params = [torch.ones(300, 300, requires_grad=True) for _ in range(4)]
    optimizers = [AdamW([param], lr=0.1, weight_decay=0.0) for param in params]

    def work(index: int) -> None:
        for _ in range(20):
            params[index].grad = torch.ones_like(params[index])
            optimizers[index].step()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for param in params[1:]:
        assert torch.equal(param, params[0])
    assert all(
        optimizer.state[p]["step"] == 20 for optimizer, p in zip(optimizers, params, strict=True)
    )
