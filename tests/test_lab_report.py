"""Reports: whole, self-contained, escaped, and never written over something else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbtide.lab.conclusions import advantages, effects
from ebbtide.lab.errors import InputError
from ebbtide.lab.folder import RESULTS, check_folder, replace_folder
from ebbtide.lab.pictures import (
    DARK,
    LIGHT,
    Curve,
    CurvePanel,
    DotRow,
    Draw,
    HeatMap,
    HeatMaps,
    draw_curves,
    draw_dots,
    draw_heat_maps,
    to_png,
    to_svg,
)
from ebbtide.lab.pictures.heat import ColorScale
from ebbtide.lab.report import Picture, Report, Section, Table, picture_files, render
from ebbtide.lab.statistics import Interval, bootstrap_mean

NASTY = "<script>alert('x')</script>\"&"


def heat(values: Any, **changes: Any) -> Draw:
    values = np.asarray(values, np.float64)
    panel = HeatMap(
        "AdamW", [1e-3, 1e-2], [0.0, 0.1, 1.0], values, np.isnan(values), changes.pop("best", None)
    )
    return draw_heat_maps(HeatMaps([panel, panel], "accuracy (%)", **changes))


def curves() -> Draw:
    steps = np.arange(5)
    values = np.exp(-np.arange(10.0).reshape(2, 5) / 5)
    panel = CurvePanel("Loss", "nats", [Curve("AdamW", steps, values), Curve("SGD", steps, values)])
    return draw_curves([panel, panel])


def dots() -> Draw:
    values = np.array([1.0, 2.0, 4.0])
    rows = [
        DotRow("AdamW", values, bootstrap_mean(values)),
        DotRow("lost", values * np.nan, bootstrap_mean(values * np.nan)),
        DotRow("once", values[:1], bootstrap_mean(values[:1])),
    ]
    return draw_dots(rows, x_label="accuracy (%)", zero_line=True)


PICTURES = {
    "heat": heat([[1, 2, 3], [4, 5, np.nan]], best=(1, 1)),
    "heat of a loss": heat([[1, 2, 3], [4, 5, 60]], best=(0, 0), higher_is_better=False),
    "heat without numbers": heat(np.full((2, 3), np.nan)),
    "heat of equal cells": heat(np.ones((2, 3))),
    "heat over decades": heat([[1e-6, 1e-4, 1e-2], [1e-1, 1, np.nan]], higher_is_better=False),
    "curves": curves(),
    "dots": dots(),
}


def report(draw: Draw, text: str = "Plain") -> Report:
    table = Table([text, "b"], [[text, "2"]], caption=text, emphasised=0)
    section = Section(text, text, [text], [table], [Picture("picture", draw, text)])
    return Report(text, text, [(text, text)], [section], method=[text], facts={text: text})


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_pictures_are_drawn_light_and_dark_wide_and_narrow(
    name: str, narrow: bool, theme: Any
) -> None:
    figure = PICTURES[name](theme, narrow)
    assert (figure.get_figwidth() < 5) == narrow
    assert figure.get_facecolor()[:3] != (theme is LIGHT) * (0.0, 0.0, 0.0)


def test_files_are_what_their_names_say_and_always_the_same() -> None:
    draw = PICTURES["heat"]
    assert to_png(draw).startswith(b"\x89PNG")
    assert to_svg(draw).startswith(b"<?xml")
    assert to_svg(draw) == to_svg(draw)
    assert to_svg(draw, theme=DARK) != to_svg(draw)


def test_diverged_cells_are_hatched_and_the_best_is_framed() -> None:
    panel = PICTURES["heat"](LIGHT, False).axes[0]
    hatched = [patch for patch in panel.patches if patch.get_hatch()]
    framed = [patch for patch in panel.patches if not patch.get_fill()]
    assert [patch.get_xy() for patch in hatched] == [(1.5, 0.5)]
    assert {patch.get_xy() for patch in framed} == {(0.5, 0.5)}
    assert [text.get_text() for text in panel.texts] == ["1", "2", "3", "4", "5"]


def test_panels_share_one_colour_scale_whose_bright_end_is_the_good_one() -> None:
    for name, best in (("heat", 5), ("heat of a loss", 1)):
        figure = PICTURES[name](LIGHT, False)
        first, second = ([p.get_facecolor() for p in axes.patches] for axes in figure.axes[:2])
        assert first == second
        values = [float(text.get_text()) for text in figure.axes[0].texts]
        brightness = [sum(color[:3]) for color in first[: len(values)]]
        assert values[int(np.argmax(brightness))] == best


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([0.9, 1.0, 3.0], False), ([1e-6, 1e-3, 1.0], True), ([0.0, 1.0, 1e6], False),
     ([-1.0, 1.0, 1e6], False), ([2.0, 2.0, 2.0], False), ([np.nan, np.nan], False)],
)  # fmt: skip
def test_the_colours_follow_equal_ratios_where_values_span_decades(
    values: list[float], logarithmic: bool
) -> None:
    scale = ColorScale(np.array(values), LIGHT, higher_is_better=False)
    assert scale.log == logarithmic
    assert scale.of(np.array([*values, np.nan])).shape == (len(values) + 1, 4)


def test_a_small_picture_is_not_blown_up() -> None:
    text = render(report(PICTURES["dots"])).decode()
    (width,) = re.findall(r'style="max-width: (\d+)px"', text)
    figure = PICTURES["dots"](LIGHT, False)
    assert int(width) == pytest.approx(1.5 * 96 * figure.get_figwidth(), abs=1)


def test_html_holds_everything_and_reaches_for_nothing() -> None:
    text = render(report(PICTURES["dots"])).decode()
    addresses = re.findall(r'(?:src|href|srcset)="([^"]*)"', text)
    assert len(addresses) == 4
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert len(set(addresses)) == 4
    assert "<script" not in text
    assert "@import" not in text


def test_everything_in_a_report_is_escaped() -> None:
    text = render(report(PICTURES["dots"], NASTY)).decode()
    assert NASTY not in text
    assert "<script" not in text
    # title twice, lead, finding twice, section title, text and note, caption, heading, label of a
    # cell twice, cell, alt, conclusion, method, fact twice
    assert text.count("&lt;script&gt;") >= 16


def test_every_picture_is_also_a_png() -> None:
    files = picture_files(report(PICTURES["dots"]))
    assert list(files) == ["picture.png"]
    assert files["picture.png"].startswith(b"\x89PNG")


def test_sentences_are_chosen_by_the_intervals() -> None:
    up, down, level = Interval(2, 1, 3, 5), Interval(-2, -3, -1, 5), Interval(2, -1, 5, 5)
    found = {"A": up, "B": down, "C": level}
    assert advantages("X", "loss", found, unit="nats") == (
        "X's loss is 2.0 nats above A's (1.0 to 3.0) and 2.0 nats below B's (1.0 to 3.0); "
        "between X and C (-1.0 to 5.0) no difference can be seen."
    )
    assert effects("Decay", "loss", found, unit="nats") == (
        "Decay raises the loss of A by 2.0 nats (1.0 to 3.0); it lowers the loss of B by 2.0 nats "
        "(1.0 to 3.0); for C (-1.0 to 5.0) it makes no difference that can be seen."
    )
    assert effects("Decay", "loss", {"C": level}, unit="nats") == (
        "Decay makes no difference that can be seen for C (-1.0 to 5.0)."
    )


def files(command: str = "compare", **more: bytes) -> dict[str, bytes]:
    names = [RESULTS, "report.html", *more]
    content = json.dumps({"command": command, "files": names}).encode()
    return {RESULTS: content, "report.html": b"<html>", **more}


def test_a_report_replaces_an_earlier_one_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    check_folder(folder, "compare")
    replace_folder(folder, files(extra=b"1"))
    check_folder(folder, "compare")
    replace_folder(folder, files())
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", RESULTS]
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_folder(tmp_path / "empty", "compare")


def put(folder: Path, content: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"thesis.tex": b""}, "is not empty and holds no ebbtide report"),
        ({RESULTS: b"{}"}, "is not empty and holds no ebbtide report"),
        ({RESULTS: b"[1]"}, "is not empty and holds no ebbtide report"),
        (files("claims"), "holds a report of `ebbtide claims`"),
        ({**files(), "notes.txt": b"mine"}, "holds 'notes.txt', which the earlier report"),
    ],
)
def test_something_else_is_left_alone(tmp_path: Path, content: dict[str, bytes], says: str) -> None:
    folder = tmp_path / "folder"
    put(folder, content)
    with pytest.raises(InputError, match=says):
        check_folder(folder, "compare")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_a_file_or_the_current_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for place, says in (("file", "is a file"), (".", "current folder"), ("..", "current folder")):
        with pytest.raises(InputError, match=says):
            check_folder(Path(place), "compare")
    with pytest.raises(InputError, match="cannot be written"):
        check_folder(tmp_path / "file" / "below", "compare")


def test_a_failure_leaves_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "report"
    replace_folder(folder, files())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename, calls = Path.rename, []

    def fail_second(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(InputError, match="No space left on device"):
        replace_folder(folder, files(extra=b"new"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
