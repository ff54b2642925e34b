"""Faults of every day that stay silent elsewhere, a test for each: right here, or said by name."""

from __future__ import annotations

import gc
import math
import sys
import warnings
import weakref
from collections import UserList
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ebbtide.numpy
from ebbtide.torch import SGD, Adam, AdamW, load, save

MAKERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda params: AdamW(params, lr=0.1, weight_decay=0.1),
    "AMSGrad": lambda params: Adam(params, lr=0.1, amsgrad=True),
    "SGD": lambda params: SGD(params, lr=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "clipped": lambda params: AdamW(params, lr=0.1, clip_grad_norm=1.0),
    "skipping": lambda params: AdamW(params, lr=0.1, nonfinite="skip"),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def step(optimizer: Any, *grads: float) -> None:
    """Step with a gradient that is the same number everywhere, one for each parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.full_like(param, grad)
    optimizer.step()


@each_maker
def test_gradients_that_stop_coming_are_noticed_once(make: Callable[[Any], Any]) -> None:
    """As after the parameters of a model were replaced: the optimizer holds the old ones."""
    param = parameter(3)
    optimizer = make([param])
    for _ in range(3):
        step(optimizer, 1.0)
    before = param.detach().clone()
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="saw no gradients") as said:
        optimizer.step()
    assert Path(said[0].filename) == Path(__file__)
    optimizer.step()
    assert torch.equal(param, before)


def test_gradients_that_stop_coming_are_noticed_on_the_numpy_face_too() -> None:
    array = np.ones((3, 2), np.float32)
    optimizer = ebbtide.numpy.AdamW({"w": array})
    for _ in range(3):
        optimizer.step({"w": np.ones((3, 2), np.float32)})
    with pytest.warns(UserWarning, match="saw no gradients"):
        optimizer.step({})
    optimizer.step({"w": None})


def test_betas_may_be_a_sequence_of_a_configuration_library() -> None:
    """As OmegaConf's lists are, which Hydra hands to constructors."""
    betas: Any = UserList([0.8, 0.95])
    array = {"w": np.ones((2, 2))}
    groups = [{"params": [parameter(2)], "betas": UserList([0.7, 0.9])}, {"params": [parameter(2)]}]
    for optimizer in (AdamW(groups, betas=betas), ebbtide.numpy.AdamW(array, betas=betas)):
        assert optimizer.defaults["betas"] == optimizer.param_groups[-1]["betas"] == (0.8, 0.95)
    assert AdamW(groups).param_groups[0]["betas"] == (0.7, 0.9)
    arrays: Any = [{"params": array, "betas": betas}]
    assert ebbtide.numpy.AdamW(arrays).param_groups[0]["betas"] == (0.8, 0.95)
    for wrong in (UserList([0.9]), "ab", {0.9, 0.95}):
        with pytest.raises(ValueError, match="betas must be a pair of numbers"):
            AdamW([parameter(2)], betas=wrong)  # type: ignore[arg-type]


def test_betas_may_become_such_a_sequence_later_and_change_in_place() -> None:
    ended = []
    for betas in (UserList([0.5, 0.9]), [0.5, 0.9]):
        param, array = parameter(2), np.ones(2)
        ours, numpys = AdamW([param]), ebbtide.numpy.AdamW([array], weight_decay=0)
        for changed in (0.5, 0.5, 0.7, 0.8):
            betas[0] = changed
            for optimizer in (ours, numpys):
                optimizer.param_groups[0]["betas"] = betas
            step(ours, changed)
            numpys.step([np.full(2, changed)])
        ended.append((param.tolist(), array.tolist()))
    assert ended[0] == ended[1]


@pytest.mark.parametrize("key", ["param_name", "Params_names", "intial_lr", "Name", "para_names"])
def test_a_key_that_goes_with_the_parameters_is_refused_where_it_is_mistyped(key: str) -> None:
    """Without their names the parameters of a checkpoint are told apart by position alone."""
    with pytest.raises(ValueError, match=f"unknown group key '{key}': did you mean"):
        AdamW([{"params": [parameter(2)], key: ["w"]}])


@each_maker
def test_an_optimizer_and_its_state_go_with_the_last_reference(make: Callable[[Any], Any]) -> None:
    param = parameter(3)
    optimizer = make([param])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for _ in range(3):
        step(optimizer, 1.0)
        schedule.step()
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer, schedule
        assert alive() is None
    finally:
        gc.enable()


def interrupted(optimizer: Any, at: int) -> bool:
    """Press Ctrl-C at the so-manyth line of this package in a step; tell whether there is one."""
    package = str(Path(ebbtide.__file__).parent)
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(package):
            return None
        lines += event == "line"
        if event == "line" and lines == at:
            raise KeyboardInterrupt
        return trace

    tracing, enabled = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        optimizer.step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracing)
        # On the line that ends a `with` Python has not called `__exit__` yet: so too in no_grad.
        torch.set_grad_enabled(enabled)
    return False


