"""The tasks that need torch: data without leaks, runs that depend on nothing but their settings."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ebbtide.lab import charlm, convnet
from ebbtide.lab.compare import Request, write_report
from ebbtide.lab.errors import InputError
from ebbtide.lab.experiment import Experiment, run
from ebbtide.lab.optimizers import OPTIMIZERS, choose_optimizers
from ebbtide.lab.tasks import Cell, Outcomes, Task, load_task
from ebbtide.lab.torch_training import new_model, one_torch_thread
from ebbtide.schedules import Cosine
from tests.lab import Counter

ARMS = [charlm.CharacterArm(4), convnet.ConvolutionalArm(4)]
each_arm = pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
GOOD, DECAYED = Cell(1e-2, 0.0), Cell(1e-2, 1.0)


def train(arm: Any, name: str, cells: list[Cell], seeds: list[int], points: int = 2) -> Outcomes:
    ticks: list[int] = []
    outcomes: Outcomes = arm.train(
        OPTIMIZERS[name], cells, seeds, curve_points=points, tick=ticks.append
    )
    assert sum(ticks) == arm.steps * len(cells) * len(seeds)
    return outcomes


@each_arm
def test_a_run_depends_on_its_settings_alone(arm: Any) -> None:
    together = train(arm, "adamw", [DECAYED, GOOD], [3, 4])
    with ThreadPoolExecutor(2) as pool:  # and not on other threads
        alone, other = pool.map(lambda seed: train(arm, "adamw", [GOOD], [seed]), [4, 3])
    for part in ("validation", "test", "train_loss", "test_loss"):
        assert getattr(together, part)[1, 1] == pytest.approx(getattr(alone, part)[0, 0], abs=0)
        assert getattr(together, part)[0, 1] == pytest.approx(getattr(other, part)[0, 0], abs=0)
    assert together.train_loss[0, 0, 1] != together.train_loss[0, 1, 1]  # the decay does something
    assert together.train_loss[0, 1, 0] != together.train_loss[1, 1, 0]  # the seed too


@each_arm
def test_optimizers_start_from_the_same_model_and_learn(arm: Any) -> None:
    outcomes = {name: train(arm, name, [Cell(0.01, 0.0)], [0]) for name in OPTIMIZERS}
    starts = {float(each.train_loss[0, 0, 0]) for each in outcomes.values()}
    assert len(starts) == 1
    assert all(each.train_loss[0, 0, 1] < each.train_loss[0, 0, 0] for each in outcomes.values())
    assert outcomes["adam"].train_loss[0, 0, 1] == outcomes["adamw"].train_loss[0, 0, 1]


@each_arm
def test_a_run_that_diverges_is_marked_and_counted(arm: Any) -> None:
    outcomes = train(arm, "sgd", [Cell(1e30, 0.0), Cell(1e-3, 0.0)], [0])
    assert outcomes.diverged.tolist() == [[True, False]]
    assert np.isnan(outcomes.validation[0, 0])
    assert np.isnan(outcomes.test[0, 0])


def test_the_training_is_torchs_own_with_ours_in_it() -> None:
    """The same course by hand, with torch's AdamW."""
    arm, cell = convnet.ConvolutionalArm(5), Cell(0.01, 0.5)
    seen = train(arm, "adamw", [cell], [7])
    lesson = convnet._Pictures(7)
    model = lesson.model()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.5},
        {"params": biases, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cell.lr)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = cell.lr * Cosine(5)(step)
        optimizer.zero_grad()
        lesson.batch_loss(model, step).backward()
        optimizer.step()
    assert seen.train_loss[0, 0, -1] == pytest.approx(lesson.loss(model, "train"), rel=1e-5)
    assert seen.test[0, 0] == pytest.approx(lesson.score(model, "test"), abs=0.5)


