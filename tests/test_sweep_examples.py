"""The examples run as they are."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

from ebbtide.lab.sweep import Settings

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("sweep_*.py"))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(path)
    monkeypatch.setattr(module, "STEPS", 60)
    reports: list[tuple[int, float]] = []
    settings = Settings("adamw", 1e-2, 0.1, 0, lambda *report: reports.append(report))
    result = module.train(settings)
    loss = result["loss"] if isinstance(result, dict) else result
    assert math.isfinite(loss)
    assert len(reports) >= 1


def test_there_are_examples_for_both_faces() -> None:
    assert [path.stem for path in EXAMPLES] == ["sweep_digits", "sweep_torch"]
