"""The rules in torch operations: against the reference and the kernels, differentiated, unread."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from ebbtide import codecs
from ebbtide.backends import torch_ops
from ebbtide.backends.torch_ops import TensorRow, Verdict
from ebbtide.plan import salt_of
from ebbtide.reading import GroupReader
from ebbtide.rules import ADAM
from ebbtide.torch import SGD as TorchSGD
from ebbtide.torch import Adam, AdamW
from tests.cases import Case, gradients, matrix, reference_trajectory, start
from tests.tolerances import FLOAT32_AGAINST_FLOAT64, TORCH_FLOAT32, TORCH_SQRT

CASES = list(matrix())


def optimizer_of(case: Case, params: Any, **options: Any) -> Any:
    return (Adam if case.is_adam else TorchSGD)(params, **case.keywords(), **options)


def arrays(optimizer: Any, param: Tensor) -> list[Tensor]:
    return [param, *(v for k, v in optimizer.state[param].items() if k != "step")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_reference_but_for_torchs_square_root(case: Case) -> None:
    shape = (3, 11)
    weights, grads = start(shape, 1), gradients(shape, case.steps, 2)
    expected = torch.tensor(reference_trajectory(case, weights, grads), dtype=torch.float64).T
    param = torch.tensor(weights)
    optimizer = optimizer_of(case, [param], differentiable=True)
    for grad in grads:
        param.grad = torch.tensor(grad)
        optimizer.step()
    for ours, theirs in zip(arrays(optimizer, param), expected, strict=True):
        torch.testing.assert_close(ours.detach().reshape(-1), theirs, **TORCH_SQRT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_is_near_the_kernels(case: Case) -> None:
    shape = (5, 31)
    weights = torch.tensor(start(shape, 4)).float()
    params = [weights.clone(), weights.clone()]
    optimizers = [
        optimizer_of(case, [p], differentiable=d)
        for p, d in zip(params, (False, True), strict=True)
    ]
    for grad in gradients(shape, case.steps, 3):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.tensor(grad).float()
            optimizer.step()
    torch.testing.assert_close(*params, **FLOAT32_AGAINST_FLOAT64)


def group_of(optimizer: Any, **values: Any) -> dict[str, Any]:
    return {**optimizer.param_groups[0], **values}


def row_of(param: Tensor, optimizer: Any, state: dict[str, Any], **options: Any) -> TensorRow:
    keys = optimizer._rule.state_keys(optimizer.param_groups[0])
    return TensorRow(0, 0, "w", param, param.grad, state, keys, salt=salt_of("w"), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [AdamW, Adam, TorchSGD])
def test_sixteen_bits_are_rounded_as_the_kernels_round(dtype: torch.dtype, kind: Any) -> None:
    """The same random bits for the same elements; float32 in between may differ in the last one."""
    options = {"momentum": 0.9} if kind is TorchSGD else {"amsgrad": kind is Adam}
    torch.manual_seed(0)
    params = [(torch.randn(7, 61) * 2.0**-3).to(dtype) for _ in range(2)]
    params[1].copy_(params[0])
    optimizer = kind([("w", params[0])], lr=1e-3, weight_decay=0.1, seed=5, **options)
    scalars = GroupReader(optimizer._rule).read(optimizer.param_groups[0])
    apart = total = 0
    for step in range(1, 6):
        grad = torch.randn(7, 61).to(dtype)
        for param in params:
            param.grad = grad
        params[1].copy_(params[0])
        state = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
        optimizer.step()
        if not state:
            state = {k: torch.zeros_like(v) for k, v in optimizer.state[params[0]].items()}
        row = row_of(params[1], optimizer, state)
        once = scalars(step)
        torch_ops.run(
            optimizer._rule, [row], lambda _, s=once: s, Verdict(), guard=True, counted=True
        )
        others = (params[1], *(state[key] for key in row.keys))
        for ours, theirs in zip(arrays(optimizer, params[0]), others, strict=True):
            apart += int((ours != theirs).sum())
            total += ours.numel()
            ulp = torch.finfo(ours.dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=ulp, atol=2.0**-24)
        assert state["step"] == optimizer.state[params[0]]["step"] == step
    assert apart <= total // 1000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_the_codecs(dtype: torch.dtype) -> None:
    encode, kept = {
        torch.bfloat16: (codecs.bfloat16_encode, 16),
        torch.float16: (codecs.float16_encode, 13),
    }[dtype]
    values = [0.0, -0.0, 1.0, -1.004, 0.1, 3e-5, -6e-8, 1e-7, 65504.0, 65519.0, 1e6, -3.4e38]
    values += [
        math.inf,
        -math.inf,
        math.nan,
        2.0**-14,
        2.0**-14 * 0.999,
        1e-40 if kept == 16 else 0.0,
    ]
    for bits in (0, 1, (1 << kept) - 1, 1 << (kept - 1)):
        given = torch.full((len(values),), bits << (32 - kept))
        rounded = torch_ops._rounded(torch.tensor(values), dtype, given)
        codes = rounded.view(torch.int16).tolist()
        for value, code in zip(values, codes, strict=True):
            want = encode(float(torch.tensor(value)), bits)
            assert code & 0xFFFF == want or (math.isnan(value) and math.isnan(rounded[-4])), value


CAPTURED: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "weight_decay": 0.1, "maximize": True},
    {"decay_policy": "l2", "weight_decay": 0.1},
    {"decay_policy": "independent", "weight_decay": 0.02, "base_lr": 0.05, "cautious": True},
    {"decay_policy": "corrected", "weight_decay": 0.02, "bias_correction": False},
]


@pytest.mark.parametrize("options", CAPTURED, ids=str)
@pytest.mark.parametrize("tensors", [False, True], ids=["float lr", "tensor lr and betas"])
def test_a_captured_step_equals_one_with_numbers(options: dict[str, Any], tensors: bool) -> None:
    """Scalars computed from the count and from tensors, as on a device that captures graphs."""
    torch.manual_seed(0)
    params = [torch.randn(4, 5) for _ in range(2)]
    params[1].copy_(params[0])
    options = {"lr": 0.05, "betas": (0.8, 0.95), **options}
    optimizer = AdamW([("w", params[0])], **options)
    group = group_of(optimizer)
    if tensors:
        group["lr"] = torch.tensor([0.05], dtype=torch.float64)
        group["betas"] = tuple(torch.tensor(b, dtype=torch.float64) for b in group["betas"])
    state: dict[str, Any] = {}
    for step in range(5):
        grad = torch.randn(4, 5)
        for param in params:
            param.grad = grad
        optimizer.step()
        if step == 0:
            state = {k: torch.zeros_like(v) for k, v in optimizer.state[params[0]].items()}
        row = row_of(params[1], optimizer, state, capturable=True)
        untouched = torch_ops.run(
            ADAM, [row], lambda row: torch_ops.tensor_scalars(ADAM, group, row.next_step()),
            Verdict(), guard=True, counted=False,
        )  # fmt: skip
        assert untouched == []
    torch.testing.assert_close(*params, **TORCH_FLOAT32)
    assert state["step"] == 5


def test_a_captured_step_neither_reads_nor_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: any attempt raises."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a number of the host's would be copied to the device")

    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        param = torch.empty(3, 4, dtype=dtype, device="meta")
        param.grad = torch.empty_like(param)
        real = AdamW([torch.zeros(1)], amsgrad=True, weight_decay=0.1)
        group = group_of(real, lr=torch.tensor(0.1, device="meta"), cautious=True)
        state = {key: torch.empty_like(param) for key in ADAM.state_keys(group)}
        state["step"] = torch.empty((), device="meta")
        row = row_of(param, real, state, capturable=True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "tensor", refused)
            total = torch_ops.sum_squares([param.grad], finite_only=True)
            verdict = Verdict(scale=total.rsqrt(), apply=torch.isfinite(total), norm=total.sqrt())
            scalars = torch_ops.tensor_scalars(ADAM, group, row.next_step())
            torch_ops.run(ADAM, [row], lambda _, s=scalars: s, verdict, guard=True, counted=False)


class Held(TorchDispatchMode):
    """Counts how many float64 arrays there are at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._arrays: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if result.dtype == torch.float64 and result.ndim:
            self._arrays.append(weakref.ref(result))
        self.most = max(self.most, sum(each() is not None for each in self._arrays))
        return result


