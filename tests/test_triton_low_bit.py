"""State in eight bits and split parameters on a GPU: the CPU's bits, whatever is asked for."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ebbtide.groups.state_format
import ebbtide.torch.tensors
from tests.devices import DEVICES, INTERPRETER, Run, assert_same_bits, by_the_core, on

# A whole tile of blocks; rows that end inside a block; what stays in float32.
SHAPES: list[tuple[int, ...]] = [(8, 128), (2, 70), (7,)]
WORDS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
EIGHT: dict[str, Any] = {"state_format": "8bit", **WORDS}
SPLIT: dict[str, Any] = {"dtype": torch.bfloat16, "master_format": "24bit", **EIGHT}
HALF = (torch.bfloat16, torch.float16)
KINDS = [
    (torch.float32, {"state_format": "8bit"}),
    (torch.float32, {"state_format": "8bit", "amsgrad": True}),
    (torch.float32, {"state_format": "bfloat16"}),
    *[
        (dtype, {"state_format": state, "master_format": master})
        for dtype in HALF
        for state, master in [
            ("8bit", "none"), ("8bit", "stochastic"), ("8bit", "24bit"), ("8bit", "32bit"),
            ("bfloat16", "24bit"), ("float32", "32bit"), (None, "none"),
        ]
    ],
]  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(ebbtide.groups.state_format, "SMALL_NUMEL", 128)
    with on(request.param):
        yield request.param


Task = Callable[[str], Run]


def stepped(where: str, steps: int = 2, shapes: Any = SHAPES, **words: Any) -> Run:
    return Run("AdamW", shapes, where, **words).step(steps)


def both(device: str, task: Task) -> Run:
    """Do the same on the device and by the compiled core; the bits must agree."""
    ours = task(device)
    with by_the_core():
        theirs = task(INTERPRETER)
    assert theirs.backend is None
    assert_same_bits(ours.numbers(), theirs.numbers())
    return ours


def spoil(run: Run, index: int = 0, value: float = float("inf")) -> None:
    grad = run.params[index].grad
    assert grad is not None
    grad.view(-1)[:2] = value


def step_and_ask(optimizer: Any) -> None:
    """Step, and wait for what a GPU has to say of it."""
    optimizer.step()
    _ = optimizer.last_step_skipped


def state_of(run: Run) -> dict[str, Any]:
    state: dict[str, Any] = run.optimizer.state[run.params[0]]
    return state


@pytest.mark.parametrize(("dtype", "words"), KINDS, ids=str)
def test_every_format_has_the_bits_of_the_cpu(
    dtype: torch.dtype, words: dict[str, Any], device: str
) -> None:
    ours = both(device, lambda where: stepped(where, dtype=dtype, **WORDS, **words))
    # Small parameters keep wider state where the group asks for a narrower one: another launch.
    kinds = 2 if words["state_format"] in ("8bit", "bfloat16") else 1
    assert ours.backend.launches == 2 * kinds
    assert ("exp_avg_codes" in state_of(ours)) == (words["state_format"] == "8bit")
    residual = words.get("master_format") in ("24bit", "32bit")
    assert ("residual" in state_of(ours)) == residual


class Resting(Run):
    """Large gradients, beside them once small ones of any size, which then rest."""

    calls = 0

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return normal numbers times 10⁶, a third of them much smaller; zero for these later."""
        self.calls += 1
        large = 1e6 * torch.randn(shape, generator=self.generator)
        small = 2.0 ** (20 - 40 * torch.rand(shape, generator=self.generator))
        small *= self.calls <= 2  # the parameters and their first gradients
        third = torch.arange(large.numel()).reshape(shape) % 3 == 0
        return torch.where(third, small, large)


def test_what_rests_far_below_its_block_has_the_bits_of_the_cpu(device: str) -> None:
    words = {**EIGHT, "betas": (0.0, 0.999)}
    ours = both(device, lambda where: Resting("AdamW", [(8, 128)], where, **words).step(3))
    codes = state_of(ours)["exp_avg_sq_codes"]
    assert codes.all()
    assert (codes == 1).any()  # lifted to the lowest code


