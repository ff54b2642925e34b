"""Low-bit formats and shards through Triton and through the core: the same codes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ebbtide.backends.cpu import CompiledBackend
from ebbtide.backends.triton import kernels, norm, prologue
from ebbtide.backends.triton.backend import TritonBackend
from ebbtide.backends.triton.device import Device
from ebbtide.backends.triton.question import Question
from ebbtide.plan import Bucket, Field, Format, Plan, Row, salt_of
from ebbtide.rules import ADAM, Scalars
from tests.devices import DEVICES, INTERPRETER, on
from tests.tolerances import GRAD_NORM, TRITON_CLIPPED

GROUP: dict[str, Any] = {
    "lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "cautious": False,
    "maximize": False, "bias_correction": True, "seed": 7, "amsgrad": False,
}  # fmt: skip
DTYPES = {
    Format.FLOAT32: torch.float32,
    Format.BFLOAT16: torch.bfloat16,
    Format.FLOAT16: torch.float16,
    Format.SIGNED8: torch.int8,
    Format.WINDOW8: torch.uint8,
}
EIGHT = (Format.SIGNED8, Format.WINDOW8)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with on(request.param):
        yield request.param


@dataclass
class Spec:
    """One parameter: its size, formats, and where its blocks lie."""

    numel: int
    param: Format = Format.FLOAT32
    state: tuple[Format, ...] = EIGHT
    residual_bits: int = 0
    run_length: int = 0
    lead: int = 0
    first_block: int = 0
    name: str = "w"


class Arrays:
    """The memory of one row, on a device."""

    def __init__(self, spec: Spec, device: str, generator: torch.Generator) -> None:
        def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.spec = spec
        n, run = spec.numel, spec.run_length or spec.numel
        blocks = n // run * -(-(spec.lead + run) // 128)
        values = torch.randn(n, generator=generator)
        values[n // 2 :] *= 10.0 ** torch.randint(-9, 0, (n - n // 2,), generator=generator)
        self.param = values.to(DTYPES[spec.param]).to(device)
        self.grad = zeros(n, DTYPES[spec.param])
        self.state = [zeros(n, DTYPES[each]) for each in spec.state]
        scales = {Format.SIGNED8: torch.float32, Format.WINDOW8: torch.uint16}
        self.scales = [
            zeros(blocks, scales[each]) if each in scales else None for each in spec.state
        ]
        low = torch.int8 if spec.residual_bits == 8 else torch.int16
        self.residual = zeros(n, low) if spec.residual_bits else None
        self.step = torch.zeros(1)
        self.device = device

    def field(self, tensor: torch.Tensor, format: Format, scale: Any = None) -> Field:
        return Field(tensor.data_ptr(), 0 if scale is None else scale.data_ptr(), format)

    def row(self) -> Row:
        spec = self.spec
        states = zip(self.state, spec.state, self.scales, strict=True)
        return Row(
            name=spec.name,
            numel=spec.numel,
            param=self.field(self.param, spec.param),
            grad=self.field(self.grad, spec.param),
            state=tuple(self.field(*each) for each in states),
            extents=(spec.numel, 1),
            residual=0 if self.residual is None else self.residual.data_ptr(),
            residual_bits=spec.residual_bits,
            stochastic=spec.param is not Format.FLOAT32,
            run_length=spec.run_length or spec.numel,
            lead=spec.lead,
            first_block=spec.first_block,
            salt=salt_of(spec.name),
            step_address=self.step.data_ptr(),
            device=self.device,
        )

    def everything(self) -> list[torch.Tensor]:
        found = [self.param, *self.state, *self.scales, self.residual]
        return [each.cpu() for each in found if each is not None]


def gradient(spec: Spec, generator: torch.Generator) -> torch.Tensor:
    """Numbers over ten powers of ten, zeros, and some that no block can hold beside the others."""
    scale = 10.0 ** torch.randint(-8, 2, (spec.numel,), generator=generator)
    value = torch.randn(spec.numel, generator=generator) * scale
    value = torch.where(torch.rand(spec.numel, generator=generator) < 0.1, 0.0, value)
    return torch.where(torch.rand(spec.numel, generator=generator) < 0.003, 3e18, value)


def run(
    backend: Any, specs: list[Spec], device: str, steps: int, *, amsgrad: bool = False
) -> list[Arrays]:
    generator = torch.Generator().manual_seed(0)
    rows = [Arrays(spec, device, generator) for spec in specs]
    prepared = ADAM.prepare({**GROUP, "amsgrad": amsgrad}, 0.002, 0.0)
    for step in range(1, steps + 1):
        for arrays in rows:
            arrays.grad.copy_(gradient(arrays.spec, generator))
        plan = Plan(ADAM)
        plan.entries = [(object(), 0, arrays.row(), {}) for arrays in rows]
        assert backend.load(plan) == [(0, step)]
        scalars: Scalars = prepared(step)
        backend.run(plan, [Bucket(0, scalars, GROUP)], grad_scale=1.0, guard=True)
    return rows


def assert_equal(ours: list[Arrays], theirs: list[Arrays]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine.everything(), other.everything(), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), mine.spec


SPECS = [
    [Spec(1030), Spec(5, name="v"), Spec(384, run_length=96, name="u")],
    [Spec(1030, state=(*EIGHT, Format.WINDOW8))],
    [Spec(1030, Format.BFLOAT16), Spec(64, Format.BFLOAT16, name="v")],
    [Spec(1030, Format.BFLOAT16, residual_bits=8)],
    [Spec(1030, Format.BFLOAT16, residual_bits=16)],
    [Spec(300, Format.FLOAT16)],
    [Spec(1030, Format.FLOAT16, residual_bits=8)],
    [Spec(300, Format.FLOAT16, (Format.FLOAT32,) * 2, residual_bits=16)],
    [Spec(300, Format.BFLOAT16, (Format.FLOAT32,) * 2, residual_bits=8)],
    [Spec(300, Format.BFLOAT16, (Format.BFLOAT16,) * 2, residual_bits=16)],
    [Spec(300, state=(Format.BFLOAT16,) * 2)],
    [Spec(300, Format.BFLOAT16, lead=100, first_block=1 << 33)],
]


@pytest.mark.parametrize("specs", SPECS, ids=str)
def test_codes_have_the_bits_of_the_cpu(specs: list[Spec], device: str) -> None:
    amsgrad = len(specs[0].state) == 3
    ours = run(TritonBackend(), specs, device, 4, amsgrad=amsgrad)
    theirs = run(CompiledBackend(), specs, INTERPRETER, 4, amsgrad=amsgrad)
    assert_equal(ours, theirs)
    assert any(tensor.any() for tensor in ours[0].everything()[1:])


@pytest.mark.parametrize("cut", [100, 128, 1100])
def test_shards_are_rounded_as_the_whole_is(cut: int, device: str) -> None:
    numel, state = 1500, (Format.BFLOAT16,) * 2
    generator = torch.Generator().manual_seed(1)
    param, grad = (torch.randn(numel, generator=generator).bfloat16() for _ in "pg")

    def stepped(specs: list[Spec]) -> list[torch.Tensor]:
        rows = [Arrays(spec, device, generator) for spec in specs]
        at = 0
        for arrays in rows:
            part = slice(at, at + arrays.spec.numel)
            arrays.param.copy_(param[part])
            arrays.grad.copy_(grad[part])
            at += arrays.spec.numel
        plan, backend = Plan(ADAM), TritonBackend()
        plan.entries = [(object(), 0, arrays.row(), {}) for arrays in rows]
        backend.load(plan)
        scalars = ADAM.prepare(GROUP, 0.002, 0.0)(1)
        backend.run(plan, [Bucket(0, scalars, GROUP)], grad_scale=1.0, guard=True)
        return [torch.cat(each) for each in zip(*(a.everything() for a in rows), strict=True)]

    lead, first_block = cut % 128, cut // 128
    second = Spec(numel - cut, Format.BFLOAT16, state, lead=lead, first_block=first_block)
    parts = stepped([Spec(cut, Format.BFLOAT16, state), second])
    whole = stepped([Spec(numel, Format.BFLOAT16, state)])
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a, b)


def test_rows_on_two_devices_are_stepped_by_one_question(device: str) -> None:
    """The interpreter takes one CPU for two, by two names of it."""
    other = "cpu:0" if device == INTERPRETER else f"cuda:{torch.cuda.device_count() - 1}"

    def stepped(names: list[str]) -> tuple[list[Arrays], float]:
        generator = torch.Generator().manual_seed(2)
        specs = [Spec(300, state=(Format.FLOAT32,) * 2, name=name) for name in "ab"]
        rows = [Arrays(spec, name, generator) for spec, name in zip(specs, names, strict=True)]
        for arrays in rows:
            arrays.grad.copy_(torch.randn(300, generator=generator))
        plan, backend = Plan(ADAM), TritonBackend()
        plan.entries = [(object(), 0, arrays.row(), {}) for arrays in rows]
        backend.load(plan)
        buckets = [Bucket(0, ADAM.prepare(GROUP, 0.002, 0.0)(1), GROUP)]
        question = Question(max_norm=0.5)
        backend.run(plan, buckets, grad_scale=1.0, guard=True, groups=[GROUP], question=question)
        return rows, float(backend.decided("norm"))

    ours, norm = stepped([device, other])
    theirs, whole = stepped([device, device])
    assert norm == pytest.approx(whole, **GRAD_NORM)
    for mine, their in zip(ours, theirs, strict=True):
        for a, b in zip(mine.everything(), their.everything(), strict=True):
            torch.testing.assert_close(a, b, **TRITON_CLIPPED)


class Noting:
    """A kernel that notes which device was selected when it was launched."""

    def __init__(self, name: str, kernel: Any, selected: list[str], launched: list[Any]) -> None:
        self.name, self.kernel = name, kernel
        self.selected, self.launched = selected, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append((self.name, *self.selected))
        return self.kernel[grid]


def test_every_launch_is_made_with_its_device_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[str] = []
    launched: list[Any] = []

    @contextmanager
    def select(self: Device) -> Iterator[None]:
        selected.append(str(self.device))
        yield
        selected.pop()

    monkeypatch.setattr(Device, "_on_device", select)
    for module, name in ((kernels, "step"), (norm, "sum_squares"), (prologue, "prepare")):
        noting = Noting(name, getattr(module, name), selected, launched)
        monkeypatch.setattr(module, name, noting)
    generator = torch.Generator().manual_seed(2)
    spec = Spec(300, state=(Format.FLOAT32,) * 2)
    with on(INTERPRETER):
        rows = [Arrays(spec, name, generator) for name in ("cpu", "cpu:0")]
        plan, backend = Plan(ADAM), TritonBackend()
        for arrays in rows:
            row = arrays.row()
            row.counts_on_device = True
            plan.entries.append((object(), 0, row, {}))
        backend.load(plan)
        group = {**GROUP, "base_lr": 0.02, "decay_policy": "decoupled"}
        question = Question(max_norm=0.5)
        backend.run(plan, [], grad_scale=1.0, guard=True, groups=[group], question=question)
    assert launched == [
        ("sum_squares", "cpu"), ("sum_squares", "cpu:0"), ("prepare", "cpu"), ("prepare", "cpu:0"),
        ("step", "cpu"), ("step", "cpu:0"),
    ]  # fmt: skip
    assert [float(arrays.step) for arrays in rows] == [1, 1]
