"""The protocol: chosen on validation, reported on test, paired, and honest about edges."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ebbtide.lab.compare import Request, decay_sentence, loss_sentence, metric_sentence, result_rows
from ebbtide.lab.errors import InputError
from ebbtide.lab.experiment import run
from ebbtide.lab.tasks import Cell, Metric
from tests.lab import Counter, FormulaArm, experiment


def test_the_best_validation_cell_is_chosen_and_measured_on_the_test_seeds() -> None:
    arm = FormulaArm()
    (result,) = run(experiment(arm), Counter())
    adamw = result.reference
    assert (adamw.spec.name, adamw.best) == ("adamw", Cell(1e-2, 0.1))
    expected = [arm.score(adamw.spec, adamw.best, seed) - 1 for seed in range(10, 16)]
    np.testing.assert_allclose(adamw.chosen.test[:, 0], expected)
    assert adamw.grid.edges() == ()


def test_test_seeds_play_no_part_in_the_choice() -> None:
    arm = FormulaArm()
    run(experiment(arm), Counter())
    grids = [seeds for _, cells, seeds in arm.calls if len(cells) > 2]
    finals = [seeds for _, cells, seeds in arm.calls if len(cells) <= 2]
    assert sorted(set(grids)) == [(0,), (1,), (2,)]
    assert set(finals) == {(10, 11, 12, 13, 14, 15)}


def test_all_optimizers_search_grids_of_the_same_size() -> None:
    arm = FormulaArm()
    run(experiment(arm), Counter())
    cells = {name: sum(len(c) for n, c, _ in arm.calls if n == name) for name in ("adam", "adamw")}
    assert cells["adam"] == cells["adamw"] == 3 * 16 + 2


def test_all_steps_are_announced_and_counted() -> None:
    counter = Counter()
    run(experiment(FormulaArm()), counter)
    assert counter.done == counter.total > 0


def test_luck_that_seeds_share_does_not_hide_an_advantage() -> None:
    (result,) = run(experiment(FormulaArm(advantage=0.5, noise=0.05)), Counter())
    interval = result.advantage(result.others()[0])
    assert 0.3 < interval.low < interval.mean < interval.high < 0.7
    assert metric_sentence(result).startswith("AdamW's test accuracy is 0.5 points above Adam + L2")


def test_no_difference_is_said_where_there_is_none() -> None:
    (result,) = run(experiment(FormulaArm(noise=1.0)), Counter())
    assert "no difference can be seen" in metric_sentence(result)
    assert "no difference can be seen" in loss_sentence(result)


def test_a_disadvantage_is_said_too() -> None:
    (result,) = run(experiment(FormulaArm(advantage=-2.0, noise=0.05)), Counter())
    assert "points below Adam + L2's" in metric_sentence(result)
    assert "nats above Adam + L2's" in loss_sentence(result)


def test_gain_from_decay_is_measured_beside_the_chosen_cell() -> None:
    (result,) = run(experiment(FormulaArm()), Counter())
    gain = result.reference.gain_from_decay()
    assert gain is not None
    assert gain.mean == pytest.approx(3.0)
    assert decay_sentence(result).startswith("Weight decay raises the test accuracy of Adam + L2")


def test_a_grid_without_zero_knows_no_gain() -> None:
    plan = experiment(FormulaArm(), weight_decays=(1e-2, 1e-1, 1.0))
    (result,) = run(plan, Counter())
    assert result.reference.gain_from_decay() is None
    assert "best cells lie where the frames are" in decay_sentence(result)


@pytest.mark.parametrize(
    ("best", "edges"),
    [
        (Cell(1e-4, 0.1), ("smallest lr",)),
        (Cell(1e-1, 1.0), ("largest lr", "largest weight decay")),
        (Cell(1e-2, 0.1), ()),
    ],
)
def test_edges_are_named(best: Cell, edges: tuple[str, ...]) -> None:
    (result,) = run(experiment(FormulaArm(best=best)), Counter())
    assert result.reference.grid.edges() == edges


def test_a_cell_that_diverges_under_one_seed_is_never_the_best() -> None:
    (result,) = run(experiment(FormulaArm()), Counter())
    grid = result.reference.grid
    assert grid.diverged[0, 0]
    assert not grid.diverged[grid.best]


def test_a_cell_that_cannot_run_is_not_trained() -> None:
    arm = FormulaArm()
    (result,) = run(experiment(arm, lrs=(1e-2, 1.0)), Counter())
    assert result.reference.grid.diverged[1, 3]
    assert not any(Cell(1.0, 1.0) in cells for name, cells, _ in arm.calls if name == "adamw")


def test_a_grid_that_diverges_everywhere_is_an_error() -> None:
    with pytest.raises(InputError, match="every cell of the grid diverged"):
        run(experiment(FormulaArm(best=Cell(1e-12, 0.1))), Counter())


def test_a_failure_stops_the_other_threads() -> None:
    class Failing(FormulaArm):
        def train(self, spec, cells, seeds, *, curve_points, tick):  # type: ignore[no-untyped-def]
            if spec.name == "adam":
                raise RuntimeError("no data")
            for _ in range(1000):
                tick(1)
                time.sleep(0.01)
            raise AssertionError("was not stopped")

    with pytest.raises(RuntimeError, match="no data"):
        run(experiment(Failing()), Counter())


def test_rows_name_the_reference() -> None:
    (result,) = run(experiment(FormulaArm(advantage=0.5)), Counter())
    rows = result_rows(result)
    assert [row[0] for row in rows] == ["Adam + L2", "AdamW"]
    assert rows[1][-1] == "reference"
    assert rows[0][-1].startswith("-0.5")


def test_a_loss_counts_the_other_way() -> None:
    metric = Metric("loss", "nats", higher_is_better=False)
    values = np.array([3.0, np.nan, 1.0, 2.0])
    assert (metric.best(values), Metric("accuracy", "%").best(values)) == (2, 0)


def test_neighbouring_seeds_share_no_run() -> None:
    first, second = (Request(seed=seed).experiment() for seed in (0, 1))
    seeds = [*first.selection_seeds, *first.test_seeds, *second.selection_seeds, *second.test_seeds]
    assert len(seeds) == len(set(seeds))


def test_an_optimizer_that_did_best_without_decay_is_not_compared_with_itself() -> None:
    (result,) = run(experiment(FormulaArm(), weight_decays=(0.0,)), Counter())
    assert decay_sentence(result) == (
        "Adam + L2 and AdamW did best without weight decay, by the validation data."
    )
