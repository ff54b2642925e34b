"""Steps on a GPU as the user sees them: launches, what is remembered, what is noticed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ebbtide.torch
import ebbtide.torch.base
import ebbtide.torch.rows
from ebbtide.backends.triton import tables
from ebbtide.backends.triton.launching import Launcher
from tests.compiled import POINTERS
from tests.devices import DEVICES, INTERPRETER, Run, assert_same_bits, by_the_core, on
from tests.tolerances import TRITON_DEVICE_SCALARS

SHAPES: list[tuple[int, ...]] = [(40, 5), (3,), ()]
WORDS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
DTYPES = {torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


def core(kind: str = "AdamW", **words: Any) -> Run:
    return Run(kind, SHAPES, INTERPRETER, **{**WORDS, **words})


def run_of(device: str, kind: str = "AdamW", **words: Any) -> Run:
    return Run(kind, SHAPES, device, **{**WORDS, **words})


def spoil(run: Run, index: int = 0, value: float = float("inf"), elements: int = 2) -> None:
    run.params[index].grad.view(-1)[:elements] = value


def refuse_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("planned anew")

    monkeypatch.setattr(ebbtide.torch.base, "Planner", refuse)


def note_plans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by 1 with each new plan."""
    planned: list[int] = []
    planner = ebbtide.torch.base.Planner
    monkeypatch.setattr(
        ebbtide.torch.base, "Planner", lambda *words: planned.append(1) or planner(*words)
    )
    return planned


# Launches, and what is remembered.


def test_each_dtype_takes_one_launch_however_many_tensors(device: str) -> None:
    run = run_of(device)
    more = [torch.ones(3, 3, device=device, dtype=torch.bfloat16).requires_grad_() for _ in "abc"]
    run.optimizer.add_param_group({"params": [(f"m{i}", param) for i, param in enumerate(more)]})
    for _ in range(3):
        run.grads()
        for param in more:
            param.grad = torch.ones_like(param)
        run.optimizer.step()
    assert run.backend.launches == 6


def test_a_binary_is_launched_again_without_triton_looking_at_the_arguments() -> None:
    calls: list[Any] = []

    class Binary:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments: calls.append(("binary", grid, arguments))

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def compile_and_launch(*arguments: Any, **words: Any) -> Binary:
                calls.append(("kernel", grid, arguments, words))
                return Binary()

            return compile_and_launch

    launcher, kernel = Launcher(), Kernel()
    for programs, key in ((5, "a"), (7, "a"), (7, "b")):
        launcher.launch(kernel, programs, (1, 2), {"SIZE": 3}, warps=4, key=key)
    words = {"SIZE": 3, "num_warps": 4, "enable_fp_fusion": False}
    assert calls == [
        ("kernel", (5,), (1, 2), words),
        ("binary", (7, 1, 1), (1, 2, 3)),
        ("kernel", (7,), (1, 2), words),
    ]
    assert launcher.launches == 3


