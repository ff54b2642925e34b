"""torch's own table of optimizer inputs, run against ours: whatever its classes accept, ours do."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import (
    _get_optim_inputs_including_global_cliquey_kwargs as all_inputs,
)
from torch.testing._internal.common_optimizers import optim_db

from ebbtide.torch import SGD, Adam, AdamW
from tests.tolerances import TORCH_FLOAT32, TORCH_FLOAT32_SCALARS, TORCH_FLOAT64

OURS = {"Adam": Adam, "AdamW": AdamW, "SGD": SGD}
THEIRS = {info.name: info for info in optim_db if info.name in OURS}

# Where ours are meant to behave otherwise than torch's classes, by torch's name of the test.
DEVIATIONS = {
    "test_fused_matches_forloop[bfloat16, float16]": (
        "16-bit parameters are rounded stochastically, so that small updates and decay happen"
    ),
    "test_step_is_noop_when_params_have_no_grad": "the first such step warns",
    "test_errors (duplicate parameters)": "torch's warning, and the parameter is updated once",
    "a meta parameter without fused=True": "refused by name instead of stepped without effect",
}

Row = tuple[str, dict[str, Any]]


def rows(*skip: str) -> list[Any]:
    return [
        pytest.param(name, each.kwargs, id=f"{name}-{each.desc}")
        for name, info in THEIRS.items()
        for each in all_inputs("cpu", torch.float32, info, skip=skip)
    ]


each_row = pytest.mark.parametrize(("name", "kwargs"), rows())
each_plain_row = pytest.mark.parametrize(("name", "kwargs"), rows("differentiable"))


def theirs_of(name: str) -> Any:
    return THEIRS[name].optim_cls


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)


def parameters(model: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return what an optimizer gets: clones, where it is to be differentiated through."""
    if not kwargs.get("differentiable"):
        return list(model.parameters())
    return [p.clone() for p in model.parameters()]