def test_the_norm_holds_the_squares_of_one_gradient_at_a_time() -> None:
    """Those of all at once would need more memory than the model's state."""
    most = []
    for count in (1, 9):
        grads = [torch.ones(7) for _ in range(count)]
        with Held() as held:
            total = torch_ops.sum_squares(grads, finite_only=True)
        assert total == 7 * count
        most.append(held.most)
    assert 0 < most[0] == most[1]


def test_the_norm_is_left_on_the_host_where_a_gradient_is() -> None:
    with FakeTensorMode():
        grads = [torch.ones(3, device=device) for device in ("cuda", "cpu")]
        for order in (grads, grads[::-1]):
            assert torch_ops.sum_squares(order).is_cpu
        assert torch_ops.sum_squares(grads[:1]).is_cuda


@pytest.mark.parametrize("apply", [True, False])
def test_a_device_may_decide_that_a_step_does_not_happen(apply: bool) -> None:
    param = torch.ones(4)
    param.grad = torch.ones(4)
    optimizer = AdamW([("w", param)], lr=0.1)
    state = {k: torch.zeros(4) for k in ("exp_avg", "exp_avg_sq")} | {"step": torch.tensor(0.0)}
    row = row_of(param, optimizer, state, capturable=True)
    group = optimizer.param_groups[0]
    torch_ops.run(
        ADAM, [row], lambda row: torch_ops.tensor_scalars(ADAM, group, row.next_step()),
        Verdict(scale=torch.tensor(0.5), apply=torch.tensor(apply)), guard=False, counted=False,
    )  # fmt: skip
    assert float(state["step"]) == float(apply)
    assert bool((param != 1).all()) == apply
    assert bool((state["exp_avg"] != 0).all()) == apply


