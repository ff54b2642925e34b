"""Bad input and faults: refused by name, or said; never silent, never half done."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ebbtide.torch import SGD, Adam, AdamW

INF, NAN, ZERO = math.inf, math.nan, 0.0


def parameter(*shape: int, dtype: torch.dtype = torch.float32, grad: float | None = 1.0) -> Tensor:
    param = nn.Parameter(torch.ones(shape or (3,), dtype=dtype))
    if grad is not None:
        param.grad = torch.full_like(param, grad)
    return param


BAD_VALUES: list[tuple[type, dict[str, Any], type[Exception], str]] = [
    (AdamW, {"lr": -1e-3}, ValueError, "Invalid learning rate: -0.001"),
    (AdamW, {"lr": NAN}, ValueError, "Invalid learning rate: nan"),
    (AdamW, {"lr": INF}, ValueError, "Invalid learning rate: inf"),
    (AdamW, {"lr": True}, TypeError, "Invalid learning rate: True is a bool, not a number"),
    (AdamW, {"lr": "1e-3"}, TypeError, r"'1e-3' is a str, not a number; write lr=float\('1e-3'\)"),
    (AdamW, {"lr": None}, TypeError, "Invalid learning rate: None is a NoneType"),
    (AdamW, {"lr": 1 + 0j}, TypeError, "is a complex, not a number"),
    (AdamW, {"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
    (AdamW, {"lr": torch.tensor(NAN)}, ValueError, "Invalid learning rate: nan"),
    (AdamW, {"lr": torch.tensor([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
    (AdamW, {"weight_decay": -1.0}, ValueError, "Invalid weight_decay value: -1.0"),
    (AdamW, {"weight_decay": INF}, ValueError, "Invalid weight_decay value: inf"),
    (AdamW, {"weight_decay": "0.1"}, TypeError, "'0.1' is a str"),
    (AdamW, {"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
    (AdamW, {"eps": NAN}, ValueError, "Invalid epsilon value: nan"),
    (AdamW, {"betas": (1.0, 0.999)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    (AdamW, {"betas": (0.9, NAN)}, ValueError, "Invalid beta parameter at index 1: nan"),
    (AdamW, {"betas": (0.9, "0.99")}, TypeError, "index 1: '0.99' is a str"),
    (AdamW, {"betas": 0.9}, ValueError, "betas must be a pair of numbers, got 0.9"),
    (AdamW, {"betas": (0.9,)}, ValueError, "betas must be a pair"),
    (AdamW, {"amsgrad": "false"}, TypeError, "Invalid amsgrad: 'false' is a str, not a bool"),
    (AdamW, {"decay_policy": "paper"}, ValueError, "Invalid decay_policy: 'paper'; one of l2"),
    (AdamW, {"nonfinite": "ignore"}, ValueError, "Invalid nonfinite: 'ignore'; one of raise"),
    (AdamW, {"clip_grad_norm": 0}, ValueError, "Invalid clip_grad_norm: 0; above 0, or None"),
    (AdamW, {"clip_grad_norm": "1"}, TypeError, "Invalid clip_grad_norm: '1' is a str"),
    (AdamW, {"seed": -1}, ValueError, "Invalid seed: -1"),
    (AdamW, {"seed": 0.5}, ValueError, "Invalid seed: 0.5"),
    (AdamW, {"lr": 0.1, "weight_decay": 10.0}, ValueError, "would remove 1 of the parameter"),
    (AdamW, {"lr": 0.1, "weight_decay": 1e4}, ValueError, "the share must be below 1"),
    (
        AdamW,
        {"weight_decay": 1.5, "decay_policy": "independent"},
        ValueError,
        "would remove 1.5 of the parameter",
    ),
    (
        AdamW,
        {"lr": ZERO, "decay_policy": "corrected"},
        ValueError,
        "base_lr is 0, and decay_policy='corrected' divides by it",
    ),
    (
        Adam,
        {"decoupled_weight_decay": True, "decay_policy": "l2"},
        ValueError,
        "decoupled_weight_decay=True contradicts decay_policy='l2'",
    ),
    (SGD, {"momentum": -0.5}, ValueError, "Invalid momentum value: -0.5"),
    (SGD, {"momentum": "0.9"}, TypeError, "'0.9' is a str"),
    (SGD, {"dampening": NAN}, ValueError, "Invalid dampening value: nan"),
    (SGD, {"dampening": "0"}, TypeError, "Invalid dampening value: '0' is a str"),
    (SGD, {"nesterov": True}, ValueError, "Nesterov momentum requires a momentum and zero"),
]


@pytest.mark.parametrize(("kind", "options", "error", "message"), BAD_VALUES, ids=str)
def test_bad_values_are_refused_by_the_constructor(
    kind: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind([parameter()], **options)


IN_GROUPS = [row for row in BAD_VALUES if not {"nonfinite", "clip_grad_norm"} & row[1].keys()]


@pytest.mark.parametrize(("kind", "options", "error", "message"), IN_GROUPS, ids=str)
def test_bad_values_of_a_group_are_refused_at_construction_and_when_they_change(
    kind: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind([{"params": [parameter()], **options}])
    if "decoupled_weight_decay" in options or options.get("lr") is ZERO:
        return  # derived, and checked, when a group is added
    param = parameter()
    optimizer = kind([param])
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0].update(options)
    for _ in range(2):
        with pytest.raises(error, match=message + r".*\(param group 0\)"):
            optimizer.step()
    assert torch.equal(param.detach(), before)


@pytest.mark.parametrize("number", [np.float32(0.1), np.float64(0.1), np.int64(0), 0, 1])
def test_numbers_of_other_libraries_are_numbers(number: Any) -> None:
    param = parameter()
    AdamW([param], lr=number, weight_decay=np.float32(0.1)).step()
    expected = parameter()
    AdamW([expected], lr=float(number), weight_decay=float(np.float32(0.1))).step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize(
    ("kind", "key", "meant"),
    [
        (AdamW, "weigth_decay", "weight_decay"),
        (AdamW, "weight-decay", "weight_decay"),
        (AdamW, "weightdecay", "weight_decay"),
        (AdamW, "Weight_Decay", "weight_decay"),
        (AdamW, "weight_decy", "weight_decay"),
        (AdamW, "beta", "betas"),
        (AdamW, "beta1", "betas"),
        (AdamW, "LR", "lr"),
        (AdamW, "learning_rate", "lr"),
        (AdamW, "epsilon", "eps"),
        (AdamW, "maximise", "maximize"),
        (AdamW, "decay_polciy", "decay_policy"),
        (AdamW, "base-lr", "base_lr"),
        (SGD, "momentun", "momentum"),
        (SGD, "nestorov", "nesterov"),
        (SGD, "dampenning", "dampening"),
    ],
)
def test_a_key_that_is_nearly_known_is_refused_with_the_right_word(
    kind: Any, key: str, meant: str
) -> None:
    with pytest.raises(ValueError, match=f"unknown group key '{key}': did you mean '{meant}'"):
        kind([{"params": [parameter()], key: 0.1}])
    param = parameter()
    optimizer = kind([param])
    optimizer.step()
    optimizer.param_groups[0][key] = 0.1
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        optimizer.step()


@pytest.mark.parametrize(
    "key",
    ["lr_scale", "name", "lr_mult", "wd_mult", "layer", "tag", "layer_decay", "weight_decay_scale",
     "initial_lr", "swa_lr", "role", "is_norm", "group_name", "module", "lr_decay", "decay", "type",
     "use_muon", "weight_decay_mult", "layer_id", "max_lr", "fix_step", "fix_lr", "base_wd",
     "initial_wd", "max_wd"],
)  # fmt: skip
def test_keys_unlike_any_known_one_are_kept(key: str) -> None:
    optimizer = AdamW([{"params": [parameter()], key: "mine"}])
    optimizer.step()
    assert optimizer.param_groups[0][key] == "mine"
    assert optimizer.state_dict()["param_groups"][0][key] == "mine"


def test_an_empty_list_and_a_generator_that_was_used_up() -> None:
    params = (param for param in [parameter()])
    AdamW(params)
    for empty in ([], params):
        with pytest.raises(ValueError, match=r"optimizer got an empty parameter list .*only once"):
            AdamW(empty)


def test_an_empty_group_keeps_its_hyperparameters() -> None:
    optimizer = AdamW([{"params": [], "lr": 0.5}, {"params": [parameter()]}])
    optimizer.step()
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.5
    assert group.keys() == optimizer.param_groups[1].keys()


def test_a_duplicate_within_a_group_warns_and_is_updated_once() -> None:
    twice, once = parameter(), parameter()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD([("a", twice), ("b", twice)], lr=0.25)
    reference = SGD([once], lr=0.25)
    for _ in range(3):
        optimizer.step()
        reference.step()
    assert torch.equal(twice, once)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        adam = AdamW([twice, twice])
    for _ in range(3):
        adam.step()
    assert adam.state[twice]["step"] == 3


def test_a_duplicate_over_groups_is_refused_by_name() -> None:
    param = parameter()
    groups = [{"params": [("first", param)]}, {"params": [("second", param)]}]
    with pytest.raises(ValueError, match="in more than one parameter group: first"):
        AdamW(groups)


@pytest.mark.parametrize(
    "param",
    [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool),
     torch.zeros(2).to(torch.float8_e4m3fn).requires_grad_()],
    ids=lambda param: str(param.dtype),
)  # fmt: skip
def test_integers_and_eight_bits_are_refused_at_construction(param: Tensor) -> None:
    with pytest.raises(TypeError, match=f"parameter 'w' has dtype {param.dtype}"):
        AdamW([("w", param)])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32])
def test_a_models_parameter_of_such_a_dtype_is_refused(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(2).to(dtype))
    with pytest.raises(TypeError, match=f"parameter 'w' has dtype {param.dtype}: it cannot be"):
        AdamW([("w", param)])


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    first, second = parameter(), parameter()
    optimizer = AdamW([first])
    for bad in ({"params": [second], "lr": -1}, {"params": [second], "weigth_decay": 1}):
        with pytest.raises(ValueError, match="param group 1"):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1
    optimizer.step()
    assert torch.equal(second.detach(), torch.ones(3))


def test_group_dicts_of_the_caller_are_left_alone() -> None:
    """Two optimizers over one list of groups do not inherit from each other."""
    groups = [{"params": [parameter()]}]
    AdamW(groups)
    assert groups[0].keys() == {"params"}
    assert SGD(groups, lr=0.5).param_groups[0]["lr"] == 0.5


def test_frozen_parameters_and_those_without_gradient_are_skipped() -> None:
    frozen, idle, live = parameter(grad=None), parameter(grad=None), parameter()
    frozen.requires_grad_(False)
    optimizer = AdamW([frozen, idle, live], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3))
    assert torch.equal(idle.detach(), torch.ones(3))
    assert list(optimizer.state) == [live]


def test_a_zero_gradient_decays() -> None:
    param = parameter(grad=0.0)
    AdamW([param], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(param.detach(), torch.tensor(0.95))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("differentiable", [False, True])
def test_nothing_over_nothing_is_no_update(dtype: torch.dtype, differentiable: bool) -> None:
    """eps=0 and a gradient that is exactly zero; for float16 also an eps that it cannot hold."""
    for eps in (0.0, 1e-8):
        param = torch.ones(5, dtype=dtype)
        param.grad = torch.zeros(5, dtype=dtype)
        AdamW([param], eps=eps, weight_decay=0, differentiable=differentiable).step()
        assert torch.equal(param, torch.ones(5, dtype=dtype))


def test_tiny_gradients_move_sixteen_bit_parameters() -> None:
    param = parameter(dtype=torch.float16, grad=2.0**-24)
    AdamW([param], lr=0.5, weight_decay=0).step()
    assert bool((param <= 0.75).all())


def test_a_sparse_gradient_is_refused_by_adam_and_taken_by_sgd() -> None:
    param = parameter(4, 2)
    dense = torch.zeros(4, 2)
    dense[1] = 3.0
    param.grad = dense.to_sparse()
    with pytest.raises(RuntimeError, match=r"please consider SparseAdam instead \(parameter 'w'\)"):
        AdamW([("w", param)]).step()
    for options in ({}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}):
        ours, expected = parameter(4, 2), parameter(4, 2)
        ours.grad, expected.grad = dense.to_sparse(), dense.clone()
        optimizers = [SGD([each], lr=0.1, **options) for each in (ours, expected)]
        for _ in range(2):
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(ours, expected)


def test_a_model_that_changes_its_dtype_takes_its_state_along() -> None:
    for before, after in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float64, torch.float16),
    ):
        for kind in (AdamW, lambda params: SGD(params, lr=0.1, momentum=0.9)):
            model = nn.Linear(4, 4).to(before)
            optimizer = kind(model.parameters())
            for dtype in (before, after, after):
                model.to(dtype)
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
                optimizer.step()
            state = optimizer.state[model.weight]
            assert state.get("step", torch.tensor(3.0)) == 3
            assert all(bool(torch.isfinite(value).all()) for value in state.values())
            assert model.weight.dtype == after


def test_float32_gradients_of_bfloat16_parameters() -> None:
    param = parameter(dtype=torch.bfloat16, grad=None)
    param.grad_dtype = torch.float32
    param.grad = torch.full((3,), 1.0)
    AdamW([param], lr=0.5, weight_decay=0).step()
    assert bool((param == 0.5).all())


def test_one_optimizer_over_many_dtypes() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    params = [parameter(dtype=dtype) for dtype in dtypes]
    optimizer = AdamW(params, lr=0.5, weight_decay=0)
    for _ in range(2):
        optimizer.step()
    for param in params:
        assert torch.allclose(param.detach().real.float(), torch.zeros(3), atol=1e-2)
        state_dtype = optimizer.state[param]["exp_avg"].dtype
        assert state_dtype == (torch.bfloat16 if param.dtype == torch.float16 else param.dtype)


def test_check_names_missing_and_stale_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = AdamW(model.named_parameters())
    optimizer.check(model)
    model.load_state_dict(deepcopy(model.state_dict()), assign=True)
    with pytest.raises(ValueError, match=r"no longer in the model: 0\.weight, 0\.bias, 1\.weight"):
        optimizer.check(model)
    with pytest.raises(ValueError, match=r"but not in the optimizer: 0\.weight"):
        optimizer.check(model)
    head = AdamW(model[1].parameters())
    head.check(model, partial=True)
    with pytest.raises(ValueError, match=r"not in the optimizer: 0\.weight, 0\.bias$"):
        head.check(model)
    model[0].requires_grad_(False)
    head.check(model)


@pytest.mark.parametrize("policy", ["decoupled", "independent", "corrected"])
def test_a_decay_that_float32_cannot_hold_warns_with_the_number(policy: str) -> None:
    options = {"lr": 1e-4, "weight_decay": 1e-5, "decay_policy": policy, "base_lr": 1e4}
    if policy == "decoupled":
        options["base_lr"] = None
    with pytest.warns(UserWarning, match=r"param group 0 removes 1e-\d+ of a parameter in a step"):
        AdamW([parameter()], **options)
    AdamW([parameter(dtype=torch.float64)], **options)  # holds it
    AdamW([parameter(dtype=torch.bfloat16)], **options)  # is rounded stochastically
    AdamW([parameter()], lr=1e-4, weight_decay=0.0)
    AdamW([parameter()], lr=0.0, weight_decay=1e-5)
    Adam([parameter()], lr=1e-4, weight_decay=1e-5)  # L2 is not a share


def test_state_of_another_optimizer_is_refused_in_the_step() -> None:
    param = parameter()
    optimizer = AdamW([("w", param)])
    optimizer.state[param] = {"momentum_buffer": torch.zeros(3)}
    with pytest.raises(RuntimeError, match=r"state of parameter 'w' holds \['momentum_buffer'\]"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3))


def test_one_step_counter_shared_by_several_parameters_counts_once() -> None:
    params = [parameter(), parameter()]
    optimizer = AdamW(params)
    optimizer.step()
    shared = torch.tensor(1.0)
    for param in params:
        optimizer.state[param]["step"] = shared
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [2.0, 2.0]


def test_capturable_needs_a_device_that_captures() -> None:
    with pytest.raises(AssertionError, match="If capturable=True, params and state_steps must be"):
        AdamW([parameter()], capturable=True).step()


def test_group_level_tensors_with_foreach_are_refused_in_the_step_as_in_torch() -> None:
    optimizer = AdamW([parameter()], foreach=True)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(RuntimeError, match="lr as a Tensor is not supported for capturable=False"):
        optimizer.step()
