"""Where Triton's kernels run, and why not elsewhere; asks without importing Triton."""

from __future__ import annotations

import importlib.metadata
import os
import re
from functools import cache

import torch

__all__ = ["OLDEST_GPU", "OLDEST_TRITON", "interprets", "obstacle"]

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)  # compute capability


@cache
def obstacle(device: torch.device) -> str | None:
    """Say why the kernels do not run on a device other than the CPU; `None` if they do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if os.environ.get("EBBTIDE_BACKEND") == "torch":
        return "EBBTIDE_BACKEND=torch asks for it"
    version = _triton_version()
    if version is None:
        return "Triton is not installed"
    if version < OLDEST_TRITON:
        return f"Triton {_words(version)} is older than {_words(OLDEST_TRITON)}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"compute capability {_words(capability)} is below {_words(OLDEST_GPU)}"
    return None


def interprets() -> bool:
    """Tell whether CPU tensors are asked to go through Triton's interpreter, for tests."""
    return os.environ.get("EBBTIDE_BACKEND") == "triton"


def _triton_version() -> tuple[int, ...] | None:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
