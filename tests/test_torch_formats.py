"""Low-bit state and split weights on the torch face: what is kept how, layouts, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.numpy
from ebbtide.torch import SGD, Adam, AdamW, DecayMonitor, estimate, step_in_backward
from ebbtide.torch.storage import joined, plain

EIGHT = {"state_format": "8bit"}


def steps(optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(count):
        for param in params:
            grad = torch.randn(param.shape, generator=generator) + 0.1
            param.grad = torch.empty_like(param).copy_(grad)
        optimizer.step()


def matrix(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (64, 200)) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))


@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float32, {}, {"exp_avg": torch.float32}),
        (torch.float32, {"state_format": "bfloat16"}, {"exp_avg_sq": torch.bfloat16}),
        (torch.float32, EIGHT, {"exp_avg_codes": torch.int8, "exp_avg_sq_codes": torch.uint8}),
        (torch.bfloat16, {}, {"exp_avg": torch.bfloat16}),
        (torch.bfloat16, {"state_format": "float32"}, {"exp_avg": torch.float32}),
        (torch.bfloat16, {**EIGHT, "master_format": "24bit"}, {"residual": torch.int8}),
        (torch.bfloat16, {**EIGHT, "master_format": "32bit"}, {"residual": torch.uint8}),
        (torch.float16, {**EIGHT, "master_format": "32bit"}, {"residual": torch.uint8}),
        (torch.float32, {"master_format": "32bit"}, {"exp_avg": torch.float32}),
        (torch.float64, EIGHT, {"exp_avg": torch.float64}),
        (torch.complex64, EIGHT, {"exp_avg": torch.complex64}),
    ],
)  # fmt: skip
def test_state_is_kept_as_asked_and_estimated(
    dtype: torch.dtype, options: dict[str, Any], expected: dict[str, torch.dtype]
) -> None:
    param = matrix(dtype)
    optimizer = AdamW([("w", param)], **options)
    steps(optimizer, 2)
    state = optimizer.state[param]
    for key, kept in expected.items():
        assert state[key].dtype == kept
    taken = sum(value.nbytes for value in state.values())
    assert taken == estimate([("w", param)], **options).state
    assert ("residual" in state) == ("residual" in expected)


def test_small_tensors_vectors_embeddings_and_short_rows_stay_in_float32() -> None:
    shapes = {
        "fc.weight": (64, 64), "fc.bias": (5000,), "head.weight": (63, 65),
        "embed_tokens.weight": (64, 64), "conv.weight": (512, 1, 3, 3),
    }  # fmt: skip
    params = {name: matrix(torch.bfloat16, shape) for name, shape in shapes.items()}
    optimizer = AdamW(params.items(), **EIGHT)
    steps(optimizer, 1)
    coded = {name for name, param in params.items() if "exp_avg_codes" in optimizer.state[param]}
    assert coded == {"fc.weight"}
    for name in shapes.keys() - coded:
        assert optimizer.state[params[name]]["exp_avg"].dtype == torch.float32


def test_embeddings_can_be_kept_in_eight_bits_too() -> None:
    param = matrix(shape=(64, 64))
    groups = [{"params": [("embed_tokens.weight", param)], "embeddings": ""}]
    optimizer = AdamW(groups, **EIGHT)
    steps(optimizer, 1)
    assert "exp_avg_codes" in optimizer.state[param]


def test_groups_have_formats_of_their_own_and_may_change_them() -> None:
    first, second = matrix(), matrix()
    optimizer = AdamW([{"params": [first], **EIGHT}, {"params": [second]}])
    steps(optimizer, 2)
    assert "exp_avg_codes" in optimizer.state[first]
    assert optimizer.state[second]["exp_avg"].dtype == torch.float32
    decoded = plain(optimizer.state[first])
    for group, form in zip(optimizer.param_groups, ("float32", "8bit"), strict=True):
        group["state_format"] = form
    before = optimizer.state[second]["exp_avg"].clone()
    for param in (first, second):
        param.grad = None
    first.grad = torch.zeros_like(first)
    optimizer.step()
    assert torch.allclose(optimizer.state[first]["exp_avg"], 0.9 * decoded["exp_avg"], rtol=1e-6)
    assert torch.equal(optimizer.state[second]["exp_avg"], before)  # no gradient, no change
    steps(optimizer, 1)
    assert "exp_avg" not in optimizer.state[second]
    assert "exp_avg_codes" in optimizer.state[second]


def test_a_maximum_that_rests_is_kept_when_the_format_changes() -> None:
    param = matrix()
    optimizer = AdamW([("w", param)], amsgrad=True)
    (group,) = optimizer.param_groups
    steps(optimizer, 2)
    maximum = optimizer.state[param]["max_exp_avg_sq"].clone()
    group["amsgrad"] = False
    for form in ("8bit", "float32"):
        group["state_format"] = form
        steps(optimizer, 1)
    kept = optimizer.state[param]["max_exp_avg_sq"]
    assert torch.allclose(kept, maximum, rtol=2**-4, atol=0)  # half a step of a wide window


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: SGD([p], momentum=0.9, state_format="8bit"), "two moments of Adam"),
        (lambda p: AdamW([p], state_format="4bit"), "Invalid state_format: '4bit'"),
        (lambda p: AdamW([p], master_format="16bit"), "Invalid master_format: '16bit'"),
        (lambda p: Adam([{"params": [p], "state_fromat": "8bit"}]), "did you mean 'state_format'"),
        (
            lambda p: ebbtide.numpy.AdamW(
                [{"params": [p.detach().numpy()], "state_format": "8bit"}]
            ),
            "state_format is for ebbtide.torch",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_construction(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(matrix())


def test_a_step_by_torch_operations_is_refused_by_name() -> None:
    param = matrix().detach().clone()
    optimizer = AdamW([("w", param)], differentiable=True, **EIGHT)
    param.grad = torch.ones_like(param)
    before = param.clone()
    with pytest.raises(RuntimeError, match="parameter 'w' cannot be kept with state_format"):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state


@pytest.mark.parametrize("options", [{}, {"decay_policy": "corrected", "cautious": True}])
def test_a_32_bit_split_steps_as_a_float32_parameter(options: dict[str, Any]) -> None:
    low = matrix(torch.bfloat16)
    high = nn.Parameter(low.detach().float())
    optimizers = [
        AdamW([low], lr=1e-3, state_format="float32", master_format="32bit", **options),
        AdamW([high], lr=1e-3, **options),
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        low.grad = torch.randn(low.shape, generator=generator).bfloat16()
        high.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    residual = joined(optimizers[0].state[low]["residual"])
    bits = (low.detach().view(torch.int16).int() << 16) + residual.int()
    assert torch.equal(bits, high.detach().view(torch.int32))


@pytest.mark.parametrize("master", ["stochastic", "24bit", "32bit"])
@pytest.mark.parametrize("form", ["8bit", "bfloat16", "float32"])
def test_decay_happens_in_every_format(form: str, master: str) -> None:
    param = nn.Parameter(torch.ones(256, 512, dtype=torch.bfloat16))
    optimizer = AdamW([param], lr=1e-4, weight_decay=0.1, state_format=form, master_format=master)
    for _ in range(200):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    kept = (1 - 1e-5) ** 200
    values = param.detach().double()
    if master != "stochastic":
        residual = optimizer.state[param]["residual"]
        low = residual.int() << 8 if master == "24bit" else joined(residual).int()
        values = ((param.detach().view(torch.int16).int() << 16) + low).view(torch.float32).double()
    assert 1 - values.mean().item() == pytest.approx(1 - kept, rel=0.02)


LAYOUTS = {
    "transposed": lambda values: values.t().clone().t(),
    "every second": lambda values: torch.stack([values, values], -1)[..., 0],
    "offset": lambda values: torch.cat([torch.zeros(1), values.flatten()])[1:].view(values.shape),
    "channels_last": lambda values: values.view(16, 4, 10, 20).contiguous(
        memory_format=torch.channels_last
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [EIGHT, {"state_format": "bfloat16"}], ids=str)
def test_codes_do_not_depend_on_the_layout(layout: str, options: dict[str, Any]) -> None:
    values = torch.randn(64, 200, generator=torch.Generator().manual_seed(2))
    odd = nn.Parameter(LAYOUTS[layout](values))
    usual = nn.Parameter(values.reshape(odd.shape).clone())
    optimizers = [AdamW([("w", param)], **options) for param in (odd, usual)]
    for optimizer in optimizers:
        steps(optimizer, 3)
    if options == EIGHT:
        assert torch.equal(odd, usual)
        for key, value in optimizers[1].state[usual].items():
            assert torch.equal(optimizers[0].state[odd][key], value)
    else:  # the random bits follow memory
        assert torch.allclose(odd, usual, atol=1e-4)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, 1e30])
def test_a_nonfinite_gradient_poisons_nobody(bad: float, amsgrad: bool) -> None:
    for policy in ("raise", "skip", "propagate"):
        param, witness = matrix(), matrix()
        optimizer = AdamW([("w", param)], nonfinite=policy, amsgrad=amsgrad, **EIGHT)
        other = AdamW([("w", witness)], amsgrad=amsgrad, **EIGHT)
        for each in (optimizer, other):
            steps(each, 2)
        before = param.detach().clone()
        param.grad, witness.grad = torch.ones_like(param), torch.ones_like(param)
        param.grad[3, 5] = bad
        if policy == "raise":
            with pytest.raises(FloatingPointError, match=r"'w' \(1 of 12800\)"):
                optimizer.step()
            assert param[3, 5] == before[3, 5]
        else:
            optimizer.step()
        other.step()
        if policy == "skip" and not math.isfinite(bad):
            assert torch.equal(param, before)
            continue
        there = torch.ones_like(param, dtype=torch.bool)
        there[3, 5] = False
        assert torch.equal(param[there], witness[there])
        moments = plain(optimizer.state[param])
        outside = torch.ones(64, dtype=torch.bool)
        outside[3] = False
        theirs = plain(other.state[witness])
        for key in ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * amsgrad):
            assert torch.isfinite(moments[key]).all()
            assert policy != "propagate" or moments[key][3, 5] == 0  # forgotten
            assert torch.equal(moments[key][outside], theirs[key][outside])


def test_the_usual_step_is_remembered_and_notices_what_moves() -> None:
    params = [matrix(), matrix()]
    optimizers = [AdamW([("w", param)], **EIGHT) for param in params]
    moved = optimizers[1].state
    for step in range(24):
        for optimizer in optimizers:
            steps(optimizer, 1, seed=step)
        state = moved[params[1]]
        key = list(state)[step % len(state)]
        if step % 3 == 0:
            state[key] = state[key].clone()
        elif step % 3 == 1:
            state[key].data = state[key].data.clone()
    assert torch.equal(*params)
    for key, value in optimizers[0].state[params[0]].items():
        assert torch.equal(moved[params[1]][key], value)


@pytest.mark.parametrize(
    "key", ["exp_avg_codes", "exp_avg_sq_codes", "exp_avg_sq_scale", "residual"]
)
@pytest.mark.parametrize("bits", ["24bit", "32bit"])
def test_state_of_another_dtype_is_refused_before_a_kernel_reads_it(key: str, bits: str) -> None:
    """As torch's own `load_state_dict` casts it, and whoever moves a state by hand."""
    param = matrix(torch.bfloat16)
    optimizer = AdamW([("w", param)], master_format=bits, **EIGHT)
    steps(optimizer, 2)
    before = param.detach().clone()
    optimizer.state[param][key] = optimizer.state[param][key].to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"state '{key}' of parameter 'w'"):
        optimizer.step()
    assert torch.equal(param, before)