@each_maker
@pytest.mark.parametrize(("taken", "stride"), [(0, 41), (2, 1)], ids=["planned", "remembered"])
def test_an_interrupted_step_has_happened_or_not(
    make: Callable[[Any], Any], taken: int, stride: int
) -> None:
    def fresh() -> tuple[list[Tensor], Any]:
        params: list[Tensor] = [parameter(5), parameter(2, 3)]
        optimizer = make(params)
        for number in range(taken):
            step(optimizer, number, number + 0.5)
        return params, optimizer

    params, optimizer = fresh()
    course = [[param.detach().clone() for param in params]]
    for number in range(taken, taken + 2):
        step(optimizer, number, number + 0.5)
        course.append([param.detach().clone() for param in params])
    at = 1
    while True:
        params, optimizer = fresh()
        for param, grad in zip(params, (taken, taken + 0.5), strict=True):
            param.grad = torch.full_like(param, grad)
        if not interrupted(optimizer, at):
            break
        (done,) = (n for n in (0, 1) if all(map(torch.equal, params, course[n])))
        if done == 0:
            step(optimizer, taken, taken + 0.5)
            assert all(map(torch.equal, params, course[1])), at
        else:
            step(optimizer, taken + 1, taken + 1.5)
            assert all(map(torch.equal, params, course[2])), at
        at += stride
    assert at > 10


def shrunk(kind: Any, dtype: torch.dtype, resume: bool) -> Tensor:
    """Step in float64, then on as another type, by conversion of the model or by a checkpoint."""
    param = parameter(4, dtype=torch.float64)
    optimizer = kind([param], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        step(optimizer, 1e-4)
    if resume:
        saved, param = deepcopy(optimizer.state_dict()), parameter(4, dtype=dtype)
        optimizer = kind([param], lr=1e-3, weight_decay=0.0)
        optimizer.load_state_dict(saved)
    else:
        param.grad = None
        param.data = param.data.to(dtype)
    step(optimizer, 1e-4)
    moment: Tensor = optimizer.state[param]["exp_avg_sq"]
    return moment


@pytest.mark.parametrize("resume", [False, True], ids=["converted", "resumed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_moments_in_float64_keep_their_range_under_smaller_parameters(
    dtype: torch.dtype, resume: bool
) -> None:
    """The square of 1e-4 is zero in float16, and a step divides by its root."""
    moment = shrunk(AdamW, dtype, resume)
    assert moment.dtype == torch.float32
    expected = (1 - 0.999**4) * 1e-8
    torch.testing.assert_close(moment, torch.full((4,), expected), rtol=2e-3, atol=0.0)


def test_moments_in_float64_keep_their_range_on_the_numpy_face() -> None:
    wide, narrow = np.ones((2, 2)), np.ones((2, 2), np.float16)
    optimizer = ebbtide.numpy.AdamW({"w": wide})
    optimizer.step({"w": np.full((2, 2), 1e-4)})
    resumed = ebbtide.numpy.AdamW({"w": narrow})
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        moment = resumed.state["w"]["exp_avg_sq"]
        assert moment.dtype == np.float32
        np.testing.assert_allclose(moment, 1e-11, rtol=1e-6)
        resumed.state["w"]["exp_avg_sq"] = moment.astype(np.float64)
        resumed.step({"w": np.zeros((2, 2), np.float16)})
        moment = resumed.state["w"]["exp_avg_sq"]
        assert moment.dtype == np.float32
        np.testing.assert_allclose(moment, 0.999e-11, rtol=1e-6)
        resumed.state["w"]["exp_avg_sq"] = moment / np.float32(0.999)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_scalars_of_numpy_are_gradients_of_arrays_without_dimensions(
    kind: str, clip: float | None
) -> None:
    def make(array: Any) -> Any:
        family = getattr(ebbtide.numpy, kind)
        return family({"w": array}, lr=0.1, weight_decay=0.0, clip_grad_norm=clip)

    ours, reference = np.array(1.0), np.array(1.0)
    optimizer, other = make(ours), make(reference)
    for number in range(5):
        optimizer.step({"w": 2 * ours if number != 3 else np.array(2 * ours)})
        other.step({"w": np.array(2 * reference)})
        assert ours == reference
    with pytest.raises(TypeError, match="gradient of 'w' has dtype float32, the array float64"):
        optimizer.step({"w": np.float32(1.0)})


@pytest.mark.parametrize("grad", [1e19, 1e20, 1.8e19])
def test_a_huge_gradient_steps_by_the_rule(grad: float) -> None:
    param = parameter(2)
    step(AdamW([param], lr=0.5, weight_decay=0.0), grad)
    torch.testing.assert_close(param.detach(), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    "make",
    [lambda: AdamW([parameter(2)]), lambda: ebbtide.numpy.AdamW({"w": np.ones((2, 2))})],
    ids=["torch", "numpy"],
)
@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("nonfinite", "rasie", ValueError),
        ("clip_grad_norm", -1.0, ValueError),  # steps would climb
        ("clip_grad_norm", 0, ValueError),
        ("clip_grad_norm", math.nan, ValueError),
        ("clip_grad_norm", "1.0", TypeError),
        ("clip_grad_norm", True, TypeError),
    ],
)
def test_options_are_checked_when_they_change(
    make: Callable[[], Any], option: str, value: Any, error: type[Exception]
) -> None:
    optimizer = make()
    optimizer.clip_grad_norm = 2
    with pytest.raises(error, match=f"Invalid {option}"):
        setattr(optimizer, option, value)
    assert (optimizer.nonfinite, optimizer.clip_grad_norm) == ("raise", 2)
    copied = deepcopy(optimizer)
    assert (copied.nonfinite, copied.clip_grad_norm) == ("raise", 2)


