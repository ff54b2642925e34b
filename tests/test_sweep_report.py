"""What a sweep's report says, against results whose answer is known, and whom it trusts: nobody."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbtide.lab.errors import InputError
from ebbtide.lab.grid import parse_grid
from ebbtide.lab.pictures import LIGHT
from ebbtide.lab.sweep.analysis import coupling, edges, noise, width
from ebbtide.lab.sweep.drawings import maps
from ebbtide.lab.sweep.outcome import Outcome, Record
from ebbtide.lab.sweep.report import parse_rise, to_json, write_report
from ebbtide.lab.sweep.results import ArmResults, Cell, Results
from ebbtide.lab.sweep.words import across, extended, said
from tests.sweeps import definition

LRS, DECAYS = "1e-5..1e-1:9", "1e-3..1:7"


def results(
    *losses: Callable[[float, float], float],
    seeds: int = 3,
    noise_size: float = 0.02,
    change: Callable[[float, float, int], Record | None] | None = None,
    **options: Any,
) -> Results:
    """Return the results that a function of log10 lr and log10 weight decay would give."""
    names = ("adamw", "adam", "sgdw")[: len(losses)]
    given = {"lr": [LRS], "weight_decay": [DECAYS], **options}
    wanted = definition(optimizers=",".join(names), seeds=seeds, **given)
    draw = np.random.default_rng(0)

    def record(loss: Callable[[float, float], float], lr: float, wd: float, seed: int) -> Record:
        changed = change(lr, wd, seed) if change else None
        value = loss(math.log10(lr), math.log10(wd)) if wd else 9.0
        return changed or Record(Outcome.FINISHED, value + noise_size * draw.normal() + 0.3 * seed)

    arms = []
    for name, loss in zip(names, losses, strict=True):
        places = [s.place for s in wanted.slots if s.optimizer == name and s.seed == 0]
        cells = [
            [
                Cell(point, {"optimizer": name, "lr": lr, "weight_decay": wd, "seed": seed},
                     record(loss, lr, wd, seed))
                for point, (lr, wd) in enumerate(filter(None, places))
            ]
            for seed in range(seeds)
        ]  # fmt: skip
        lrs, decays = np.array(places).T
        arms.append(ArmResults(name, lrs, decays, cells, wanted.maximize))
    return Results("study", wanted, arms, ("a" * 64,))


def bowl(x: float, y: float) -> float:
    return (x + 3) ** 2 + (y + 1.5) ** 2


def diagonal(x: float, y: float) -> float:
    return (x + y + 4.5) ** 2 + 0.05 * (x + 3) ** 2


def test_the_noise_is_what_the_seeds_do_to_single_points() -> None:
    found = noise(results(bowl, noise_size=0.05, seeds=5).arms[0])
    assert found is not None
    # What a seed does to all points alike, 0.3 here, is none. 60 degrees of freedom: ± 20 %.
    assert found.deviation == pytest.approx(0.05, rel=0.2)
    assert found.band == pytest.approx(2.0 * found.deviation * math.sqrt(2 / 5), rel=0.02)
    assert found.within.sum() == 1


def test_seeds_that_change_nothing_are_mentioned() -> None:
    def same(lr: float, wd: float, seed: int) -> Record:
        return Record(Outcome.FINISHED, lr + wd)

    wanted = "every seed gave the same numbers: is settings.seed used?"
    assert wanted in said(results(bowl, change=same))[0].best_sentence()
    assert wanted not in said(results(bowl, change=same, seeds=1))[0].best_sentence()
    assert wanted not in said(results(bowl))[0].best_sentence()


def test_the_best_cell_has_no_second_frame() -> None:
    found = results(bowl, noise_size=2.0)
    items = said(found)
    assert items[0].noise is not None
    others = int(items[0].noise.within.sum()) - 1
    assert others > 0
    frames = [p for p in maps(found, items)(LIGHT, False).axes[0].patches if not p.get_fill()]
    assert sum(frame.get_width() < 1 for frame in frames) == others
    assert sum(frame.get_width() == 1 for frame in frames) == 2


def test_a_single_seed_tells_no_noise() -> None:
    single = results(bowl, seeds=1)
    assert noise(single.arms[0]) is None
    assert "one seed: the noise is not known" in said(single)[0].best_sentence()


def test_the_width_is_where_the_parabola_reaches_the_rise() -> None:
    arm = results(bowl, noise_size=0.0, lr=["1e-5..1e-1:81"]).arms[0]
    found = width(arm, 0.25)
    assert found is not None
    # (log10 factor)² = 0.25; interpolation between 81 points leaves less than 1 %.
    assert found.below.factor == pytest.approx(10**0.5, rel=0.01)
    assert found.above.factor == pytest.approx(10**0.5, rel=0.01)
    assert (found.below.until, found.above.until) == ("rise", "rise")


def test_the_width_ends_where_the_grid_does_or_where_nothing_is_known() -> None:
    def diverges(lr: float, wd: float, seed: int) -> Record | None:
        return Record(Outcome.DIVERGED, math.nan) if lr > 2e-3 and seed == 1 else None

    arm = results(bowl, lr=["1e-4..1e-1:4"], change=diverges).arms[0]
    found = width(arm, 50.0)
    assert found is not None
    assert (found.below.until, found.above.until) == ("edge", "unknown")
    assert found.below.factor == pytest.approx(10)
    assert found.above.factor == 1
    sentence = said(results(bowl, lr=["1e-4..1e-1:4"], change=diverges))[0].width_sentence()
    assert "how much larger is not known (the next cell came to no result)" in sentence


@pytest.mark.parametrize(
    ("loss", "low", "high", "slope"),
    [
        (bowl, -0.05, 0.05, 0.0),
        (diagonal, -1.0, -0.95, -1.0),
        (lambda x, y: diagonal(x, -3 - y), 0.95, 1.0, 1.0),
        # e/(2√(df)) by hand: 0.5/(2·√0.3) = 0.456; -e/(2f) = -0.833
        (lambda x, y: (x + 3) ** 2 + 0.5 * (x + 3) * (y + 1.5) + 0.3 * (y + 1.5) ** 2,
         -0.48, -0.43, -0.833),
    ],
)  # fmt: skip
def test_the_coupling_of_parabolas_is_the_one_by_hand(
    loss: Callable[[float, float], float], low: float, high: float, slope: float
) -> None:
    found = coupling(results(loss, noise_size=0.01).arms[0])
    assert found is not None
    assert low <= found.number.low <= found.number.mean <= found.number.high <= high
    assert found.slope == pytest.approx(slope, abs=0.05)


def test_the_coupling_says_nothing_where_there_is_no_valley() -> None:
    assert coupling(results(lambda x, y: 0.0, noise_size=0.0).arms[0]) is None
    assert coupling(results(lambda x, y: -x - y).arms[0]) is None
    assert coupling(results(bowl, lr=["1e-3,1e-2"]).arms[0]) is None
    assert "cannot be said" in said(results(lambda x, y: -x - y))[0].coupling_sentence()
    # Nothing but noise: a fit finds something, and the interval says what it is worth.
    assert "cannot be told" in said(results(lambda x, y: 0.0))[0].coupling_sentence()


def test_the_interval_of_the_coupling_holds_the_truth() -> None:
    """In 19 of 20 noisy sweeps, as an interval of 95 % should; 15 leave room for chance."""
    draw = np.random.default_rng(1)
    held = 0
    for _ in range(20):
        shake = draw.normal(size=(9, 7)) * 0.1

        def loss(x: float, y: float, shake: Any = shake) -> float:
            return bowl(x, y) + float(shake[round(2 * (x + 5)), round(2 * (y + 3))])

        found = coupling(results(loss, seeds=1).arms[0])
        assert found is not None
        held += found.number.low <= 0 <= found.number.high
    assert held >= 15


def test_edges_and_how_to_extend_them() -> None:
    found = results(lambda x, y: -x, weight_decay=["0,1e-3..1:4"])
    assert ("lr", "largest") in edges(found.arms[0], sampled=False)
    note = next(note for note in said(found)[0].edge_notes() if "largest lr" in note)
    assert "--lr 1e-05..0.1:9,0.316,1 and --reuse" in note
    assert edges(results(bowl).arms[0], sampled=False) == []
    # No decay at all is no edge.
    undecayed = results(lambda x, y: bowl(x, 0) + 20, weight_decay=["0,1e-3..1:4"])
    assert edges(undecayed.arms[0], sampled=False) == []


@pytest.mark.parametrize("grid", ["1e-5..1e-1:9", "0.001,0.01,0.5", "0.1", "0,1e-3..1:7"])
@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_an_extended_grid_holds_every_old_point_and_two_new_ones(grid: str, end: str) -> None:
    old = parse_grid(grid, name="lr", allow_zero=True)
    new = parse_grid(extended(old, end, sampled=False), name="lr", allow_zero=True)
    assert set(old) <= set(new)
    assert len(new) == len(old) + 2
    positive = [point for point in old if point]
    beyond = [p for p in new if (p > max(old) if end == "largest" else 0 < p < min(positive))]
    assert len(beyond) == 2


def test_more_is_better_mirrors_everything() -> None:
    low, high = (
        results(bowl, diagonal),
        results(lambda x, y: -bowl(x, y), lambda x, y: -diagonal(x, y), maximize=True),
    )
    for one, other in zip(said(low), said(high), strict=True):
        assert one.place == other.place
        assert one.edges == other.edges
        assert one.coupling is not None
        assert other.coupling is not None
        # The noise that both share is not mirrored.
        assert other.coupling.number.mean == pytest.approx(one.coupling.number.mean, abs=0.03)


def test_optimizers_are_compared_seed_by_seed() -> None:
    better = results(bowl, lambda x, y: bowl(x, y) + 0.5, noise_size=0.01)
    assert across(said(better)).startswith("AdamW's best value is 0.5")
    assert "below Adam + L2's" in across(said(better))
    level = results(bowl, bowl)
    assert "no difference can be seen" in across(said(level))
    assert "more seeds say" in across(said(results(bowl, bowl, seeds=1)))
    nothing = results(bowl, bowl, change=lambda *_: Record(Outcome.FAILED, error="E"))
    assert across(said(nothing)) == "No cell has come to a result."


class Page(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> \" ' & $\\frac{ {{ 7*7 }} \U0001f600"
)


def test_whatever_the_function_said_is_escaped(tmp_path: Path) -> None:
    def change(lr: float, wd: float, seed: int) -> Record | None:
        if lr > 0.05:
            return Record(Outcome.FAILED, error=HOSTILE, traceback=HOSTILE, output=HOSTILE)
        if lr > 0.01:
            return Record(Outcome.DIVERGED, math.nan, output=HOSTILE)
        curve = ((1, 0.5), (2, math.nan), (3, 0.25))
        return Record(Outcome.FINISHED, lr, {HOSTILE: lr}, HOSTILE, curve, output=HOSTILE)

    found = results(bowl, lr=["1e-3..1e-1:3"], weight_decay=["0.1,1"], seeds=2, change=change)
    write_report(found, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert {tag for tag, _ in page.elements} == {
        "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "p", "dl",
        "div", "dt", "dd", "section", "table", "caption", "thead", "tbody", "tr", "th", "td",
        "span", "figure", "picture", "source", "img", "figcaption", "details", "summary", "pre",
        "footer", "ul", "li",
    }  # fmt: skip
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    sources = [value or "" for _, attrs in page.elements
               for name, value in attrs.items() if name in ("src", "srcset", "href")]  # fmt: skip
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "&lt;script&gt;alert(1)" in text
    assert "49" not in text[text.index("alert(2)") :][:80]
    policy = [attrs.get("content") for tag, attrs in page.elements if tag == "meta"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy


def test_results_are_json_that_every_reader_takes() -> None:
    def change(lr: float, wd: float, seed: int) -> Record | None:
        return Record(Outcome.DIVERGED, math.inf) if lr > 0.05 else None

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = json.loads(to_json(results(bowl, change=change)), parse_constant=refuse)
    assert content["outcomes"] == {"diverged": 21, "finished": 168}
    assert content["optimizers"][0]["coupling"]["number"]["count"] == 23


def test_a_sampled_sweep_is_drawn_as_points(tmp_path: Path) -> None:
    wanted = definition(sampler="random", points=8, lr=["1e-5..1e-1"], weight_decay=["1e-3..1"])
    places = np.array([slot.place for slot in wanted.slots])
    cells = [
        Cell(i, {"optimizer": "adamw", "lr": lr, "weight_decay": wd, "seed": 0},
             None if i == 0 else Record(Outcome.FINISHED, bowl(math.log10(lr), math.log10(wd))))
        for i, (lr, wd) in enumerate(places.tolist())
    ]  # fmt: skip
    arm = ArmResults("adamw", places[:, 0], places[:, 1], [cells])
    write_report(Results("study", wanted, [arm]), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"map.png"}
    assert "1 have not been run yet" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("text", ["", "%", "-1", "0", "nan", "inf", "5 %%", "much"])
def test_rises_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="is no amount such as"):
        parse_rise(text)