def test_scales_of_half_their_size_are_refused_and_nothing_is_written() -> None:
    param = matrix()
    optimizer = AdamW([("w", param)], **EIGHT)
    steps(optimizer, 2)
    optimizer.state[param]["exp_avg_scale"] = optimizer.state[param]["exp_avg_scale"].half()
    with pytest.raises(RuntimeError, match="state 'exp_avg_scale' of parameter 'w'"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8], ids=str)
def test_moments_of_whole_numbers_are_refused_by_name(dtype: torch.dtype) -> None:
    param = matrix()
    optimizer = AdamW([("w", param)])
    steps(optimizer, 1)
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].to(dtype)
    with pytest.raises(RuntimeError, match=r"'exp_avg' of parameter 'w' is torch\.int"):
        optimizer.step()


def test_a_scaler_and_clipping_go_with_eight_bits() -> None:
    params = [matrix(), matrix()]
    scaled = AdamW([params[0]], fused=True, clip_grad_norm=1.0, **EIGHT)
    usual = AdamW([params[1]], clip_grad_norm=1.0, **EIGHT)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        params[1].grad = torch.randn(params[1].shape, generator=generator)
        params[0].grad = 1024.0 * params[1].grad
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(float(step == 2))
        scaled.step()
        if step != 2:
            usual.step()
    assert scaled.skipped_steps == 1
    assert torch.equal(*params)


