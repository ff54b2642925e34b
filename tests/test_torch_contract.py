"""What a script that uses torch.optim relies on: hooks, closures, groups, copies, the profiler."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ebbtide.torch import SGD, Adam, AdamW

CLASSES = {"AdamW": AdamW, "Adam": Adam, "SGD": SGD}
each_class = pytest.mark.parametrize("name", CLASSES)


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    loss = model(torch.randn(16, 4, generator=generator).to(dtype)).square().mean()
    loss.backward()
    return loss.detach()


@each_class
def test_arguments_stand_where_torchs_stand(name: str) -> None:
    ours = inspect.signature(CLASSES[name]).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    positional = [key for key, p in theirs.items() if p.kind is not p.KEYWORD_ONLY]
    assert [key for key, p in ours.items() if p.kind is not p.KEYWORD_ONLY] == positional
    assert theirs.keys() <= ours.keys()
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default, key


@each_class
def test_groups_and_defaults_hold_torchs_keys_and_values(name: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    ours, theirs = CLASSES[name]([param]), getattr(torch.optim, name)([param])
    assert theirs.defaults.items() <= ours.defaults.items()
    mine, group = dict(ours.param_groups[0]), dict(theirs.param_groups[0])
    assert mine.pop("params") == group.pop("params")
    assert group.items() <= mine.items()
    plain = (int, float, bool, str, tuple, type(None))
    assert all(isinstance(value, plain) for value in mine.values())


def test_classes_are_related_as_torchs_are() -> None:
    assert issubclass(AdamW, Adam)
    assert issubclass(Adam, torch.optim.Optimizer)
    assert not issubclass(SGD, Adam)


@each_class
def test_step_returns_what_the_closure_returns_and_runs_it_under_grad(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        return backward(model)

    with torch.no_grad():
        loss = optimizer.step(closure)
        again = optimizer.step(closure=closure)
    assert calls == [True, True]
    assert again < loss
    assert optimizer.step() is None


@each_class
def test_hooks_of_one_optimizer_and_of_all_run_around_a_step(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    backward(model)
    seen: list[tuple[str, Any, Any, float]] = []

    def note(which: str) -> Callable[..., None]:
        def hook(each: Any, args: Any, kwargs: Any) -> None:
            assert each is optimizer
            seen.append((which, args, kwargs, float(model[0].weight.detach().sum())))

        return hook

    handles = [
        register_optimizer_step_post_hook(note("all after")),
        optimizer.register_step_post_hook(note("after")),
        optimizer.register_step_pre_hook(note("before")),
        register_optimizer_step_pre_hook(note("all before")),
    ]
    closure = lambda: None  # noqa: E731
    optimizer.step(closure)
    assert [which for which, *_ in seen] == ["all before", "before", "after", "all after"]
    assert {args for _, args, *_ in seen} == {(optimizer, closure)}
    assert seen[1][3] != seen[2][3]  # the step happened between them
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(seen) == 4


@each_class
def test_a_pre_hook_may_replace_the_arguments(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    backward(model)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7), kwargs))
    assert optimizer.step() == 7
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()


@each_class
def test_hooks_run_once_in_a_subclass_that_overrides_step(name: str) -> None:
    class Own(CLASSES[name]):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return super().step(closure)

    model = model_of()
    optimizer = Own(model.parameters())
    backward(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert seen == ["before", "after"]
    assert optimizer.calls == 1
    assert not torch.equal(before, model[0].weight)


@each_class
def test_hooks_run_once_where_an_optimizer_is_given_another_class(name: str) -> None:
    """As libraries do that add gradient clipping to an optimizer they are handed."""
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    backward(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    class Clipping(CLASSES[name]):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return super().step(closure)

    optimizer.__class__ = Clipping
    optimizer.step()
    assert seen == ["before", "after"]


@each_class
def test_the_profiler_shows_the_step_under_torchs_name(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert f"Optimizer.step#{name}.step" in {event.name for event in profile.events()}


@each_class
def test_state_dict_hooks_run(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    backward(model)
    optimizer.step()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, state: {k: v for k, v in state.items() if k != "extra"}
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("after loading"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["before saving", "after loading"]


@each_class
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name: str, set_to_none: bool) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.parameters())
    backward(model)
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [param.grad for param in model.parameters()]
    if set_to_none:
        assert grads == [None] * 4
    else:
        assert not any(bool(grad.any()) for grad in grads if grad is not None)


@each_class
def test_a_group_added_in_mid_training_counts_its_own_steps(name: str) -> None:
    model, late = model_of(dtype=torch.float64), nn.Parameter(torch.ones(3, dtype=torch.float64))
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = CLASSES[name](model.parameters(), lr=0.1, **options)
    for step in range(4):
        backward(model, step)
        optimizer.step()
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    fresh = nn.Parameter(late.detach().clone())
    alone = CLASSES[name]([fresh], lr=0.5, **options)
    for step in range(3):
        late.grad = fresh.grad = torch.full((3,), 1.0 + step, dtype=torch.float64)
        optimizer.step()
        alone.step()
    assert torch.equal(late, fresh)


@each_class
def test_a_first_gradient_that_comes_late_is_the_first_step(name: str) -> None:
    """Own bias correction; a momentum buffer starts as the gradient, without dampening."""
    options = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
    early, late, fresh = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = CLASSES[name]([early, late], lr=0.1, **options)
    alone = CLASSES[name]([fresh], lr=0.1, **options)
    for step in range(6):
        early.grad = torch.ones(3)
        if step >= 3:
            late.grad, fresh.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
            alone.step()
        optimizer.step()
    assert torch.equal(late, fresh)


@each_class
def test_gradients_that_come_and_go(name: str) -> None:
    """The set of parameters with gradients differs from step to step."""
    start = torch.randn(5, 4, dtype=torch.float64)
    mine = [nn.Parameter(row.clone()) for row in start]
    others = [nn.Parameter(row.clone()) for row in start]
    ours, theirs = CLASSES[name](mine, lr=0.1), getattr(torch.optim, name)(others, lr=0.1)
    for step in range(12):
        for index, pair in enumerate(zip(mine, others, strict=True)):
            grad = torch.full((4,), 1.0 + index + step, dtype=torch.float64)
            for param in pair:
                param.grad = grad if (index + step) % 3 else None
        ours.step()
        theirs.step()
    for param, other in zip(mine, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-12)


@each_class
def test_named_parameters(name: str) -> None:
    model = model_of()
    optimizer = CLASSES[name](model.named_parameters())
    names = [key for key, _ in model.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    backward(model)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    with pytest.raises(ValueError, match="cannot add param group without names"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@each_class
@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ([torch.zeros(1)], TypeError, "param_group must be a dict, but got <class 'list'>"),
        ({"params": {torch.zeros(1)}}, TypeError, "parameters need to be organized in ordered"),
        ({"params": ["text"]}, TypeError, "optimizer can only optimize Tensors, but one of"),
        (
            {"params": [torch.ones(1, requires_grad=True) * 2]},
            ValueError,
            "can't optimize a non-leaf Tensor",
        ),
    ],
    ids=["no dict", "set", "text", "non-leaf"],
)
def test_refusals_of_torchs_base_class(
    name: str, group: Any, error: type[Exception], message: str
) -> None:
    optimizer = CLASSES[name]([nn.Parameter(torch.zeros(1))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@each_class
@pytest.mark.parametrize("copy", [deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_are_independent_and_step_on(name: str, copy: Callable[[Any], Any]) -> None:
    model = model_of()
    options: dict[str, Any] = {"nonfinite": "skip", "clip_grad_norm": 0.5}
    optimizer = CLASSES[name](model.parameters(), lr=0.1, **options)
    backward(model)
    optimizer.step()
    twin = copy(optimizer)
    assert (twin.nonfinite, twin.clip_grad_norm) == ("skip", 0.5)
    assert type(twin) is type(optimizer)
    params = list(model.parameters())
    copies = twin.param_groups[0]["params"]
    for param, other in zip(params, copies, strict=True):
        assert param is not other
        other.grad = param.grad.clone() if param.grad is not None else None
    before = copies[0].detach().clone()
    optimizer.step()
    assert torch.equal(copies[0], before)
    twin.step()
    assert all(map(torch.equal, params, copies))
    assert twin.last_grad_norm == optimizer.last_grad_norm


@each_class
def test_a_copy_stepped_against_the_live_model_says_so(name: str) -> None:
    """The parameters of a copied optimizer are copies: backward does not reach them."""
    model = model_of()
    twin = deepcopy(CLASSES[name](model.parameters()))
    backward(model)
    with pytest.warns(UserWarning, match="saw no gradients"):
        twin.step()
    with pytest.raises(ValueError, match="no longer in the model"):
        twin.check(model)


@each_class
def test_version_counters_are_raised_so_autograd_notices(name: str) -> None:
    weight, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = CLASSES[name]([weight, idle])
    for _ in range(3):  # planned, then remembered
        versions = weight._version, idle._version
        weight.grad = torch.ones(3)
        optimizer.step()
        assert weight._version > versions[0]
        assert idle._version == versions[1]
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_class
def test_version_counters_of_parameters_that_rest_are_not_raised(name: str) -> None:
    """Two losses over two halves of a model, the graph of one older than the other's step."""
    stepped, resting = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = CLASSES[name]([stepped, resting])
    stepped.grad = resting.grad = torch.ones(3)
    optimizer.step()
    optimizer.step()
    loss = (resting * resting).sum()
    resting.grad = None
    for _ in range(2):
        stepped.grad = torch.ones(3)
        optimizer.step()
    loss.backward()
    assert resting.grad is not None


@each_class
def test_frozen_parameters_of_any_dtype_are_passed_over(name: str) -> None:
    """A model with quantised weights, all of whose parameters are given to the optimizer."""
    codes = nn.Parameter(torch.ones(4, dtype=torch.uint8), requires_grad=False)
    weight = nn.Parameter(torch.ones(3))
    optimizer = CLASSES[name]([("codes", codes), ("weight", weight)], clip_grad_norm=10.0)
    for _ in range(3):  # planned, then remembered
        weight.grad = torch.ones(3)
        before = weight.detach().clone()
        optimizer.step()
        assert not torch.equal(before, weight)
        optimizer.load_state_dict(optimizer.state_dict())
    assert codes not in optimizer.state
    codes.grad = torch.ones_like(codes)
    with pytest.raises(TypeError, match=r"'codes' has dtype torch\.uint8: it cannot be"):
        optimizer.step()