def set_grads(params: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = grad.to(param.dtype)


def same(ours: Any, theirs: Any, params: list[Tensor], others: list[Tensor]) -> None:
    tolerance = TORCH_FLOAT64 if params[0].dtype == torch.float64 else TORCH_FLOAT32
    if ours.defaults["differentiable"]:
        tolerance = TORCH_FLOAT32_SCALARS
    for mine, other in zip(params, others, strict=True):
        torch.testing.assert_close(mine.detach(), other.detach(), **tolerance)
        state, wanted = ours.state[mine], theirs.state[other]
        assert list(state) == list(wanted)
        for key, value in wanted.items():
            torch.testing.assert_close(state[key].detach(), value.detach(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_row
def test_seven_steps_match_torch(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    params = parameters(network(dtype), kwargs)
    others = parameters(network(dtype), kwargs)
    params.append(torch.empty((), dtype=dtype))  # never gets a gradient
    others.append(torch.empty((), dtype=dtype))
    ours, theirs = OURS[name](params, **deepcopy(kwargs)), theirs_of(name)(others, **kwargs)
    for seed in range(7):
        set_grads(params[:-1], seed)
        set_grads(others[:-1], seed)
        ours.step()
        theirs.step()
    same(ours, theirs, params[:-1], others[:-1])
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


@each_plain_row
def test_complex_parameters_step_like_their_real_and_imaginary_parts(
    name: str, kwargs: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(5, 3, dtype=torch.complex128, requires_grad=True)
    parts = [whole.real.detach().clone(), whole.imag.detach().clone()]
    ours, apart = OURS[name]([whole], **kwargs), OURS[name](parts, **kwargs)
    if kwargs.get("fused"):
        whole.grad = torch.zeros_like(whole)
        with pytest.raises(RuntimeError, match="requires all the params to be floating point"):
            ours.step()
        return
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        parts[0].grad, parts[1].grad = whole.grad.real, whole.grad.imag
        ours.step()
        apart.step()
    assert torch.equal(torch.view_as_real(whole.detach()), torch.stack(parts, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_plain_row
def test_the_loss_goes_the_right_way(name: str, kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    every_other = torch.randn(10, 5, 2).to(dtype)[..., 0]
    for weight in (torch.randn(10, 5).to(dtype), every_other):
        before, after = descend(name, deepcopy(kwargs), weight.requires_grad_())
        assert after > before if kwargs.get("maximize") else after < before


def descend(name: str, kwargs: dict[str, Any], weight: Tensor) -> tuple[float, float]:
    """Return the loss of a linear model before and after twenty steps with a closure."""
    bias = torch.randn(10).to(weight.dtype).requires_grad_()
    inputs = torch.randn(5).to(weight.dtype)
    optimizer = OURS[name]([weight, bias], **kwargs)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(inputs) + bias).pow(2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    return losses[0], closure().item()


SCHEDULED = [
    pytest.param(name, makers, id=f"{name}-{number}")
    for name, info in THEIRS.items()
    for number, makers in enumerate(info.scheduler_inputs)
]


@pytest.mark.parametrize(("name", "makers"), SCHEDULED)
def test_torchs_schedulers_drive_ours_as_theirs(
    name: str, makers: list[Callable[..., Any]]
) -> None:
    params, others = list(network().parameters()), list(network().parameters())
    ours, theirs = OURS[name](params, lr=0.01), theirs_of(name)(others, lr=0.01)
    schedulers = [[make(each) for make in makers] for each in (ours, theirs)]
    for seed in range(25):
        for optimizer, owned in ((ours, params), (theirs, others)):
            set_grads(owned, seed)
            optimizer.step()
        for pair in zip(*schedulers, strict=True):
            for scheduler in pair:
                arguments = (1.0,) if isinstance(scheduler, ReduceLROnPlateau) else ()
                scheduler.step(*arguments)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    same(ours, theirs, params, others)


ERRORS = [
    pytest.param(name, each, id=f"{name}-{number}-{each.optimizer_error_input.desc}")
    for name, info in THEIRS.items()
    for number, each in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_what_torch_refuses_is_refused_in_its_words(name: str, error: Any) -> None:
    refused = error.optimizer_error_input
    warns = issubclass(error.error_type, Warning)
    expected = (pytest.warns if warns else pytest.raises)(error.error_type, match=error.error_regex)
    with expected:
        OURS[name](refused.params, **refused.kwargs)


FUSED = [
    pytest.param(name, flags, message, id=f"{name}-{message[:20]}")
    for name in THEIRS
    for flags, message in (
        ({"foreach": True}, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True}, "`fused` does not support `differentiable`"),
    )
]


@pytest.mark.parametrize(("name", "flags", "message"), FUSED)
def test_flags_that_exclude_each_other(name: str, flags: dict[str, bool], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OURS[name]([torch.zeros(1)], fused=True, **flags)


@each_plain_row
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_a_tensor_lr_steps_as_the_number(name: str, kwargs: dict[str, Any], dims: int) -> None:
    kwargs = {key: value for key, value in kwargs.items() if key != "lr"}
    params, others = list(network().parameters()), list(network().parameters())
    number = OURS[name](params, lr=1e-3, **kwargs)
    lr = torch.tensor(1e-3, dtype=torch.float64).reshape([1] * dims)
    if name != "SGD" and kwargs.get("foreach"):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            OURS[name](others, lr=lr, **kwargs)
        return
    tensor = OURS[name](others, lr=lr, **kwargs)
    for seed in range(5):
        for optimizer, owned in ((number, params), (tensor, others)):
            set_grads(owned, seed)
            optimizer.step()
    assert all(map(torch.equal, params, others))


@each_row
def test_zero_gradients_move_nothing(name: str, kwargs: dict[str, Any]) -> None:
    kwargs = {**kwargs, "weight_decay": 0}
    param = torch.randn(5, 1).requires_grad_(not kwargs.get("differentiable"))
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    OURS[name]([param], **kwargs).step(lambda: torch.tensor([1.0]))
    assert torch.equal(param, before)


@each_row
def test_without_gradients_nothing_happens_and_a_warning_says_so(
    name: str, kwargs: dict[str, Any]
) -> None:
    param = torch.randn(5, 1).requires_grad_(not kwargs.get("differentiable"))
    before = param.detach().clone()
    optimizer = OURS[name]([param], **kwargs)
    with pytest.warns(UserWarning, match="saw no gradients"):
        optimizer.step()
    optimizer.step()  # once is enough
    assert torch.equal(param, before)
    assert optimizer.state_dict()["state"] == {}


@each_plain_row
def test_state_dicts_of_old_torch_load(name: str, kwargs: dict[str, Any]) -> None:
    """Groups without the newer flags, step counts that are numbers."""
    params = list(network().parameters())
    optimizer = OURS[name](params, **deepcopy(kwargs))
    set_grads(params, 0)
    optimizer.step()
    old = deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in (*THEIRS[name].not_og_supported_flags, "decoupled_weight_decay"):
            group.pop(flag, None)
    for state in old["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    kept = deepcopy(old)
    optimizer.load_state_dict(old)
    set_grads(params, 1)
    optimizer.step()
    assert old["param_groups"] == kept["param_groups"]
    if name != "SGD":
        assert {float(optimizer.state[p]["step"]) for p in params} == {2.0}


@each_plain_row
def test_a_deep_copy_has_every_public_attribute(name: str, kwargs: dict[str, Any]) -> None:
    params = list(network().parameters())
    set_grads(params, 0)
    optimizer = OURS[name](params, **kwargs)
    optimizer.step()
    copy = deepcopy(optimizer)
    public = [{key for key in vars(each) if key[0] != "_"} for each in (optimizer, copy)]
    assert public[0] == public[1]
    assert copy.param_groups[0]["params"][0] is not params[0]
    assert repr(copy) == repr(optimizer)
    assert hasattr(copy, "_step_supports_amp_scaling") == bool(kwargs.get("fused"))


@pytest.mark.parametrize("name", THEIRS)
def test_meta_parameters_are_refused_and_then_known_as_stale(name: str) -> None:
    """As torch does with fused=True; its other paths step them without effect."""
    assert "a meta parameter without fused=True" in DEVIATIONS
    for fused, message in ((True, "`fused=True` requires all the params"), (None, "materialise")):
        with torch.device("meta"):
            model = nn.Linear(2, 3)
        optimizer = OURS[name](model.parameters(), fused=fused)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        model.to_empty(device="cpu")
        with pytest.raises(ValueError, match="no longer in the model"):
            optimizer.check(model)


def test_deviations_have_reasons() -> None:
    assert all(name and reason for name, reason in DEVIATIONS.items())