def test_a_step_inside_backward_takes_the_same_codes() -> None:
    found = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        optimizer = AdamW(model.named_parameters(), **EIGHT)
        if inside:
            step_in_backward(model, optimizer)
        for step in range(3):
            inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([value for p in model.parameters() for value in optimizer.state[p].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_monitor_reads_eight_bit_moments() -> None:
    reports = []
    for options in ({}, EIGHT):
        optimizer = AdamW([("w", matrix())], lr=1e-3, weight_decay=0.3, **options)
        monitor = DecayMonitor(optimizer, every=1)
        steps(optimizer, 5)
        reports.append(monitor.last)
    exact, low = reports
    assert exact.keys() == low.keys()
    assert low["decay/group0/update_rms"] == pytest.approx(
        exact["decay/group0/update_rms"], rel=0.02
    )
    error = low["decay/group0/realised_to_expected_error"]
    assert low["decay/group0/realised_to_expected"] == pytest.approx(1.0, abs=4 * error)


@pytest.mark.parametrize("key", ["exp_avg_scale", "exp_avg_sq_scale"])
def test_codes_that_have_lost_their_scale_are_refused_by_name(key: str) -> None:
    param = matrix()
    optimizer = AdamW([("w", param)], **EIGHT)
    steps(optimizer, 2)
    del optimizer.state[param][key]
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=f"parameter 'w' holds .*_codes without {key}"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_count_of_16_bit_parameters_is_estimated_too(momentum: float) -> None:
    param = matrix(torch.bfloat16)
    optimizer = SGD([("w", param)], momentum=momentum)
    steps(optimizer, 1)
    taken = sum(value.nbytes for value in optimizer.state[param].values())
    assert taken == estimate([("w", param)], moments=int(momentum > 0)).state
