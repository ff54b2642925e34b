"""What Triton makes of the kernels for real GPUs: compiling takes none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Whole tiles are read and written 16 bytes at a time: loads and stores of the 16 elements of a
# thread. There are stores for usual tiles and for others; of 8-bit state twice for usual ones.
WIDE = {
    "adam float32": (4 * 4, 2 * 3 * 4),
    "adam bfloat16": (4 * 2, 2 * 3 * 2),
    "adam 8bit": (2 * 4 + 2, 2 * 4 + 3 * 2),
    "adam 8bit, 8-bit residual": (2 * 2 + 3, 2 * (2 + 1) + 3 * 2),
}
OTHERS = [
    "adam float32, capturable", "adam float64", "amsgrad float32", "adam float16",
    "adam 8bit, 16-bit residual", "adam 8bit, float16, 8-bit residual",
    "adam 8bit, float16, 16-bit residual", "sgd float32", "momentum float32", "norm",
    "prepare adam", "prepare sgd",
]  # fmt: skip


def compiled(capability: int, names: list[str], cache: Path) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    run = subprocess.run(
        [sys.executable, "-m", "tests.compiled", str(capability), *names],
        capture_output=True, text=True, check=False, timeout=300, env=environment,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_whole_tiles_move_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    for name, made in compiled(90, list(WIDE), tmp_path).items():
        loads, stores = (made["memory"].get(f"{kind}.global.v4.b32", 0) for kind in ("ld", "st"))
        # The lanes' constants come in wide loads as well.
        assert loads >= WIDE[name][0], (name, made)
        assert stores == WIDE[name][1], (name, made)
        assert made["spills"] == 0, (name, made)
        assert made["registers"] <= 168, (name, made)
        assert made["fma"] > 0, (name, made)
        assert made["fusion"] is False, (name, made)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    few = 8 if capability == 120 else 0
    for name, made in compiled(capability, [*WIDE, *OTHERS], tmp_path).items():
        assert made["spills"] <= few, (name, made)
