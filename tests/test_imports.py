"""What importing each part loads, and what `ebbtide` says where the laboratory is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import ebbtide
from ebbtide.__main__ import EXTRAS, VERBS
from ebbtide.cli import app
from ebbtide.lab.doctor import facts

HEAVY = {"matplotlib", "numpy", "optuna", "rich", "scipy", "sklearn", "torch", "typer"}

# Parts and the packages they may load; every other one gets by with the standard library.
MAY_LOAD = {
    "ebbtide.backends": {"numpy"},
    "ebbtide.cli": {"numpy", "rich", "typer"},
    "ebbtide.cli_bench": {"rich", "typer"},
    "ebbtide.cli_inspect": {"rich", "typer"},
    "ebbtide.cli_science": {"numpy", "rich", "typer"},
    "ebbtide.cli_sweep": {"rich", "typer"},
    "ebbtide.lab": {"numpy"},
    "ebbtide.numpy": {"numpy"},
    "ebbtide.torch": {"numpy", "torch"},
}

PARTS = sorted(module.name for module in pkgutil.iter_modules(ebbtide.__path__, "ebbtide."))
MODULES = sorted(module.name for module in pkgutil.walk_packages(ebbtide.__path__, "ebbtide."))


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("part", ["ebbtide", *PARTS])
def test_importing_a_part_loads_no_more_than_it_may(part: str) -> None:
    run = python("-c", f"import sys, {part}; print(*sys.modules)")
    assert run.returncode == 0, run.stderr
    assert HEAVY & set(run.stdout.split()) <= MAY_LOAD.get(part, set())


@pytest.mark.parametrize("name", MODULES)
def test_all_names_what_a_module_defines(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == name
    }
    assert public <= set(getattr(module, "__all__", public))
    assert [key for key in getattr(module, "__all__", ()) if not hasattr(module, key)] == []


def test_version_is_that_of_the_installed_distribution() -> None:
    assert ebbtide.__version__ == importlib.metadata.version("ebbtide")
    with pytest.raises(AttributeError, match="no attribute 'versoin'"):
        _ = ebbtide.versoin


def test_the_stub_of_the_core_is_what_nanobind_generates(tmp_path: Path) -> None:
    stub = tmp_path / "_core.pyi"
    run = python("-m", "nanobind.stubgen", "-q", "-m", "ebbtide._core", "-o", str(stub))
    assert run.returncode == 0, run.stderr
    committed = Path(ebbtide.__file__).parent / "_core.pyi"
    assert stub.read_text() == committed.read_text(), (
        f"python -m nanobind.stubgen -m ebbtide._core -o {committed}"
    )


# Blocks a package, as in an installation without its extra, and runs the command.
WITHOUT = (
    "import sys; sys.modules[sys.argv.pop(1)] = None; from ebbtide.__main__ import main; main()"
)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_without_the_laboratory_names_verbs_and_remedy(arguments: list[str]) -> None:
    run = python("-c", WITHOUT, "typer", *arguments)
    assert run.returncode == 0, run.stderr
    assert all(verb in run.stdout for verb in VERBS)
    assert "pip install 'ebbtide[lab]'" in run.stdout


@pytest.mark.parametrize("verb", [*sorted({*VERBS} - {"doctor"}), "no-such-verb"])
def test_a_verb_without_the_laboratory_is_one_line_and_status_2(verb: str) -> None:
    run = python("-c", WITHOUT, "typer", verb)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == "ebbtide: typer is not installed: pip install 'ebbtide[lab]'\n"


def test_doctor_needs_no_laboratory() -> None:
    run = python("-c", WITHOUT, "typer", "doctor")
    assert run.returncode == 0, run.stderr
    lines = [line.split("  ", 1) for line in run.stdout.splitlines()]
    assert [name for name, _ in lines] == [*facts()]
    assert lines[0][1].strip() == ebbtide.__version__


def test_verbs_are_those_of_the_command_line() -> None:
    assert {*VERBS} == {*typer.main.get_command(app).commands}  # type: ignore[attr-defined]


def test_extras_bring_the_packages_that_the_command_line_may_miss() -> None:
    distribution = {"sklearn": "scikit-learn"}
    brought = {
        (re.split("[^a-z0-9-]", requirement)[0], extra)
        for requirement in importlib.metadata.requires("ebbtide") or ()
        for extra in re.findall("extra == ['\"](.+)['\"]", requirement)
    }
    assert {(distribution.get(name, name), extra) for name, extra in EXTRAS.items()} <= brought
