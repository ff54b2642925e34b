"""The compiled core is vectorised; compilers have fallen back to scalar code without a word."""

from __future__ import annotations

import importlib
import platform
import re
import subprocess
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 machine code")

# Packed instructions that the update of float32 and float64 parameters cannot do without.
PACKED = {
    "avx512": ("vsqrtps .*%zmm", "vsqrtpd .*%zmm", "vdivps .*%zmm", "vfmadd...ps .*%zmm"),
    "avx2": ("vsqrtps .*%ymm", "vsqrtpd .*%ymm", "vdivps .*%ymm", "vfmadd...ps .*%ymm"),
    "baseline": (r"\tsqrtps .*%xmm", r"\tsqrtpd .*%xmm", r"\tdivps .*%xmm", r"\tmulps .*%xmm"),
}


@pytest.fixture(scope="module")
def listing() -> str:
    """Return the core's machine code as `objdump`, a part of binutils like the linker, lists it."""
    core = importlib.import_module("ebbtide._core")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", core.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def functions(listing: str) -> Iterator[tuple[str, str]]:
    """Yield the mangled name and the instructions of each function."""
    for block in listing.split("\n\n"):
        if name := re.match(r"[0-9a-f]+ <(.+)>:\n", block):
            yield name[1], block


@pytest.mark.parametrize(
    ("instruction_set", "pattern"),
    [(name, pattern) for name, patterns in PACKED.items() for pattern in patterns],
)
def test_each_instruction_set_has_packed_arithmetic(
    listing: str, instruction_set: str, pattern: str
) -> None:
    assert re.search(pattern, listing), f"{instruction_set} is not vectorised"


def test_only_functions_private_to_a_kernel_object_use_wide_registers(listing: str) -> None:
    # An inline function that several objects share is kept once, by the linker's choice: were it
    # the AVX-512 one, a machine without AVX-512 would stop with an illegal instruction.
    wide = [name for name, code in functions(listing) if re.search("%[yz]mm", code)]
    assert wide
    assert [name for name in wide if "_GLOBAL__N_" not in name] == []
