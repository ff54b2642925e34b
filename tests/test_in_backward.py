"""Stepping inside backward: the same numbers, no gradients left, and what it refuses."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from ebbtide.torch import SGD, AdamW, step_in_backward


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6), torch.nn.Linear(6, 1)]
    return torch.nn.Sequential(*layers)


def _loss(model: torch.nn.Module, step: int) -> torch.Tensor:
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return model(inputs).square().mean()


@pytest.mark.parametrize("kind", [AdamW, SGD], ids=lambda kind: kind.__name__)
def test_the_trajectory_is_that_of_a_step_after_backward(kind: type) -> None:
    models, optimizers = [], []
    for inside in (False, True):
        model = _model()
        optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1)
        if inside:
            step_in_backward(model, optimizer)
        for step in range(10):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (1 + step)
            _loss(model, step).backward()
            assert inside == all(param.grad is None for param in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
        optimizers.append(optimizer)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in optimizers[0].state[a].items():
            assert torch.equal(value, optimizers[1].state[b][key])


def test_parameters_outside_the_model_are_stepped_as_usual() -> None:
    model, extra = _model(), torch.ones(3, requires_grad=True)
    optimizer = AdamW([*model.parameters(), extra], lr=0.1, weight_decay=0.0)
    step_in_backward(model, optimizer)
    (_loss(model, 0) + extra.sum()).backward()
    assert extra.grad is not None
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.9))


def test_hooks_run_and_the_handle_ends_it() -> None:
    model = _model()
    optimizer = AdamW(model.parameters())
    handle = step_in_backward(model, optimizer)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    _loss(model, 0).backward()
    optimizer.step()
    handle.remove()
    _loss(model, 1).backward()
    assert all(param.grad is not None for param in model.parameters())
    optimizer.step()
    assert seen == [1, 1]
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_a_loaded_state_is_used_at_once() -> None:
    model = _model()
    optimizer = AdamW(model.parameters())
    step_in_backward(model, optimizer)
    _loss(model, 0).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(41.0)
    optimizer.load_state_dict(saved)
    _loss(model, 1).backward()
    optimizer.step()
    assert all(state["step"] == 42 for state in optimizer.state.values())


def test_the_arrangement_outlasts_loading() -> None:
    models = [_model(), _model()]
    optimizers = [AdamW(model.named_parameters(), lr=0.05) for model in models]
    step_in_backward(models[0], optimizers[0])
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.zero_grad()
            _loss(model, step).backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert a.grad is None
        assert torch.equal(a, b)


def test_a_group_is_found_where_it_has_been_moved_to() -> None:
    models = [_model(), _model()]
    optimizers = []
    for model in models:
        first, *others = model.parameters()
        optimizers.append(AdamW([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.01}]))
    step_in_backward(models[0], optimizers[0])
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups.reverse()
            optimizer.zero_grad()
            _loss(model, step).backward()
            optimizer.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    optimizers[0].param_groups.pop()
    with pytest.raises(RuntimeError, match="is in no param group any more"):
        _loss(models[0], 9).backward()


@pytest.mark.parametrize(("option", "value"), [("clip_grad_norm", 1.0), ("nonfinite", "skip")])
def test_what_needs_all_gradients_is_refused_when_it_is_asked_for_later(
    option: str, value: object
) -> None:
    model = _model()
    optimizer = AdamW(model.parameters())
    step_in_backward(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    setattr(optimizer, option, value)
    with pytest.raises(ValueError, match="need all of them"):
        _loss(model, 0).backward()
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, old)


def test_accumulation_is_refused_by_name() -> None:
    model = _model()
    optimizer = AdamW([(name, param) for name, param in model.named_parameters()])
    step_in_backward(model, optimizer)
    _loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"parameter '3\.\w+' got a second gradient"):
        _loss(model, 1).backward()


@pytest.mark.parametrize("words", [{"clip_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=str)
def test_what_needs_all_gradients_is_refused(words: dict[str, object]) -> None:
    model = _model()
    optimizer = AdamW(model.parameters(), **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="before the other gradients are there"):
        step_in_backward(model, optimizer)


def test_what_cannot_be_arranged_is_refused_by_name() -> None:
    model = _model()
    with pytest.raises(TypeError, match=r"of ebbtide\.torch, got torch\.optim\.adamw\."):
        step_in_backward(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
    optimizer = AdamW(model.parameters())
    with pytest.raises(ValueError, match="steps no parameter of this model"):
        step_in_backward(_model(), optimizer)
    handle = step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="steps inside backward already"):
        step_in_backward(model, optimizer)
    handle.remove()
    step_in_backward(model, optimizer)


def test_a_fused_grad_scaler_is_refused() -> None:
    model = _model()
    optimizer = AdamW(model.parameters(), fused=True)
    step_in_backward(model, optimizer)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="GradScaler decides after backward"):
        optimizer.step()


def test_non_finite_gradients_are_reported_by_step() -> None:
    model = _model()
    optimizer = AdamW([(name, param) for name, param in model.named_parameters()])
    step_in_backward(model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    (_loss(model, 0) * float("nan")).backward()
    with pytest.raises(FloatingPointError, match=r"'0\.weight' \(48 of 48\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    _loss(model, 1).backward()
    optimizer.step()


def test_the_arrangement_keeps_neither_model_nor_optimizer_alive() -> None:
    model = _model()
    optimizer = AdamW(model.parameters())
    step_in_backward(model, optimizer)
    _loss(model, 0).backward()
    optimizer.step()
    alive = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