def test_a_file_that_is_cut_anywhere_is_not_the_one_that_loads(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for version in (1, 2):
        save({"version": version}, path)
    whole = path.read_bytes()
    for length in (0, 1, 3, 4, len(whole) // 2, *range(len(whole) - 120, len(whole))):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=r"a\.pt is broken"):
            assert load(path)["version"] == 1


def test_state_that_a_file_lacks_for_one_parameter_is_named() -> None:
    params = [("a", parameter(2)), ("b", parameter(2)), ("frozen", parameter(2))]
    optimizer = AdamW(params[:1] + params[2:])
    step(optimizer, 1.0, 1.0)
    del optimizer.state[params[2][1]]
    saved = deepcopy(optimizer.state_dict())
    params[2][1].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(params[:1] + params[2:]).load_state_dict(saved)
    params[2][1].requires_grad_(True)
    with pytest.warns(UserWarning, match="no state was saved for frozen: steps are counted from"):
        AdamW(params[:1] + params[2:]).load_state_dict(saved)


def test_state_of_radam_is_told_from_that_of_adam() -> None:
    param = parameter(2)
    theirs = torch.optim.RAdam([param])
    step(theirs, 1.0)
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match="this is RAdam state, and this optimizer is AdamW"):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state


def test_one_weight_under_two_names_is_stepped_once() -> None:
    layers = [nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)]
    weight = layers[1].weight = layers[0].weight
    tied = nn.Sequential(*layers)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = AdamW(list(tied.named_parameters(remove_duplicate=False)), lr=0.1)
    once = parameter(3, 3)
    with torch.no_grad():
        once.copy_(weight)
    alone = AdamW([once], lr=0.1)
    for _ in range(3):
        weight.grad = torch.ones(3, 3)
        optimizer.step()
        step(alone, 1.0)
    assert torch.equal(weight, once)


def test_a_copy_of_the_optimizer_that_reaches_no_model_says_so() -> None:
    model = nn.Linear(2, 2)
    optimizer = AdamW(model.parameters())
    for _ in range(2):
        step(optimizer, 1.0, 1.0)
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    copied = deepcopy(optimizer)
    copied.zero_grad()
    with pytest.warns(UserWarning, match="saw no gradients"):
        copied.step()
    with pytest.raises(ValueError, match="no longer in the model"):
        copied.check(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_gradient_behind_a_scaler_that_does_not_skip_is_left_to_the_scaler(
    value: float,
) -> None:
    """The scaler skips: neither an error nor a write, and no count."""
    param = parameter(3)
    optimizer = AdamW([param], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(param.sum()).backward()
    assert param.grad is not None
    param.grad[1] = value
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, torch.ones(3))
    assert optimizer.last_step_skipped
    assert optimizer.skipped_steps == 1
    assert all(not state or state["step"] == 0 for state in optimizer.state.values())
