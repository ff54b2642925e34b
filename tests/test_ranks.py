"""Two ranks against one process: DDP, FSDP2, distributed checkpoints; gloo on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ebbtide.torch
import ebbtide.torch.rows
from tests import rank_tasks
from tests.rank_pool import RankPool
from tests.rank_tasks import Numbers

LOW = torch.bfloat16
EIGHT = {"state_format": "8bit", "master_format": "32bit"}
KINDS = [
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "decay_policy": "corrected", "cautious": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.stop()


def assert_same(ours: Numbers, expected: Numbers) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(("kind", "options"), KINDS[::2])
def test_data_parallel_equals_one_process(ranks: RankPool, kind: str, options: dict) -> None:
    expected = rank_tasks.alone(kind, torch.float32, 3, options)
    for numbers in ranks.run(rank_tasks.data_parallel, kind, 3, options):
        assert_same(numbers, expected)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_partition_of_the_state_equals_one_process(
    ranks: RankPool, kind: str, options: dict
) -> None:
    """In two goes, the second with the consolidated state of the first."""
    expected = rank_tasks.alone(kind, torch.float32, 6, options)
    for numbers in ranks.run(rank_tasks.partitioned, kind, 3, options):
        assert_same(numbers, {name: expected[name] for name in numbers})


# bfloat16 is rounded stochastically: the bits depend on an element's place in the whole parameter.
@pytest.mark.parametrize("dtype", [torch.float32, LOW, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_shards_equal_one_process(
    ranks: RankPool, kind: str, options: dict, dtype: torch.dtype
) -> None:
    expected = rank_tasks.alone(kind, dtype, 3, options)
    for numbers in ranks.run(rank_tasks.fully_sharded, kind, dtype, 3, options):
        assert_same(numbers, expected)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, EIGHT),
        (torch.float32, {"state_format": "8bit", "amsgrad": True, "clip_grad_norm": 1e9}),
        (LOW, {"state_format": "8bit"}),
        (LOW, {"state_format": "8bit", "master_format": "24bit"}),
        (LOW, {"state_format": "bfloat16", "master_format": "32bit"}),
    ],
    ids=str,
)
def test_low_bit_shards_equal_one_process(
    ranks: RankPool, dtype: torch.dtype, options: dict
) -> None:
    expected = rank_tasks.alone("AdamW", dtype, 3, options)
    for numbers in ranks.run(rank_tasks.fully_sharded, "AdamW", dtype, 3, options):
        assert_same(numbers, expected)


def test_low_bit_replicas_equal_one_process(ranks: RankPool) -> None:
    expected = rank_tasks.alone("AdamW", torch.float32, 3, EIGHT)
    for numbers in ranks.run(rank_tasks.data_parallel, "AdamW", 3, EIGHT):
        assert_same(numbers, expected)


def test_eight_bits_of_shards_by_columns_are_refused_by_name(ranks: RankPool) -> None:
    for message in ranks.run(rank_tasks.columns_in_eight_bits):
        assert "parameter 'w'" in message
        assert "shards by rows" in message


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
def test_shards_equal_one_process_by_torch_operations(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(ebbtide.torch.rows, "_is_for_kernels", lambda *_: False)
    expected = rank_tasks.alone("AdamW", dtype, 3, {"clip_grad_norm": 10.0})
    for numbers in ranks.run(rank_tasks.by_torch_operations, dtype):
        assert_same(numbers, expected)


def test_a_plain_gradient_of_a_shard_is_refused_by_name(ranks: RankPool) -> None:
    for message in ranks.run(rank_tasks.plain_gradient):
        assert message == "parameter '0.weight' is a DTensor, its gradient a plain tensor"


def test_what_the_document_shows_runs(ranks: RankPool, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    (code,) = re.findall(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ranks.run(rank_tasks.run_code, code, {"folder": str(tmp_path)})


def test_shards_by_columns_equal_the_whole(ranks: RankPool) -> None:
    for shards, expected in ranks.run(rank_tasks.columns, torch.float32):
        assert_same(shards, expected)


# Sums of squares are added in another order over shards: the clipped gradients differ by an ulp.
@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)], ids=str)
def test_the_norm_is_that_of_all_ranks(ranks: RankPool, shape: tuple[int, ...]) -> None:
    model = rank_tasks.model_of()
    optimizer = rank_tasks.optimizer_of("AdamW", model, clip_grad_norm=0.05)
    rank_tasks.train(model, optimizer, 3)
    expected = rank_tasks.numbers_of(model, optimizer)
    for norm, numbers in ranks.run(rank_tasks.clipped, shape):
        assert norm == pytest.approx(optimizer.last_grad_norm, rel=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(numbers[name], value, rtol=1e-5, atol=1e-7)


def test_a_nonfinite_gradient_is_raised_on_every_rank(ranks: RankPool) -> None:
    first, second = ranks.run(rank_tasks.poisoned, "raise")
    assert "'0.weight' (1 of" in second["message"]
    assert "another rank" in first["message"]
    for each in (first, second):
        changed = each["before"]["0.weight"] != each["after"]["0.weight"]
        assert not changed[-1, -1]
        assert changed.sum() == changed.numel() - 1


def test_a_step_is_skipped_on_every_rank(ranks: RankPool) -> None:
    for each in ranks.run(rank_tasks.poisoned, "skip"):
        assert each["message"] == ""
        assert each["skipped"]
        assert_same(each["after"], each["before"])


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_creating_the_state_moves_nothing(ranks: RankPool, kind: str, dtype: torch.dtype) -> None:
    for before, after, keys in ranks.run(rank_tasks.materialised, kind, dtype):
        assert_same(after, before)
        if kind == "AdamW":
            assert keys == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {}), (LOW, {}), (torch.float32, EIGHT), (LOW, EIGHT)],
    ids=str,
)  # fmt: skip
def test_a_distributed_checkpoint_resumes_on_two_ranks_and_on_one(
    ranks: RankPool, tmp_path: Path, dtype: torch.dtype, options: dict, flatten: bool
) -> None:
    args = (str(tmp_path), dtype, flatten, options)
    straight, _ = ranks.run(rank_tasks.save_distributed, *args)
    for numbers in ranks.run(rank_tasks.resume_distributed, *args):
        assert_same(numbers, straight)
    assert_same(rank_tasks.resume_alone(*args), straight)


@pytest.mark.parametrize("way", ["load_state_dict", "full", "broadcast"])
@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, {}), (LOW, EIGHT)], ids=str)
def test_a_whole_state_is_scattered_over_shards(
    ranks: RankPool, way: str, dtype: torch.dtype, options: dict
) -> None:
    model = rank_tasks.model_of(dtype, sizes=rank_tasks.sizes_for(options))
    optimizer = rank_tasks.optimizer_of("AdamW", model, **options)
    rank_tasks.train(model, optimizer, 2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state, _ = ranks.run(rank_tasks.gathered, 2, dtype, options)
    if way == "load_state_dict":
        state = rank_tasks.copied(optimizer.state_dict())
    rank_tasks.train(model, optimizer, 2, first=2)
    for numbers in ranks.run(rank_tasks.scattered, weights, state, way, options):
        assert_same(numbers, rank_tasks.numbers_of(model, optimizer))


def test_a_gathered_state_loads_in_one_process(ranks: RankPool) -> None:
    model = rank_tasks.model_of()
    optimizer = rank_tasks.optimizer_of("AdamW", model)
    rank_tasks.train(model, optimizer, 2)
    before = rank_tasks.numbers_of(model, optimizer)
    state, _ = ranks.run(rank_tasks.gathered, 2, torch.float32, {})
    fresh = ebbtide.torch.AdamW(rank_tasks.groups_of(model), lr=0.5)
    fresh.load_state_dict(state)
    assert_same(rank_tasks.numbers_of(model, fresh), before)


def test_every_rank_refuses_what_one_refuses(ranks: RankPool) -> None:
    (first, unchanged), (second, unchanged_too) = ranks.run(rank_tasks.refused_on_one)
    assert unchanged
    assert unchanged_too
    assert "another rank" in first
    assert "negative" in second


def test_partial_gradients_are_added_up(ranks: RankPool) -> None:
    for param, expected in ranks.run(rank_tasks.partial_gradient):
        assert torch.equal(param, expected)
