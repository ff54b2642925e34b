"""Setting up: what is missing is said in one line; without a compiler optimizers still step."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PYTHON_WITHOUT_VENV = f"""#!/bin/sh
exec {sys.executable} -c "import sys; sys.modules['ensurepip'] = None; exec(sys.argv[2])" "$@"
"""


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # -n -B: as if nothing had been built, and without building it.
    command = ["make", "-nB", *arguments]
    # Not as a part of the make that may be running this test.
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("PYTHON=false", "Python 3.11 or newer is needed"),
        ("PYTHON={tmp_path}/python", "apt install python3-venv"),
        ("CXX=no-such-compiler", "the C++ compiler no-such-compiler is missing: apt install g++"),
    ],
)
def test_a_missing_prerequisite_is_one_line_and_status_2(
    target: str, setting: str, remedy: str, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON_WITHOUT_VENV)
    python.chmod(0o755)
    run = make(target, setting.format(tmp_path=tmp_path))
    assert run.returncode == 2
    assert remedy in run.stderr
    assert (run.stdout + run.stderr).count("\n") == 1


def test_nothing_is_missing_here() -> None:
    run = make("demo")
    assert run.returncode == 0, run.stderr


STEP_WITHOUT_CORE = """
import warnings
import numpy as np
from ebbtide.backends.cpu import describe
from ebbtide.numpy import AdamW

with warnings.catch_warnings(record=True) as caught:
    weight = np.ones((2, 2))
    optimizer = AdamW({"weight": weight}, lr=0.1, weight_decay=0.5)
    optimizer.step({"weight": np.ones((2, 2))})
    AdamW({"weight": weight})
print(weight[0, 0], len(caught), describe()["core"])
"""


@pytest.mark.slow
def test_an_installation_without_a_compiler_steps_through_the_reference(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-build-isolation", "--no-deps"]
    without = {**os.environ, "CXX": "no-such-compiler"}
    subprocess.run([*pip, "--target", tmp_path, ROOT], check=True, env=without, timeout=120)
    # -S leaves out the editable installation, which would be found first.
    run = subprocess.run(
        [sys.executable, "-S", "-c", STEP_WITHOUT_CORE],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{sysconfig.get_path('purelib')}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    value, warned, core = run.stdout.split(" ", 2)
    assert float(value) == pytest.approx(1 * (1 - 0.1 * 0.5) - 0.1, abs=1e-8)
    assert warned == "1"
    assert core.startswith("not compiled")
