"""The stacked model: each network in it is the network it would be alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from ebbtide.lab.digits import DigitsArm, digits_task
from ebbtide.lab.errors import Stopped
from ebbtide.lab.optimizers import OPTIMIZERS
from ebbtide.lab.stack import StackedMLP
from ebbtide.lab.tasks import Cell, Outcomes

SIZES = (6, 5, 4, 3)
ARM = DigitsArm("tiny", "Tiny", "", column_spread=0.7, steps=25, hidden=8)
CELLS = [Cell(1e-3, 0.0), Cell(1e-2, 1.0), Cell(3e-2, 0.1)]


def ignore(steps: int) -> None:
    """Watch nothing."""


def train(name: str, cells: Sequence[Cell], seeds: Sequence[int], arm: DigitsArm = ARM) -> Outcomes:
    return arm.train(OPTIMIZERS[name], cells, seeds, curve_points=3, tick=ignore)


def batch(seeds: int = 2, rows: int = 7) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=(seeds, rows, SIZES[0])).astype(np.float32)
    return inputs, generator.integers(0, SIZES[-1], (seeds, rows))


def alone_loss(params: dict[str, NDArray[np.float64]], x: NDArray[np.float64], y: int) -> float:
    """One network's loss on one row, written without batches, in float64."""
    signal = x
    layers = len(SIZES) - 1
    for layer in range(layers):
        signal = signal @ params[f"weight{layer}"] + params[f"bias{layer}"]
        if layer < layers - 1:
            signal = np.where(signal > 0, signal, 0)
    return float(np.log(np.exp(signal).sum()) - signal[y])


def member(model: StackedMLP, index: int) -> dict[str, NDArray[np.float64]]:
    views = model.members()[index]
    return {name.partition(".")[2]: view.astype(np.float64) for name, view in views.items()}


def test_loss_is_that_of_each_network_alone() -> None:
    model = StackedMLP([0, 1], 3, SIZES)
    generator = np.random.default_rng(0)
    for views in model.members():
        for view in views.values():
            view += generator.normal(size=view.shape).astype(np.float32)
    inputs, labels = batch()
    losses = model.loss(inputs, labels).ravel()
    for index in range(6):
        rows = zip(inputs[index // 3], labels[index // 3], strict=True)
        expected = np.mean([alone_loss(member(model, index), x, y) for x, y in rows])
        assert losses[index] == pytest.approx(expected, rel=1e-5)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    model = StackedMLP([0, 1], 2, SIZES)
    inputs, labels = batch()
    model.backward(inputs, labels)
    grads, index = model.grads(), 3
    params = member(model, index)
    rows = list(zip(inputs[1].astype(np.float64), labels[1], strict=True))
    for name, values in params.items():
        for place in np.ndindex(values.shape):
            slopes = []
            for side in (1e-6, -1e-6):
                values[place] += side
                slopes.append(np.mean([alone_loss(params, x, y) for x, y in rows]))
                values[place] -= side
            slope = (slopes[0] - slopes[1]) / 2e-6
            assert grads[f"{index}.{name}"][place] == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_members_are_writable_blocks_of_the_stack() -> None:
    model = StackedMLP([0], 2, SIZES)
    views = [view for views in model.members() for view in views.values()]
    assert all(view.flags.c_contiguous and view.flags.writeable for view in views)
    views[0][...] = 7
    assert (model.weights[0][0, 0] == 7).all()
    assert not (model.weights[0][0, 1] == 7).any()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_network_trains_in_the_stack_as_alone(name: str) -> None:
    together = train(name, CELLS, [0, 1])
    for s, seed in enumerate([0, 1]):
        for c, cell in enumerate(CELLS):
            alone = train(name, [cell], [seed])
            assert together.test[s, c] == alone.test[0, 0]
            # BLAS may add in another order for another stack.
            np.testing.assert_allclose(together.train_loss[s, c], alone.train_loss[0, 0], rtol=1e-4)


def test_the_optimizers_differ() -> None:
    ends = {name: train(name, CELLS[1:2], [0]).train_loss[0, 0, -1] for name in OPTIMIZERS}
    assert len(set(ends.values())) == len(OPTIMIZERS)


def test_a_seed_is_the_same_start_for_every_optimizer() -> None:
    starts = {train(name, CELLS, [4]).train_loss[0, 0, 0] for name in OPTIMIZERS}
    assert len(starts) == 1


def test_a_diverged_network_is_marked_and_leaves_the_others_alone() -> None:
    quiet, wild = Cell(1e-2, 0.0), Cell(1e4, 0.0)
    outcomes = train("sgd", [quiet, wild], [0])
    assert outcomes.diverged.tolist() == [[False, True]]
    assert np.isnan(outcomes.validation[0, 1])
    assert np.isnan(outcomes.test[0, 1])
    assert outcomes.test[0, 0] == train("sgd", [quiet], [0]).test[0, 0]


def test_every_step_is_counted_and_curves_end_at_the_last() -> None:
    counted: list[int] = []
    outcomes = ARM.train(OPTIMIZERS["adamw"], CELLS, [0, 1], curve_points=4, tick=counted.append)
    assert sum(counted) == ARM.steps * 6
    assert outcomes.steps.tolist() == [0, 8, 17, 25]
    assert outcomes.train_loss.shape == (2, 3, 4)


def test_a_tick_that_raises_ends_the_training() -> None:
    def stop(steps: int) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        ARM.train(OPTIMIZERS["adamw"], CELLS, [0], curve_points=1, tick=stop)


def test_parts_share_no_picture_and_only_training_labels_are_wrong() -> None:
    arm = dataclasses.replace(ARM, column_spread=0.0)
    noisy, clean = arm.data([5]), dataclasses.replace(arm, label_noise=0.0).data([5])
    pictures = [
        tuple(row) for part in (noisy.train, noisy.validation, noisy.test) for row in part.inputs[0]
    ]
    assert len(pictures) == len(set(pictures)) == 1797
    wrong = (noisy.train.labels != clean.train.labels).mean()
    assert 0.15 < wrong < 0.25
    assert (noisy.validation.labels == clean.validation.labels).all()
    assert (noisy.test.labels == clean.test.labels).all()


def test_standardised_columns_forget_their_scales() -> None:
    scaled = dataclasses.replace(ARM, standardise=True).data([2])
    plain = dataclasses.replace(ARM, standardise=True, column_spread=0.0).data([2])
    np.testing.assert_allclose(scaled.train.inputs, plain.train.inputs, atol=1e-4)


def test_the_multi_scale_arm_scales_columns() -> None:
    plain, scaled = digits_task(quick=True).arms
    assert isinstance(plain, DigitsArm)
    assert isinstance(scaled, DigitsArm)
    largest = scaled.data([0]).train.inputs.max(axis=(0, 1))
    assert largest.max() / largest[largest > 0].min() > 50
    assert plain.data([0]).train.inputs.max() == 1
