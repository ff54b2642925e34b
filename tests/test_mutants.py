"""A test of the tests: deliberately wrong arithmetic must fail the suite's checks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ebbtide.numpy
import ebbtide.reading
from ebbtide.rules import Recipe, Rule, Scalars
from tests.cases import Case
from tests.checks import (
    assert_float32_is_near,
    assert_float64_is_the_reference,
    assert_layout_does_not_matter,
)

CASE = Case("adam", "decoupled")
ROOT = Path(__file__).parent.parent


def _prepared_with(change: Callable[[Scalars], Scalars]) -> Any:
    original = Rule.prepare

    def prepare(self: Rule, group: Any, decay: float, l2: float) -> Recipe:
        recipe = original(self, group, decay, l2)
        return recipe._replace(fixed=change(recipe.fixed))

    return prepare


def _betas_swapped(scalars: Scalars) -> Scalars:
    return scalars._replace(
        exp_avg_weight=scalars.one_minus_beta2,
        beta2=1 - scalars.exp_avg_weight,
        one_minus_beta2=scalars.exp_avg_weight,
    )


def _one_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recipe.__call__

    def ahead(self: Recipe, step: int) -> Scalars:
        return original(self, step + 1)._replace(step=float(step))

    monkeypatch.setattr(Recipe, "__call__", ahead)


SCALAR_MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "beta1 and beta2 swapped": lambda patch: patch.setattr(
        Rule, "prepare", _prepared_with(_betas_swapped)
    ),
    "decay dropped": lambda patch: patch.setattr(
        ebbtide.reading, "decay_share", lambda *_, **__: 0.0
    ),
    "bias correction off by one": _one_step_ahead,
}


@pytest.mark.parametrize("mutate", SCALAR_MUTANTS.values(), ids=SCALAR_MUTANTS.keys())
@pytest.mark.parametrize("check", [assert_float64_is_the_reference], ids=lambda f: f.__name__)
def test_wrong_scalars_are_caught(
    mutate: Callable[[pytest.MonkeyPatch], None],
    check: Callable[[Case], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(CASE)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(CASE)


def test_an_ignored_stride_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_layout_does_not_matter(CASE)
    for module in [m for name, m in sys.modules.items() if name.startswith("ebbtide")]:
        if hasattr(module, "layout_of"):
            monkeypatch.setattr(module, "layout_of", lambda *_: "dense")
        if hasattr(module, "extents_of"):
            monkeypatch.setattr(module, "extents_of", lambda shape, _: tuple(shape))
    with pytest.raises(AssertionError):
        assert_layout_does_not_matter(CASE)


# (text of a source, what stands there in the mutant): each compiled into a core of its own.
KERNEL_MUTANTS = {
    "decay dropped": ("update.h", "const V kept = param * s.keep;", "const V kept = param;"),
    "second moment not squared": (
        "update.h",
        "madd(s.one_minus_beta2 * grad, grad, s.beta2 * exp_avg_sq)",
        "madd(splat<V>(s.one_minus_beta2), grad, s.beta2 * exp_avg_sq)",
    ),
    "epsilon dropped": (
        "update.h",
        "/ s.sqrt_bias_correction2 + s.eps",
        "/ s.sqrt_bias_correction2",
    ),
    "bias correction off by one": (
        "groups.h",
        "std::pow(beta2, s.step)",
        "std::pow(beta2, s.step + 1)",
    ),
    "last elements skipped": (
        "step.cc",
        "for (; j < n; ++j) update_at",
        "for (; j < 0; ++j) update_at",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", KERNEL_MUTANTS.values(), ids=KERNEL_MUTANTS.keys())
def test_a_wrong_kernel_fails_the_suite(mutant: tuple[str, str, str], tmp_path: Path) -> None:
    source, right, wrong = mutant
    copy = tmp_path / "source"
    for part in ("csrc", "src", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, copy / part)
    text = (copy / "csrc" / source).read_text()
    assert text.count(right) == 1, "the mutant no longer matches the source"
    (copy / "csrc" / source).write_text(text.replace(right, wrong))
    target = tmp_path / "site"
    install = ["-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, *install, "--target", target, copy], check=True, timeout=900)
    check = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import ebbtide\n"
        "assert ebbtide.__file__.startswith(sys.argv[1]), ebbtide.__file__\n"
        "from tests.checks import assert_float32_is_near, assert_float64_is_the_reference\n"
        "from tests.cases import Case\n"
        "for check in (assert_float32_is_near, assert_float64_is_the_reference):\n"
        "    try:\n"
        "        check(Case('adam-low-betas', 'decoupled'))\n"
        "    except (AssertionError, FloatingPointError):\n"
        "        sys.exit(7)\n"
    )
    # -S: without site-packages' hooks, one of which finds the package in this clone first.
    packages = sysconfig.get_path("purelib")
    ran = subprocess.run(
        [sys.executable, "-S", "-c", check, target, ROOT, packages],
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ran.returncode == 7, "the mutant was not noticed"


def test_the_checks_pass_on_the_right_kernel() -> None:
    assert_float32_is_near(CASE)
    assert_float64_is_the_reference(CASE)
