"""The memory estimate against what optimizers really allocate, and by hand where none does yet."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ebbtide.torch
from ebbtide.torch.estimate import estimate
from ebbtide.torch.groups import explain_groups, param_groups


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(100, 64), nn.Linear(64, 100), nn.LayerNorm(100), nn.Linear(100, 90, bias=False)
    ).to(dtype)


def stepped(optimizer: torch.optim.Optimizer) -> int:
    """Take a step and return the bytes of the state that it created."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))


OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any], int]] = {
    "torch AdamW": (torch.optim.AdamW, {}, 2),
    "torch AMSGrad": (torch.optim.AdamW, {"amsgrad": True}, 3),
    "torch SGD": (torch.optim.SGD, {"momentum": 0.9}, 1),
    "torch SGD without momentum": (torch.optim.SGD, {}, 0),
    "AdamW": (ebbtide.torch.AdamW, {}, 2),
    "AMSGrad": (ebbtide.torch.AdamW, {"amsgrad": True}, 3),
    "SGD": (ebbtide.torch.SGD, {"momentum": 0.9}, 1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_is_what_optimizers_allocate(name: str, dtype: torch.dtype) -> None:
    optimizer, arguments, moments = OPTIMIZERS[name]
    trained = model(dtype)
    expected = estimate(trained, moments=moments)
    taken = optimizer(param_groups(trained, 0.1), lr=1e-3, **arguments)
    assert stepped(taken) == expected.state == explain_groups(taken).state_bytes
    assert expected.parameters == sum(p.nbytes for p in trained.parameters())
    gradients = [p.grad.nbytes for p in trained.parameters() if p.grad is not None]
    assert expected.gradients == sum(gradients)
    assert expected.step_peak == expected.parameters + expected.gradients + expected.state


def test_low_precision_parameters_take_torchs_bytes() -> None:
    trained = model(torch.bfloat16)
    allocated = stepped(torch.optim.AdamW(trained.parameters()))
    assert estimate(trained).state == allocated
    assert set(estimate(trained).formats) == {"bfloat16"}


def test_a_frozen_parameter_has_neither_gradient_nor_state() -> None:
    trained = model()
    trained[0].weight.requires_grad_(False)
    found = estimate(trained)
    assert (found.frozen, found.trainable) == (6400, 64 * 100 + 100 + 200 + 9000)
    assert found.state == stepped(
        torch.optim.AdamW(p for p in trained.parameters() if p.requires_grad)
    )
    assert found.parameters - found.gradients == 4 * 6400


def test_tied_weights_count_once() -> None:
    tied = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100, bias=False))
    tied[1].weight = tied[0].weight
    assert estimate(tied).parameters == 4 * 6400


# By hand for a matrix of 1024 × 1024: 8 blocks of 128 codes a row, a scale of 4 bytes each.
SQUARE = 1024 * 1024
SCALES = 1024 * 8 * 3  # four bytes a block for one moment, two for the other


@pytest.mark.parametrize(
    ("dtype", "formats", "state"),
    [
        (torch.float32, {}, 8 * SQUARE),
        (torch.float32, {"state_format": "bfloat16"}, 4 * SQUARE),
        (torch.float32, {"state_format": "8bit"}, 2 * (SQUARE + SCALES)),
        (torch.float32, {"state_format": "8bit", "master_format": "24bit"}, 2 * (SQUARE + SCALES)),
        (torch.bfloat16, {}, 4 * SQUARE),
        (torch.bfloat16, {"state_format": "float32"}, 8 * SQUARE),
        (torch.bfloat16, {"state_format": "8bit"}, 2 * (SQUARE + SCALES)),
        (torch.bfloat16, {"state_format": "8bit", "master_format": "24bit"},
         2 * (SQUARE + SCALES) + SQUARE),
        (torch.bfloat16, {"state_format": "8bit", "master_format": "32bit"},
         2 * (SQUARE + SCALES) + 2 * SQUARE),
        (torch.float16, {"master_format": "none"}, 4 * SQUARE),
    ],
)  # fmt: skip
def test_formats_take_their_bytes(dtype: torch.dtype, formats: dict[str, str], state: int) -> None:
    with torch.device("meta"):
        matrix = nn.Linear(1024, 1024, bias=False, dtype=dtype)
    assert estimate(matrix, **formats).state == state + 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "formats", "bytes_per_param"),
    [
        (torch.float32, {"state_format": "8bit"}, 6.046875),
        (torch.bfloat16, {"state_format": "8bit", "master_format": "32bit"}, 6.046875),
        (torch.bfloat16, {"state_format": "8bit", "master_format": "24bit"}, 5.046875),
        (torch.bfloat16, {"state_format": "8bit", "master_format": "stochastic"}, 4.046875),
    ],
)
def test_bytes_stored_for_a_parameter(
    dtype: torch.dtype, formats: dict[str, str], bytes_per_param: float
) -> None:
    with torch.device("meta"):
        matrix = nn.Linear(4096, 4096, bias=False, dtype=dtype)
    found = estimate(matrix, **formats)  # type: ignore[arg-type]
    assert found.bytes_per_param == pytest.approx(bytes_per_param, abs=1e-6)


def test_small_tensors_vectors_and_embeddings_stay_in_float32() -> None:
    assert estimate(model(), state_format="8bit").formats == {"float32": 4, "8bit": 2}
    low = estimate(model(), state_format="8bit", low_bit_embeddings=True)
    assert low.formats == {"8bit": 3, "float32": 3}


def test_stepping_inside_backward_holds_one_gradient() -> None:
    whole, one = estimate(model()), estimate(model(), step_in_backward=True)
    assert one.gradients == 4 * 9000
    assert whole.step_peak - one.step_peak == whole.gradients - one.gradients


def test_loading_from_the_disk_takes_less_than_with_the_whole_file_in_memory() -> None:
    found = estimate(model())
    assert found.load_peak == found.parameters + found.state + 4 * 9000
    assert found.load_peak_whole_file == found.parameters + 2 * found.state


def test_the_estimate_prints_itself_and_becomes_json() -> None:
    found = estimate(model(), state_format="8bit")
    text = str(found)
    for part in ("22,100 trainable, 0 frozen", "tensors: 4 in float32, 2 in 8bit", "step peak"):
        assert part in text
    assert json.loads(found.to_json()) == found.to_dict()


def test_what_cannot_be_estimated_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid state_format: '4bit'"):
        estimate(model(), state_format="4bit")
    with pytest.raises(ValueError, match="Invalid master_format: '8bit'"):
        estimate(model(), master_format="8bit")
    with pytest.raises(ValueError, match="no parameters"):
        estimate(nn.ReLU())
