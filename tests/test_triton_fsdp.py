"""FSDP2 with one rank: shards on a GPU, shards offloaded to the CPU, from one to the other.

Without a GPU the interpreter steps shards on the CPU; offloading is then nothing but its code path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ebbtide.torch import AdamW
from tests.devices import DEVICES, GPU, by_the_core, on
from tests.tolerances import TRITON_CLIPPED

# What torch.distributed advises about devices is not ours to heed.
pytestmark = pytest.mark.filterwarnings("ignore:::torch.distributed")

WORDS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    backend = "cpu:gloo,cuda:nccl" if request.param == GPU else "gloo"
    with on(request.param):
        torch.distributed.init_process_group(
            backend, init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
        )
        yield request.param
        torch.distributed.destroy_process_group()


class Pair:
    """A sharded model and a plain one on the CPU that gets the same gradients."""

    def __init__(self, device: str, *, offloaded: bool = False, **words: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        torch.manual_seed(0)
        self.plain = nn.Linear(37, 5)
        model = nn.Linear(37, 5).to("cpu" if offloaded else device)
        model.load_state_dict(self.plain.state_dict())
        policy = CPUOffloadPolicy(pin_memory=device == GPU) if offloaded else OffloadPolicy()
        mesh = init_device_mesh(device, (1,))
        self.model: Any = fully_shard(model, mesh=mesh, offload_policy=policy)
        self.device = device
        self.optimizer = AdamW(self.model.named_parameters(), **WORDS, **words)
        self.by_core = AdamW(self.plain.named_parameters(), **WORDS, **words)

    def gradients(self, step: int) -> None:
        inputs = torch.randn(4, 37, generator=torch.Generator().manual_seed(step))
        self.model.zero_grad()
        self.model(inputs.to(self.device)).square().mean().backward()
        pairs = zip(self.model.parameters(), self.plain.parameters(), strict=True)
        for param, plain in pairs:
            plain.grad = param.grad.full_tensor().cpu().clone()

    def step_plain(self) -> None:
        with by_the_core():
            self.by_core.step()

    def assert_same(self, **tolerance: float) -> None:
        tolerance = tolerance or {"rtol": 0, "atol": 0}
        for ours, theirs in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor().cpu(), theirs, **tolerance)
            state, expected = self.optimizer.state[ours], self.by_core.state[theirs]
            for key in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(
                    state[key].full_tensor().cpu(), expected[key], **tolerance
                )


@pytest.mark.parametrize("clip", [None, 0.05])
def test_shards_on_the_device_are_stepped_without_the_host(clip: float | None, device: str) -> None:
    pair = Pair(device, clip_grad_norm=clip)
    for step in range(3):
        pair.gradients(step)
        if device == GPU and step == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            pair.optimizer.step()
        finally:
            if device == GPU:
                torch.cuda.set_sync_debug_mode("default")
        pair.step_plain()
    assert pair.optimizer._devices.backend is not None
    pair.assert_same(**({} if clip is None else TRITON_CLIPPED))


def test_offloaded_shards_are_stepped_on_the_cpu_and_their_state_moves_back(device: str) -> None:
    pair = Pair(device, offloaded=True)
    for step in range(2):
        pair.gradients(step)
        with by_the_core() if device != GPU else nullcontext():
            pair.optimizer.step()
        pair.step_plain()
    assert pair.optimizer._devices.backend is None
    pair.assert_same()
    back = Pair(device)
    back.plain, back.by_core = pair.plain, pair.by_core
    for ours, there in zip(back.model.parameters(), pair.model.parameters(), strict=True):
        ours._local_tensor.data.copy_(there._local_tensor)
    back.optimizer.load_state_dict(pair.optimizer.state_dict())
    back.gradients(2)
    back.optimizer.step()
    back.step_plain()
    assert back.optimizer._devices.backend is not None
    back.assert_same()