class Dense(Run):
    """Gradients without zeros, for which tiles take a shorter way."""

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return normal numbers."""
        return torch.randn(shape, generator=self.generator)


@pytest.mark.parametrize("lr", [0.02, 1e-9], ids=["usual", "unusual"])
@pytest.mark.parametrize(("dtype", "words"), [(torch.float32, {}), *KINDS], ids=str)
def test_tiles_without_zeros_have_the_bits_of_the_cpu(
    dtype: torch.dtype, words: dict[str, Any], lr: float, device: str
) -> None:
    words = {"weight_decay": 0.1 if lr > 1e-3 else 0.0, **words, "lr": lr}
    shapes = [(8, 128), (4, 128)]
    ours = both(device, lambda where: Dense("AdamW", shapes, where, dtype, **words).step(3))
    for name in ("exp_avg", "exp_avg_sq"):
        assert all(state_of(ours).get(f"{name}_codes", state_of(ours).get(name)).flatten()[:9])


@pytest.mark.parametrize("words", [EIGHT, SPLIT], ids=["8bit", "24bit"])
def test_clipping_has_the_bits_of_the_cpu_in_two_more_launches(
    words: dict[str, Any], device: str
) -> None:
    ours = both(device, lambda where: stepped(where, clip_grad_norm=0.5, **words))
    assert ours.backend.launches == 2 * (2 + 2)


@pytest.mark.parametrize("words", [EIGHT, SPLIT], ids=["8bit", "24bit"])
def test_a_dropped_step_leaves_every_code_as_it_was(words: dict[str, Any], device: str) -> None:
    def task(where: str) -> Run:
        run = stepped(where, 1, nonfinite="skip", **words)
        before = copy.deepcopy(run.numbers())
        run.grads()
        spoil(run)
        run.optimizer.step()
        assert run.optimizer.last_step_skipped is True
        assert_same_bits(run.numbers(), before)
        return run.step()

    assert float(state_of(both(device, task))["step"]) == 2


def test_elements_that_are_not_finite_are_left_out_as_on_the_cpu(device: str) -> None:
    def task(where: str) -> Run:
        run = stepped(where, 1, **SPLIT)
        run.grads()
        spoil(run)
        with pytest.raises(FloatingPointError, match=r"step 2 in 'w0' \(2 of 1024\)"):
            step_and_ask(run.optimizer)
        return run.step()

    both(device, task)


@pytest.mark.parametrize("words", [EIGHT, SPLIT], ids=["8bit", "24bit"])
def test_a_grad_scaler_unscales_and_drops_on_the_device(words: dict[str, Any], device: str) -> None:
    def task(where: str) -> Run:
        run = stepped(where, 0, fused=True, **words)
        for found in (0.0, 1.0, 0.0):
            run.grads()
            run.optimizer.found_inf = torch.tensor(found, device=where)
            run.optimizer.grad_scale = torch.tensor(1024.0, device=where)
            run.optimizer.step()
        assert run.optimizer.skipped_steps == 1
        return run

    ours = both(device, task)
    assert state_of(ours)["step"].device == ours.params[0].device


def test_a_capturable_step_counts_on_the_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebbtide.torch.tensors, "_CAPTURABLE", lambda: [INTERPRETER, "cuda"])
    ours = both(
        device, lambda where: stepped(where, capturable=ours_is(where), clip_grad_norm=0.5, **SPLIT)
    )
    assert torch.is_tensor(ours.optimizer.last_grad_norm)


def ours_is(where: str) -> bool:
    """Whether Triton steps what lies there."""
    return where != INTERPRETER or os.environ["EBBTIDE_BACKEND"] == "triton"


@pytest.mark.parametrize(
    "words",
    [
        {**EIGHT, "amsgrad": True},
        SPLIT,
        {**SPLIT, "dtype": torch.float16, "master_format": "32bit"},
    ],
    ids=["amsgrad", "24bit", "float16"],
)
def test_a_checkpoint_goes_to_the_device_and_back(words: dict[str, Any], device: str) -> None:
    def taken_over(by: Run, run: Run) -> Run:
        for param, there in zip(by.params, run.params, strict=True):
            param.data.copy_(there.detach())
        by.optimizer.load_state_dict(run.optimizer.state_dict())
        by.generator = run.generator
        return by.step(1)

    def new(where: str) -> Run:
        return stepped(where, 0, **words)

    with by_the_core():
        whole = stepped(INTERPRETER, 3, **words)
        run = new(INTERPRETER).step(1)
        there, back = new(device), new(INTERPRETER)
    taken_over(there, run)
    assert there.backend is not None
    with by_the_core():
        taken_over(back, there)
    assert_same_bits(back.numbers(), whole.numbers())


MOVED = [
    "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale", "residual", "step",
]  # fmt: skip


@pytest.mark.parametrize("how", ["replaced", "moved"])
@pytest.mark.parametrize("key", MOVED)
def test_state_that_is_replaced_or_moved_is_noticed(key: str, how: str, device: str) -> None:
    def task(where: str) -> Run:
        run = stepped(where, 1, [(8, 128)], **SPLIT)
        state = state_of(run)
        other = state[key].clone()
        other.view(-1)[:1] += 1
        if how == "replaced":
            state[key] = other
        else:
            state[key].data = other
        return run.step()

    both(device, task)


def test_a_format_that_changes_is_taken_up(device: str) -> None:
    def task(where: str) -> Run:
        run = stepped(where, 1, [(8, 128)], **WORDS)
        run.optimizer.param_groups[0]["state_format"] = "8bit"
        run.step()
        run.optimizer.param_groups[0]["state_format"] = None
        return run.step()

    both(device, task)
