"""Wrapped and sharded models group as the bare one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from ebbtide.torch.estimate import estimate
from ebbtide.torch.groups import explain_groups, param_groups


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 16, bias=False))
    return nn.Sequential(nn.Embedding(11, 8), body, nn.Linear(16, 3))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def signature(groups: list[dict[str, Any]]) -> list[Any]:
    return [(g["name"], g["weight_decay"], [name for name, _ in g["params"]]) for g in groups]


def names(groups: list[dict[str, Any]], group: str) -> set[str]:
    return {name for g in groups if g["name"] == group for name, _ in g["params"]}


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two, of which this process is one and the other does not exist."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def checkpointed(model: nn.Sequential) -> nn.Module:
    model[1] = checkpoint_wrapper(model[1])
    return model


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


class PeftModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})


WRAPPERS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "torch.compile": compiled,
    "DDP": DistributedDataParallel,
    "DDP in torch.compile": lambda model: compiled(DistributedDataParallel(model)),
    "activation checkpoints": checkpointed,
    "FSDP2": sharded,
    "FSDP1": lambda model: FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True
    ),
    "PEFT": PeftModel,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_groups_as_the_bare_one(wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper](plain())
    assert signature(param_groups(wrapped, 0.1)) == signature(param_groups(plain(), 0.1))
    rules = {"1.*": {"lr": 1.0}}
    assert signature(param_groups(wrapped, 0.1, rules=rules)) == signature(
        param_groups(plain(), 0.1, rules=rules)
    )
    table = explain_groups(param_groups(wrapped, 0.1))
    assert [row.shape for row in table.rows] == [tuple(p.shape) for p in plain().parameters()]


@pytest.mark.usefixtures("two_ranks")
def test_a_shard_counts_its_own_bytes_by_the_format_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False))
    whole = estimate(model, state_format="8bit")
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    half = estimate(model, state_format="8bit")  # 48 × 64 < 4096 elements on this rank
    assert half.formats == whole.formats == {"8bit": 1}
    assert half.state - 4 == (whole.state - 4) // 2


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_flat_parameter_is_refused_with_the_remedy() -> None:
    flat = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"), use_orig_params=False)
    with pytest.raises(ValueError, match="use_orig_params=True"):
        param_groups(flat, 0.1)


def test_shapes_that_zero_took_apart_are_those_of_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    weight = model[0].weight
    weight.ds_shape, weight.ds_tensor = torch.Size([4, 4]), torch.zeros(8)  # type: ignore[attr-defined,assignment]
    weight.data = torch.empty(0)
    assert names(param_groups(model, 0.1), "decay") == {"0.weight"}
    assert explain_groups(param_groups(model, 0.1)).rows[0].state_bytes == 2 * 8 * 4 + 4
