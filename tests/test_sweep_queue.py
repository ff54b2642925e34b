"""Sweeps and their cells in a journal: nothing is lost, doubled or mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbtide.lab.errors import InputError
from ebbtide.lab.sweep.definition import Definition
from ebbtide.lab.sweep.outcome import Outcome, Record
from ebbtide.lab.sweep.queue import Claim
from ebbtide.lab.sweep.storage import open_storage
from ebbtide.lab.sweep.study import Sweep
from ebbtide.lab.sweep.target import Target
from tests.sweeps import assert_one_record_a_cell, definition, trials, write_function


def sweep(folder: Path, wanted: Definition | None = None, name: str = "") -> Sweep:
    wanted = wanted or definition()
    storage = open_storage(str(folder / "sweeps.journal"), create=True)
    return Sweep(storage, name or wanted.name, wanted)


def done(claim: Claim, value: float = 1.0, outcome: str = Outcome.FINISHED) -> Record:
    return Record(outcome, value if outcome == Outcome.FINISHED else None, sha256="a" * 64)


def run_all(found: Sweep, outcome: str = Outcome.FINISHED) -> list[Claim]:
    claims = []
    while (claim := found.queue.claim()) is not None:
        claims.append(claim)
        assert found.queue.finish(claim, done(claim, claim.settings["lr"], outcome))
    return claims


def test_every_cell_is_claimed_once_with_its_settings(tmp_path: Path) -> None:
    found = sweep(tmp_path, definition(optimizers="adamw,sgdw", seeds=2))
    found.queue.fill()
    found.queue.fill()
    claims = run_all(found)
    assert Counter(tuple(sorted(claim.settings.items())) for claim in claims) == Counter(
        tuple(sorted({"optimizer": o, "lr": lr, "weight_decay": wd, "seed": seed}.items()))
        for o in ("adamw", "sgdw") for lr in (1e-3, 1e-2) for wd in (0.0, 0.1) for seed in (0, 1)
    )  # fmt: skip
    assert_one_record_a_cell(found)
    assert found.queue.counts().outcomes == {"finished": 16}


def test_the_first_seed_comes_first_and_optimizers_take_turns(tmp_path: Path) -> None:
    found = sweep(tmp_path, definition(optimizers="adamw,sgdw", seeds=2))
    found.queue.fill()
    claims = run_all(found)
    assert [claim.settings["seed"] for claim in claims] == [0] * 8 + [1] * 8
    assert [claim.settings["optimizer"] for claim in claims] == ["adamw", "sgdw"] * 8


def test_a_fill_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    found.queue.fill()
    journal = tmp_path / "sweeps.journal"
    whole = journal.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(whole)):
        # As after a kill in the middle of a line.
        journal.write_bytes(b"".join(whole[:kept]) + whole[kept][:-7])
        again = sweep(tmp_path)
        again.queue.fill()
        run_all(again)
        assert_one_record_a_cell(again)


DEAD_WORKER = """
import sys, os
from tests.test_sweep_queue import *
found = sweep(Path(sys.argv[1]))
found.queue.hold()
claim = found.queue.claim()
print(claim.slot.index, flush=True)
if sys.argv[2] == "dies": os._exit(1)
sys.stdin.read()
"""


def test_the_cells_of_the_dead_come_back_and_those_of_the_living_do_not(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    found.queue.fill()
    found.queue.hold()
    mine = found.queue.claim()
    assert mine is not None
    dies = [sys.executable, "-c", DEAD_WORKER, str(tmp_path), "dies"]
    lives = [*dies[:-1], "lives"]
    lost = subprocess.run(dies, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(lives, **pipes) as living:
        assert living.stdout is not None
        assert living.stdin is not None
        theirs = int(living.stdout.readline())
        assert found.queue.recover() == 1
        again = found.queue.claim()
        assert again is not None
        assert again.slot.index == int(lost.stdout)
        assert len({mine.slot.index, theirs, again.slot.index}) == 3
        assert found.queue.recover() == 0
        living.stdin.close()
    assert found.queue.recover() == 1


def test_who_lost_a_cell_cannot_end_it(tmp_path: Path) -> None:
    first, second = sweep(tmp_path), sweep(tmp_path)
    first.queue.fill()
    lost = first.queue.claim()
    assert lost is not None
    assert second.queue.recover() == 1  # the first never showed that it is alive
    taken = second.queue.claim()
    assert taken is not None
    assert taken.slot == lost.slot
    assert not first.queue.finish(lost, done(lost, 1.0))
    assert second.queue.finish(taken, done(taken, 2.0))
    assert not first.queue.finish(lost, done(lost, 3.0))
    assert [t.value for t in trials(second) if t.state.is_finished()] == [2.0]


def test_who_dies_before_putting_its_name_to_a_cell_does_not_keep_it(tmp_path: Path) -> None:
    alive, dies = sweep(tmp_path), sweep(tmp_path)
    alive.queue.fill()
    alive.queue.hold()
    claim = alive.queue.claim()
    assert claim is not None
    alive.queue.release(claim)
    dies.queue._study.ask()
    assert sweep(tmp_path).queue.recover() == 1


def test_a_failure_is_final_until_it_is_retried(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    found.queue.fill()
    run_all(found, Outcome.FAILED)
    found.queue.fill()
    assert found.queue.claim() is None
    assert found.queue.counts().faults == 4
    assert found.queue.retry_failed() == 4
    run_all(found)
    assert found.queue.counts().outcomes == {"finished": 4}
    assert [r.outcome for _, _, r in found.queue.cells() if r] == ["finished"] * 4


def test_two_sweeps_in_one_file_do_not_mix(tmp_path: Path) -> None:
    one, two = sweep(tmp_path), sweep(tmp_path, definition(lr=["1e-3,1e-1"]))
    assert one.name != two.name
    for found in (one, two):
        found.queue.fill()
    run_all(one)
    assert_one_record_a_cell(one)
    assert two.queue.counts().waiting == 4
    run_all(two)
    assert {settings["lr"] for _, settings, _ in two.queue.cells()} == {1e-3, 1e-1}


def test_the_same_function_name_in_another_folder_is_another_sweep(tmp_path: Path) -> None:
    assert definition("a/train.py").name != definition("b/train.py").name
    assert definition("a/train.py").name.startswith("train-train-")


def test_a_named_study_keeps_its_definition(tmp_path: Path) -> None:
    sweep(tmp_path, name="mine")
    with pytest.raises(InputError, match=r"'mine' is another sweep: its seeds is \(0,\), not"):
        sweep(tmp_path, definition(seeds=2), name="mine")


def test_a_study_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    import optuna

    found = sweep(tmp_path)
    study = optuna.create_study(storage=found.storage.optuna, study_name="theirs")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(InputError, match="'theirs' is no sweep of ebbtide's"):
        sweep(tmp_path, name="theirs")


def test_a_changed_file_is_refused_and_noted_when_allowed(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    file = write_function(tmp_path, "return 1")
    before = Target.at(file, "train")
    found.check_file(before, allow_changed=False)
    found.check_file(before, allow_changed=False)
    file.write_text(file.read_text() + "\n")
    after = Target.at(file, "train")
    with pytest.raises(InputError, match=r"train.py has changed since this sweep began"):
        found.check_file(after, allow_changed=False)
    found.check_file(after, allow_changed=True)
    assert found.hashes == (before.sha256, after.sha256)
    with pytest.raises(InputError, match="has changed"):
        found.check_file(before, allow_changed=False)


@pytest.mark.parametrize("content", ["notes", "notes\n", '{"op": 1}\n', '{"op_code":0}\n'])
def test_a_file_that_is_no_journal_is_not_touched(tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.txt"
    file.write_text(content)
    with pytest.raises(InputError, match="is no journal of sweeps"):
        open_storage(str(file), create=True)
    assert file.read_text() == content


@pytest.mark.parametrize(
    ("storage", "says"),
    [
        ("no/such.journal", "there is no folder"),
        (".", "is a folder"),
        ("mysql://me:secret@host/db", "not supported"),
        ("postgresql://me:secret@127.0.0.1:1/db", "cannot be used"),
        ("sqlite://", "names no file"),
        ("http://", "not supported"),
        ("x y://", "cannot be read"),
    ],
)
def test_storages_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says) as raised:
        open_storage(storage, create=True)
    assert "secret" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_sqlite_takes_one_worker(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'sweeps.db'}"
    with pytest.raises(InputError, match=r"SQLite has no row locks, and several workers"):
        open_storage(address, create=True, workers=2)
    storage = open_storage(address, create=True, workers=1)
    wanted = definition()
    found = Sweep(storage, wanted.name, wanted)
    found.queue.fill()
    run_all(found)
    assert_one_record_a_cell(found)
    script = (
        "import sys; from ebbtide.lab.sweep.storage import *;"
        f"open_storage({address!r}, create=False, workers=1)"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert b"another worker is at work on this file" in other.stderr
    storage.close()


def test_cells_that_another_sweep_finished_are_taken_over(tmp_path: Path) -> None:
    file = write_function(tmp_path, "return 1")
    target = Target(file, "train", "a" * 64)
    first = sweep(tmp_path)
    first.check_file(target, allow_changed=False)
    first.queue.fill()
    run_all(first)
    wider = sweep(tmp_path, definition(lr=["1e-3,1e-2,1e-1"]))
    wider.check_file(target, allow_changed=False)
    wider.queue.fill(wider.finished_elsewhere())
    claims = run_all(wider)
    assert {claim.settings["lr"] for claim in claims} == {1e-1}
    assert_one_record_a_cell(wider)
    # Another metric, another function, another file: none of it fits.
    for other in (definition(lr=["1e-3,1"], metric="f1"), definition("other.py", lr=["1e-3,1"])):
        stranger = sweep(tmp_path, other)
        stranger.check_file(target, allow_changed=False)
        assert stranger.finished_elsewhere() == {}


def test_tpe_chooses_points_by_optimizer_and_repeats_them_under_every_seed(tmp_path: Path) -> None:
    wanted = definition(
        optimizers="adamw,sgdw", sampler="tpe", points=6, seeds=2,
        lr=["1e-5..1e-1", "sgdw=1e-3..1"], weight_decay=["1e-3..1"],
    )  # fmt: skip
    found = sweep(tmp_path, wanted)
    found.queue.fill()
    claims = []
    for _ in range(3):
        claim = found.queue.claim()
        assert claim is not None
        claims.append(claim)
        found.queue.finish(claim, done(claim, claim.settings["lr"]))
    again = sweep(tmp_path, wanted)  # after a kill, another process goes on
    again.queue.fill()
    claims += run_all(again)
    assert_one_record_a_cell(again)
    assert len(claims) == 24
    places = Counter((c.settings["optimizer"], c.settings["lr"], c.settings["weight_decay"])
                     for c in claims)  # fmt: skip
    assert set(places.values()) == {2}
    assert Counter(optimizer for optimizer, *_ in places) == {"adamw": 6, "sgdw": 6}
    for optimizer, lr, weight_decay in places:
        low, high = {"adamw": (1e-5, 1e-1), "sgdw": (1e-3, 1)}[optimizer]
        assert low <= lr <= high
        assert 1e-3 <= weight_decay <= 1


def test_tpe_keeps_the_point_of_a_cell_that_was_interrupted(tmp_path: Path) -> None:
    wanted = definition(sampler="tpe", points=3, lr=["1e-5..1e-1"], weight_decay=["1e-3..1"])
    found = sweep(tmp_path, wanted)
    found.queue.fill()
    first = found.queue.claim()
    assert first is not None
    found.queue.release(first)
    second = found.queue.claim()
    assert second is not None
    assert second.settings == first.settings


def test_diverged_and_pruned_cells_tell_the_sampler_the_truth(tmp_path: Path) -> None:
    found = sweep(tmp_path, definition(maximize=True))
    found.queue.fill()
    for record in (
        Record(Outcome.DIVERGED, float("nan")),
        Record(Outcome.PRUNED, curve=((1, 0.5), (3, 0.25))),
        Record(Outcome.TIMEOUT),
        Record(Outcome.FINISHED, 4.0),
    ):
        claim = found.queue.claim()
        assert claim is not None
        found.queue.finish(claim, record)
    ended = {t.value: t.state.name for t in trials(found)}
    assert ended == {-float("inf"): "COMPLETE", 0.25: "PRUNED", None: "FAIL", 4.0: "COMPLETE"}
    assert found._study.best_value == 4.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizers": " , "}, "no optimizer named"),
        ({"optimizers": "adamw,a b"}, "'a b' is no name of an optimizer"),
        ({"lr": ["adam=0.1"]}, "for an optimizer that --optimizer does not name"),
        ({"lr": ["0.1", "0.2"]}, "--lr is given twice for all: write one grid"),
        ({"lr": ["0.1", "AdamW=0.2", "adamw=0.3"]}, "--lr is given twice for adamw"),
        ({"optimizers": "adam,sgd", "lr": ["sgd=0.1"]}, "--lr says nothing for adam"),
        ({"lr": ["0,1"]}, "must be more than 0"),
        ({"ratio": ["1"], "timescale": ["1"], "weight_decay": []}, "not several"),
        ({"optimizers": "adam", "timescale": ["100"], "weight_decay": []}, "has no timescale"),
        ({"sampler": "bayes"}, "unknown sampler 'bayes'"),
        ({"sampler": "tpe"}, "--points belongs to the samplers random and tpe"),
        ({"points": 5}, "--points belongs to"),
        ({"sampler": "tpe", "points": 5}, "is not of the form low..high"),
        ({"sampler": "random", "points": 5, "lr": ["0..1"]}, "must run from above 0"),
        ({"lr": ["1e-5..1:1000"], "weight_decay": ["1e-5..1:1000"]}, "is too large"),
    ],
)
def test_sweeps_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as raised:
        definition(**options)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ratio": ["10,100"]}, {0.01, 0.1, 1.0}),
        ({"timescale": ["1000,10000"]}, {1.0, 0.1, 0.01}),
    ],
)
def test_other_axes_set_the_weight_decay(options: dict[str, Any], expected: set[float]) -> None:
    wanted = definition(weight_decay=[], **options)
    found = {wanted.weight_decay(*slot.place) for slot in wanted.slots if slot.place}
    assert found == expected


@given(
    seeds=st.integers(1, 3),
    sampler=st.sampled_from(["grid", "random", "tpe"]),
    optimizers=st.sampled_from(["adamw", "adamw,adam", "lion,sgdw,adamw"]),
    maximize=st.booleans(),
)
def test_a_definition_survives_the_storage(
    seeds: int, sampler: str, optimizers: str, maximize: bool
) -> None:
    points = None if sampler == "grid" else 4
    wanted = definition(
        seeds=seeds, sampler=sampler, points=points, optimizers=optimizers, maximize=maximize,
        lr=["1e-3..1e-1:3"], weight_decay=["1e-3..1:3"],
    )  # fmt: skip
    again = Definition.from_json(wanted.to_json())
    assert again == wanted
    assert again.name == wanted.name
    assert again.slots == wanted.slots
    assert json.loads(wanted.to_json())["sampler"] == sampler


def test_random_points_are_the_same_for_every_optimizer_and_in_range() -> None:
    wanted = definition(
        optimizers="adamw,adam", sampler="random", points=20, lr=["1e-5..1e-1"],
        weight_decay=["1e-3..1"],
    )  # fmt: skip
    places = {o: [s.place for s in wanted.slots if s.optimizer == o] for o in ("adamw", "adam")}
    assert places["adamw"] == places["adam"]
    assert len(set(places["adamw"])) == 20
    assert all(1e-5 <= place[0] <= 1e-1 and 1e-3 <= place[1] <= 1
               for place in places["adam"] if place)  # fmt: skip