def test_a_pass_over_the_digits_sees_every_picture_once() -> None:
    lesson = convnet._Pictures(0)
    seen: list[torch.Tensor] = []

    class Spy(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return torch.zeros(len(inputs), 10)

    for step in range(8):
        lesson.batch_loss(Spy(), step)
    pictures = torch.cat(seen).flatten(1)
    known = lesson._parts["train"][0].flatten(1)
    assert pictures.shape == known.shape
    assert torch.equal(pictures.sum(0), known.sum(0))
    assert not torch.equal(pictures, known)


def test_no_paragraph_is_in_two_parts_of_the_text() -> None:
    paragraphs = charlm.text_of()
    assert len(set(paragraphs)) == len(paragraphs) > 1000
    reading = charlm._Reading(1)
    sizes = {part: len(text) for part, text in reading._texts.items()}
    assert sum(sizes.values()) == sum(len(piece) + 2 for piece in paragraphs)
    assert 0.7 < sizes["train"] / sum(sizes.values()) < 0.9
    characters = sorted(set("\n\n".join(paragraphs)))
    text = "".join(characters[i] for i in reading._texts["test"].tolist())
    train_text = "".join(characters[i] for i in reading._texts["train"].tolist())
    long, known = (
        {" ".join(piece.split()) for piece in each.split("\n\n") if len(piece) > 80}
        for each in (text, train_text)
    )
    assert len(long) > 50
    assert not long & known


def test_the_transformer_looks_back_only() -> None:
    model = new_model(lambda: charlm.Transformer(11), 0)
    codes = torch.randint(0, 11, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 11
    with torch.no_grad():
        before, after = model(codes), model(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert not torch.allclose(before[:, 12], after[:, 12], atol=1e-3)


def test_a_new_model_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    models = [new_model(lambda: nn.Linear(3, 2), seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(models[0].weight, models[1].weight)
    assert not torch.equal(models[0].weight, models[2].weight)


def test_torchs_threads_are_what_they_were_after_the_last_is_out() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_torch_thread():
            with one_torch_thread():
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["char-lm", "convnet"])
def test_the_tasks_bring_grids_of_their_own(name: str, quick: bool) -> None:
    experiment = Request(name, quick=quick).experiment()
    cells = len(experiment.lrs) * len(experiment.weight_decays)
    assert cells <= (6 if quick else 16)
    assert experiment.weight_decays[0] == 0
    assert len(experiment.test_seeds) == (3 if quick else 5)
    wide = Request(name, quick=quick, lr="1e-4..1:9", seeds=7).experiment()
    assert (len(wide.lrs), len(wide.test_seeds)) == (9, 7)


def test_the_report_records_the_text(tmp_path: Path) -> None:
    task = load_task("char-lm", quick=True)
    small = Task(task.name, task.title, task.description, (ARMS[0],), facts=task.facts)
    experiment = Experiment(
        small, choose_optimizers("adam,adamw"), (1e-3, 1e-2), (0.0, 0.1), (0,), (5, 6)
    )

    counter = Counter()
    arms = run(experiment, counter)
    assert counter.done == counter.total
    write_report(experiment, arms, tmp_path / "report")
    html = (tmp_path / "report" / "report.html").read_text()
    text = "\n\n".join(charlm.text_of())
    assert hashlib.sha256(text.encode()).hexdigest() in html
    assert (tmp_path / "report" / "char-lm-heat.png").stat().st_size > 1000
    assert "test loss" in html


def test_only_a_function_takes_a_metric() -> None:
    with pytest.raises(InputError, match="has a metric of its own"):
        load_task("convnet", metric="loss")
    with pytest.raises(InputError, match=r"digits, char-lm, convnet, or write FILE.py:FUNCTION"):
        load_task("imagenet")


def test_the_loss_is_that_of_the_next_character() -> None:
    class Next(nn.Module):
        """Knows that each number is followed by the next one."""

        def forward(self, codes: torch.Tensor) -> torch.Tensor:
            return 50.0 * functional.one_hot((codes + 1) % 7, 7).float()

    windows = torch.arange(10)[None] % 7
    assert float(charlm._loss(Next(), windows)) < 1e-6
    assert float(charlm._loss(Next(), windows.flip(1))) > 10
