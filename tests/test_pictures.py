"""The pictures of the documentation are drawn by the command that the pages name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGES", tmp_path / "images")
    return module


def test_every_picture_is_shown_beside_its_command(pictures: ModuleType) -> None:
    pages = {path: path.read_text() for path in DOCS.glob("*.md")}
    for name in pictures.PICTURES:
        shown = [text for text in pages.values() if f"](images/{name}.png)" in text]
        assert len(shown) == 1, name
        assert f"`python docs/pictures.py {name}`" in shown[0]
        assert (DOCS / "images" / f"{name}.png").is_file()


def test_every_command_names_a_picture(pictures: ModuleType) -> None:
    for page in DOCS.glob("*.md"):
        named = re.findall(r"`python docs/pictures\.py ([a-z_]+)`", page.read_text())
        assert set(named) <= set(pictures.PICTURES)


@pytest.mark.parametrize("name", ["family", "policies", "momentum", "schedules"])
def test_a_picture_comes_out_the_same_each_time(pictures: ModuleType, name: str) -> None:
    drawn = []
    for _ in range(2):
        pictures.PICTURES[name]()
        drawn.append((pictures.IMAGES / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith(b"\x89PNG")


def test_an_unknown_picture_is_refused(
    pictures: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pictures.py", "landscape"])
    with pytest.raises(SystemExit, match="no picture 'landscape'; there are family"):
        pictures.main()