def differentiated(kind: Any, names: tuple[str, ...], steps: int, **fixed: Any) -> Any:
    """Return a function of the parameter, its gradients and the hyperparameters of `names`."""

    def function(param: Tensor, grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        options = dict(zip(names, values, strict=True))
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        param = param.clone()
        optimizer = kind([param], differentiable=True, **fixed, **options)
        for step in range(steps):
            param.grad = grad * (1 + step)
            optimizer.step()
        state = [v for v in optimizer.state[param].values() if v.requires_grad]
        return (param, *state)

    return function


HYPER = {"lr": 0.3, "weight_decay": 0.1, "beta1": 0.7, "beta2": 0.9}


@pytest.mark.parametrize(
    ("kind", "names", "fixed"),
    [
        (AdamW, (), {"amsgrad": True}),
        (AdamW, ("lr", "weight_decay"), {}),
        (AdamW, ("lr", "beta1", "beta2"), {"decay_policy": "independent", "base_lr": 0.5}),
        (Adam, ("lr", "weight_decay", "beta1", "beta2"), {"maximize": True}),
        (TorchSGD, (), {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
        (TorchSGD, ("lr", "weight_decay"), {"momentum": 0.9, "dampening": 0.1}),
        (TorchSGD, ("lr", "weight_decay"), {"decay_policy": "decoupled"}),
    ],
    ids=str,
)
def test_gradients_flow_through_the_step(kind: Any, names: tuple[str, ...], fixed: Any) -> None:
    torch.manual_seed(0)
    values = [torch.rand(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    values += [torch.tensor(HYPER[n], dtype=torch.float64, requires_grad=True) for n in names]
    assert gradcheck(differentiated(kind, names, 2, **fixed), values)


def test_complex_parameters_can_be_differentiated_through() -> None:
    values = [torch.rand(3, dtype=torch.complex128, requires_grad=True) for _ in range(2)]
    assert gradcheck(differentiated(AdamW, (), 2), values)


def test_a_learning_rate_is_learned_through_two_steps() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    param = nn.Parameter(torch.ones(3, dtype=torch.float64)).clone()
    optimizer = TorchSGD([param], lr=lr, momentum=0.9, differentiable=True)
    for _ in range(2):
        loss = (param * param).sum()
        (param.grad,) = torch.autograd.grad(loss, param, create_graph=True)
        optimizer.step()
    (param * param).sum().backward()
    assert lr.grad is not None
    assert float(lr.grad) < 0


def test_what_cannot_be_differentiated_is_refused_by_name() -> None:
    leaf = torch.ones(3, requires_grad=True)
    leaf.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"a leaf Variable that requires grad.* parameter 'w'"):
        AdamW([("w", leaf)], differentiable=True).step()
    assert torch.equal(leaf.detach(), torch.ones(3))
    param = torch.ones(3)
    param.grad = torch.ones(3)
    optimizer = AdamW([param], differentiable=True)
    optimizer.step()
    optimizer.state[param]["step"].requires_grad_()
    with pytest.raises(RuntimeError, match="`requires_grad` is not supported for `step`"):
        optimizer.step()


def test_kernel_rows_and_operation_rows_stand_side_by_side() -> None:
    """One optimizer, groups with and without differentiable: the numbers of two optimizers."""

    def groups() -> tuple[list[dict[str, Any]], list[Tensor]]:
        params = [torch.ones(4, dtype=torch.float64) for _ in range(3)]
        for index, param in enumerate(params):
            param.grad = torch.arange(4, dtype=torch.float64) + index
        return [
            {"params": params[:1], "differentiable": True}, {"params": params[1:], "lr": 0.2},
        ], params  # fmt: skip

    mixed, params = groups()
    apart, others = groups()
    options = {"lr": 0.1, "clip_grad_norm": 1.0}
    optimizer = AdamW(mixed, differentiable=True, **options)
    optimizer.param_groups[1]["differentiable"] = False
    for group in apart:
        group.pop("differentiable", None)
    reference = AdamW(apart, **options)
    for _ in range(3):
        optimizer.step()
        reference.step()
        assert optimizer.last_grad_norm == pytest.approx(reference.last_grad_norm, rel=1e-14)
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-14, atol=1e-14)
    params[0].grad[1] = params[2].grad[3] = math.nan
    optimizer.clip_grad_norm = None
    with pytest.raises(FloatingPointError, match=r"\[0\]\" \(1 of 4\), .*\[1\]\" \(1 of 4\)"):
        optimizer.step()