@pytest.mark.parametrize(
    "words",
    [{}, {"clip_grad_norm": 1.0}, {"nonfinite": "skip"}, {"lr": torch.tensor(0.02)}],
    ids=str,
)
def test_kernels_are_given_what_they_are_compiled_for(
    words: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's interpreter does not mind other types; its compiler refuses or mistakes them."""
    given: list[tuple[Any, tuple[Any, ...]]] = []
    launch = Launcher.launch

    def noted(
        self: Any, kernel: Any, programs: int, arguments: Any, *rest: Any, **more: Any
    ) -> None:
        given.append((kernel, arguments))
        launch(self, kernel, programs, arguments, *rest, **more)

    monkeypatch.setattr(Launcher, "launch", noted)
    lr = words.get("lr", 0.02)
    run_of(device, **{**words, "lr": lr.to(device) if torch.is_tensor(lr) else lr}).step(2)
    assert given
    for kernel, arguments in given:
        for name, value in zip(kernel.arg_names, arguments, strict=False):
            if torch.is_tensor(value) and name not in ("found_inf", "loss_scale"):
                assert DTYPES[value.dtype] == POINTERS[name], name


def test_a_plan_is_remembered_while_nothing_moves(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(device).step()
    refuse_plans(monkeypatch)
    kept = [[param.grad for param in run.params]]  # so that the next gradients lie elsewhere
    for _ in range(2):
        run.step()
        kept.append([param.grad for param in run.params])
    assert len({each[0].data_ptr() for each in kept if each[0] is not None}) == 3
    monkeypatch.undo()
    with by_the_core():
        theirs = core().step(3)
    assert_same_bits(run.numbers(), theirs.numbers())


def test_tables_are_sent_again_only_where_something_moved(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    send = tables.Uploader.send

    def noted(self: Any, slot: str, parts: Any) -> Any:
        sent.append(slot)
        return send(self, slot, parts)

    def written(self: Any, numbers: Any) -> Any:
        sent.append("scalars")
        return write(self, numbers)

    write = tables._Page.written
    monkeypatch.setattr(tables.Uploader, "send", noted)
    monkeypatch.setattr(tables._Page, "written", written)  # what goes to a GPU in every step
    run = run_of(device)
    run.grads()
    for _ in range(3):
        run.optimizer.step()
    assert sent == ["tables", "grads", "scalars", "scalars", "scalars"]
    kept = [param.grad for param in run.params]
    sent.clear()
    run.step()
    assert sent == ["grads", "scalars"]
    del kept
    sent.clear()
    run.params[0].data = run.params[0].data.clone()
    run.optimizer.step()
    assert sent == ["tables", "grads", "scalars"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_have_the_bits_of_the_cpu(dtype: torch.dtype, device: str) -> None:
    """A gradient may be a conjugate that has not been written out, in any step."""

    def run(where: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(5, 7, dtype=dtype, generator=generator).to(where).requires_grad_()
        optimizer = ebbtide.torch.AdamW([param], **WORDS)
        for step in range(3):
            grad = torch.randn(5, 7, dtype=dtype, generator=generator).to(where)
            param.grad = grad.conj() if step == 1 else grad
            optimizer.step()
        return param.detach().cpu()

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("what", ["data", "state", "state data", "state cleared", "param", "group"])
def test_what_moves_is_noticed(what: str, device: str) -> None:
    def move(run: Run) -> None:
        param = run.params[0]
        state = run.optimizer.state[param]
        if what == "data":
            param.data = param.data.clone() * 2
        elif what == "state":
            state["exp_avg"] = state["exp_avg"] * 2
        elif what == "state data":
            run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        elif what == "state cleared":
            run.optimizer.state.clear()
        elif what == "param":
            run.params[0] = (param.detach() * 2).requires_grad_()
            run.optimizer.param_groups[0]["params"][0] = run.params[0]
        else:
            run.optimizer.param_groups[0]["amsgrad"] = True

    ours = run_of(device).step(2)
    move(ours)
    ours.step(2)
    with by_the_core():
        theirs = core().step(2)
        move(theirs)
        theirs.step(2)
    assert_same_bits(ours.numbers(), theirs.numbers())


@pytest.mark.parametrize("arrays", ["all", "one"])
def test_small_state_that_is_given_other_memory_is_noticed_in_its_turn(
    arrays: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(device).step(2)
    moved = [
        value
        for param in run.params[: 3 if arrays == "all" else 1]
        for key, value in run.optimizer.state[param].items()
        if arrays == "all" or key == "exp_avg_sq"
    ]
    for value in moved:
        value.data = value.clone()
    planned = note_plans(monkeypatch)
    for _ in range(1 if arrays == "all" else len(SHAPES)):
        run.step()
    assert planned == [1]


def test_a_count_that_is_set_by_hand_is_noticed(device: str) -> None:
    def run(where: str) -> Run:
        found = run_of(where).step(2)
        found.optimizer.state[found.params[0]]["step"].fill_(100)
        return found.step(2)

    ours = run(device)
    with by_the_core():
        theirs = run(INTERPRETER)
    assert_same_bits(ours.numbers(), theirs.numbers())


def test_a_gpu_and_the_cpu_both_remember_their_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is left the matrix alone; another parameter rests in the fifth step."""

    def run(planned: list[int]) -> Run:
        found = run_of(INTERPRETER)
        for step in range(5):
            found.grads()
            if step == 4:
                found.params[1].grad = None
            if step == 1:
                planned.clear()
            found.optimizer.step()
        return found

    with on(INTERPRETER):
        with by_the_core():
            theirs = run([])
        monkeypatch.setattr(
            ebbtide.torch.rows, "launches", lambda param, grad, group: param.ndim == 2
        )
        planned = note_plans(monkeypatch)
        ours = run(planned)
        assert planned == []
        versions = [param._version for param in ours.params]
        ours.step()
        risen = [p._version - old for p, old in zip(ours.params, versions, strict=True)]
        assert risen == [1, 1, 1]
        theirs.step()
    assert_same_bits(ours.numbers(), theirs.numbers())
    assert ours.backend.launches == 6


def test_a_gradient_that_comes_late_starts_its_own_count(device: str) -> None:
    def late(run: Run) -> Run:
        for step in range(3):
            run.grads()
            if step == 0:
                run.params[1].grad = None
            run.optimizer.step()
        return run

    ours = late(run_of(device))
    assert float(ours.optimizer.state[ours.params[1]]["step"]) == 2
    with by_the_core():
        theirs = late(core())
    assert_same_bits(ours.numbers(), theirs.numbers())


def test_state_moves_between_the_device_and_the_cpu(device: str) -> None:
    ours = run_of(device).step(2)
    with by_the_core():
        whole = core().step(4)
        other = core()
        for param, there in zip(other.params, ours.params, strict=True):
            param.data.copy_(there.detach())
        other.optimizer.load_state_dict(ours.optimizer.state_dict())
        other.generator = ours.generator
        other.step(2)
    assert_same_bits(other.numbers(), whole.numbers())


def test_a_number_on_another_device_is_not_read() -> None:
    """Nothing on the meta device can be."""
    group = {"lr": torch.zeros((), device="meta"), "decay_policy": "l2"}
    numbers, sources = tables.numbers_of([group], torch.device("cpu"))
    assert numbers[0] == sources[0] == 0


# Hyperparameters and counts on the device.


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("AdamW", {"betas": (0.0, 0.99)}),
        ("AdamW", {"decay_policy": "independent", "base_lr": 0.1}),
        ("AdamW", {"decay_policy": "corrected", "base_lr": 0.1, "maximize": True}),
        ("Adam", {"cautious": True, "decay_policy": "decoupled", "amsgrad": True}),
        ("AdamW", {"bias_correction": False}),
        ("SGD", {"momentum": 0.9, "dampening": 0.3}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("SGD", {"lr": torch.tensor(0.02), "momentum": 0.9}),
        ("AdamW", {"lr": torch.tensor(0.02), "betas": (torch.tensor(0.9), torch.tensor(0.99))}),
        ("AdamW", {"lr": torch.tensor(0.02, dtype=torch.float64)}),
    ],
    ids=str,
)
def test_scalars_are_computed_on_the_device_as_on_the_host(
    kind: str, words: dict[str, Any], device: str
) -> None:
    """A step that may be dropped is counted on the device."""

    def there(where: str) -> dict[str, Any]:
        moved = {k: v.to(where) if torch.is_tensor(v) else v for k, v in words.items()}
        if torch.is_tensor(moved.get("betas", (0,))[0]):
            moved["betas"] = tuple(beta.to(where) for beta in moved["betas"])
        return {**moved, "nonfinite": "skip"}

    ours = run_of(device, kind, **there(device)).step(3)
    with by_the_core():
        theirs = core(kind, **there(INTERPRETER)).step(3)
    mine = ours.numbers()
    for key, value in theirs.numbers().items():
        torch.testing.assert_close(mine[key], value, **TRITON_DEVICE_SCALARS)
    assert ours.backend.launches == 9


@pytest.mark.parametrize("policy", ["decoupled", "independent", "corrected"])
def test_nothing_decays_where_a_schedule_ends_a_hair_below_zero(policy: str, device: str) -> None:
    lr = torch.tensor(-1e-12, dtype=torch.float64, device=device)
    run = Run("SGD", SHAPES, device, torch.float64, lr=1e-3, decay_policy=policy, nonfinite="skip")
    run.optimizer.param_groups[0].update(lr=lr, weight_decay=0.9)
    before = [param.detach().clone() for param in run.params]
    for param in run.params:
        param.grad = torch.zeros_like(param)
    run.optimizer.step()
    assert run.backend.launches
    assert all(map(torch.equal, before, run.params))
