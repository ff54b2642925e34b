"""Compiles Triton's kernels for real GPUs, which takes none, and prints what came out as JSON.

Run as `python -m tests.compiled CAPABILITY NAME...` without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ebbtide.backends.triton import kernels, norm, prologue
from ebbtide.backends.triton.device import BLOCKS, WARPS

ADAM = {
    "RULE": 0, "PARAM": 0, "RESIDUAL": 0, "GRAD": 0, "STATE0": 0, "STATE1": 0, "STATE2": -1,
    "STOCHASTIC": False, "GUARD": True, "JUDGED": True, "PLAIN": True, "BLOCKS": BLOCKS,
}  # fmt: skip
BFLOAT16 = {**ADAM, "PARAM": 2, "GRAD": 2, "STOCHASTIC": True}
POINTERS = {
    "rows": "*i64", "grads": "*i64", "row_of_tile": "*i32", "scalars": "*fp64", "verdict": "*fp64",
    "lanes": "*i32", "spoilt": "*i64", "alarm": "i64", "partial": "*fp64", "begin": "i32",
    "end": "i32", "partials": "i32", "found_inf": "*fp32", "loss_scale": "*fp32",
    "counters": "*i64", "count": "i32", "numbers": "*fp64", "sources": "*i64",
}  # fmt: skip
# Name: kernel, constants, warps.
VARIANTS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "adam float32": (kernels.step, ADAM, WARPS[4]),
    "adam float32, capturable": (kernels.step, {**ADAM, "PLAIN": False}, WARPS[4]),
    "adam float64": (
        kernels.step, {**ADAM, "PARAM": 1, "GRAD": 1, "STATE0": 1, "STATE1": 1}, WARPS[8]),
    "amsgrad float32": (kernels.step, {**ADAM, "STATE2": 0}, WARPS[4]),
    "adam bfloat16": (kernels.step, {**BFLOAT16, "STATE0": 2, "STATE1": 2}, WARPS[2]),
    "adam float16": (
        kernels.step, {**BFLOAT16, "PARAM": 3, "GRAD": 3, "STATE0": 2, "STATE1": 2}, WARPS[2]),
    "adam 8bit": (kernels.step, {**ADAM, "STATE0": 4, "STATE1": 5}, WARPS[1]),
    "adam 8bit, 8-bit residual": (
        kernels.step, {**BFLOAT16, "RESIDUAL": 8, "STATE0": 4, "STATE1": 5}, WARPS[1]),
    "adam 8bit, 16-bit residual": (
        kernels.step, {**BFLOAT16, "RESIDUAL": 16, "STATE0": 4, "STATE1": 5}, WARPS[1]),
    "adam 8bit, float16, 8-bit residual": (
        kernels.step,
        {**BFLOAT16, "PARAM": 3, "GRAD": 3, "RESIDUAL": 8, "STATE0": 4, "STATE1": 5}, WARPS[1]),
    "adam 8bit, float16, 16-bit residual": (
        kernels.step,
        {**BFLOAT16, "PARAM": 3, "GRAD": 3, "RESIDUAL": 16, "STATE0": 4, "STATE1": 5}, WARPS[1]),
    "sgd float32": (kernels.step, {**ADAM, "RULE": 1, "STATE0": -1, "STATE1": -1}, WARPS[4]),
    "momentum float32": (kernels.step, {**ADAM, "RULE": 1, "STATE1": -1}, WARPS[4]),
    "norm": (
        norm.sum_squares,
        {"FINITE_ONLY": True, "SIZE": 128 * BLOCKS}, 2),
    "prepare adam": (prologue.prepare, dict.fromkeys((
        "DECIDE", "JUDGED", "FOUND_INF", "LOSS_SCALE", "CLIP", "SKIP", "ADAM"), True), 1),
    "prepare sgd": (prologue.prepare, dict.fromkeys((
        "DECIDE", "JUDGED", "FOUND_INF", "LOSS_SCALE", "CLIP", "SKIP"), True) | {"ADAM": False}, 1),
}  # fmt: skip


def compiled(kernel: Any, constants: dict[str, Any], warps: int, capability: int) -> Any:
    """Compile a kernel as a launch would."""
    signature = {
        name: "constexpr" if name in constants else POINTERS[name] for name in kernel.arg_names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def described(binary: Any) -> dict[str, Any]:
    """Count the instructions and the resources that matter."""
    ptx = binary.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        command = [tools / "nvdisasm", "-c", file.name]
        machine = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,) = re.search(r"REG:(\d+)", usage).groups()
    return {
        "memory": Counter(re.findall(r"\b(?:ld|st)\.global[\w.]*", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.ftz\.f32", ptx)),
        "fusion": binary.metadata.enable_fp_fusion,
        "registers": int(registers),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", machine)),
    }


if __name__ == "__main__":
    found = {name: described(compiled(*VARIANTS[name], int(sys.argv[1]))) for name in sys.argv[2:]}
    print(json.dumps(found))
